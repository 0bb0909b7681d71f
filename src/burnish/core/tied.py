"""One matrix as the embedding of tokens and as the head: its gradient without a second matrix of that size.

The ordinary embedding's backward fills a (V, h) tensor with zeros and adds a few rows to it, and autograd adds all of it to the
head's gradient: three passes over the largest matrix of a small model, for a few rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TiedRows(torch.autograd.Function):
    """(weight (V, h), ids (T,), padding or None) → weight for the head, rows (T, h).

    Backward adds the rows' gradients to the head's gradient in place. Rows of the token `padding` get none, as in
    `torch.nn.functional.embedding`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, ids: Tensor, padding: int | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(ids)
        ctx.shape, ctx.padding = weight.shape, padding
        ctx.set_materialize_grads(False)
        return weight.detach(), weight.detach().index_select(0, ids)

    @staticmethod
    def backward(ctx: Any, d_weight: Tensor | None, d_rows: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[override]
        (ids,) = ctx.saved_tensors
        if d_rows is None:
            return d_weight, None, None
        if ctx.padding is not None:
            d_rows = d_rows.masked_fill(ids[:, None] == ctx.padding, 0.0)
        if d_weight is None:
            d_weight = d_rows.new_zeros(ctx.shape)
        return d_weight.index_add_(0, ids, d_rows.to(d_weight.dtype)), None, None

"""A head that is also the embedding, computed so that their common gradient is made once (`core.tied`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.tied import TiedRows
from burnish.models.fuse import is_fused, is_stock
from burnish.models.lm_head import get_backbone


class TiedEmbedding:
    """The embedding of one forward pass.

    Attributes:
        head: (V, h) the weight that the head of this pass must read; None before `rows` was called.
    """

    def __init__(self, embedding: nn.Embedding) -> None:
        self._embedding = embedding
        self.head: Tensor | None = None

    def rows(self, ids: Tensor) -> Tensor:
        """(T,) token ids → (T, h)."""
        rows: Tensor
        self.head, rows = TiedRows.apply(self._embedding.weight, ids, self._embedding.padding_idx)  # type: ignore[misc]
        return rows


def find_tied_embedding(inner: Any) -> TiedEmbedding | None:
    """The embedding of a model whose blocks run fused, if it is the head too and in training; else None."""
    embedding, head = inner.get_input_embeddings(), inner.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear or not torch.is_grad_enabled():
        return None
    weight = embedding.weight
    if weight is not head.weight or not weight.requires_grad or type(weight) is not nn.Parameter:
        return None
    odd = embedding.max_norm is not None or embedding.scale_grad_by_freq or embedding.sparse or not is_stock(embedding)
    if odd or weight.device.type != "cpu" or not is_fused(get_backbone(inner)):
        return None
    return TiedEmbedding(embedding)

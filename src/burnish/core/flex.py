"""Packed attention through PyTorch's flex attention, for CUDA: one kernel for the whole row with a block mask.

Not used on the CPU, where flex attention has no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from burnish.core.batch import Layout, move
from burnish.core.plan import AttentionPlan

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_mask_mod(layout: Layout, window: int | None, device: torch.device | str = "cpu") -> MaskFunction:
    """mask_mod(batch, head, query, key) of a packed row: whether the query sees the key.

    Args:
        layout: The packed row.
        window: A key is visible if its restarted position is less than this many before the query's.
    """
    group = torch.empty(layout.total, dtype=torch.int32)
    part = torch.zeros(layout.total, dtype=torch.int32)  # 0 = prompt, 1 … K = completion
    position = torch.empty(layout.total, dtype=torch.int32)
    for i, span in enumerate(layout.groups):
        group[span.start : span.end] = i
        position[span.start : span.start + span.prompt] = torch.arange(span.prompt)
        for k, c in enumerate(span.completions, start=1):
            part[c.start : c.start + c.length] = k
            position[c.start : c.start + c.length] = torch.arange(span.prompt, span.prompt + c.length)
    group, part, position = (move(x, device) for x in (group, part, position))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (group[query] == group[key]) & ((part[key] == 0) | (part[key] == part[query]))
        visible = same & (position[key] <= position[query])
        return visible if window is None else visible & (position[query] - position[key] < window)

    return mask_mod


@lru_cache(maxsize=1)
def _compiled() -> tuple[Callable[..., Any], Callable[..., Any]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    return torch.compile(flex_attention, dynamic=True), create_block_mask


def run_flex(
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """(1, H, T, D), (1, N, T, D) → (1, T, H, Dv). Sinks are applied through the log-sum-exp: o · e^lse / (e^lse + e^sink)."""
    attend, create = _compiled()
    cached = ("flex", window, query.device)
    if cached not in plan.block_masks:
        mask_mod = build_mask_mod(plan.layout, window, query.device)
        plan.block_masks[cached] = create(mask_mod, None, None, plan.total, plan.total, device=query.device)

    limit = softcap or 1.0

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / limit) * limit

    given: dict[str, Any] = {
        "score_mod": None if softcap is None else cap, "block_mask": plan.block_masks[cached], "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }  # fmt: skip
    if sinks is None:
        return attend(query, key, value, **given).transpose(1, 2).contiguous()
    out, lse = attend(query, key, value, return_lse=True, **given)
    keep = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
    return (out * keep[..., None].to(out.dtype)).transpose(1, 2).contiguous()

"""torch's `varlen_attn` by its definition, on any device and in any precision: what stands for it where there is no GPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
) -> Tensor:
    """(Tq, H, D), (Tk, N, D) → (Tq, H, D); sequences are aligned at the lower right, windows are (left, right), −1 = all."""
    rep = query.shape[1] // key.shape[1]
    assert enable_gqa or rep == 1
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k)
    at, seen = cu_seq_q.tolist(), cu_seq_k.tolist()
    assert at[-1] == query.shape[0] and seen[-1] == key.shape[0] == value.shape[0]
    assert max_q == max(b - a for a, b in itertools.pairwise(at))
    assert max_k == max(b - a for a, b in itertools.pairwise(seen))
    parts = []
    for a, b, c, d in zip(at, at[1:], seen, seen[1:], strict=False):
        q = query[a:b].transpose(0, 1)
        k, v = (x[c:d].repeat_interleave(rep, 1).transpose(0, 1) for x in (key, value))
        distance = torch.arange(d - c - (b - a), d - c)[:, None] - torch.arange(d - c)[None, :]
        mask = torch.ones_like(distance, dtype=torch.bool)
        if window_size[0] >= 0:
            mask &= distance <= window_size[0]
        if window_size[1] >= 0:
            mask &= distance >= -window_size[1]
        scores = (q @ k.transpose(1, 2)) * (query.shape[-1] ** -0.5 if scale is None else scale)
        scores = scores.masked_fill(~mask.to(scores.device), float("-inf"))
        parts.append((scores.softmax(-1) @ v).transpose(0, 1))
    return torch.cat(parts)

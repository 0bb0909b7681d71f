"""From the projections of a block to the outputs of its heads and back, by C kernels: norms of the heads, rotation, attention.

Shapes: T tokens, H query heads, N key/value heads, D head size, O = (H + 2N)·D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.core.kernels import calls
from burnish.core.segments import AttentionPlan

_KEEP = 1 << 21  # numbers of turned rows a layer may keep for backward instead of computing them again


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What the block's tensors do not say.

    Attributes:
        heads, kv_heads, head_size: H, N, D.
        scale: Of the attention scores.
        eps: Of the block's norm. head_eps: Of the norms of queries and keys.
        low: The compute type of matrix products.
        keeps: A backward pass follows: what attention has computed may be kept for it.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    eps: float
    head_eps: float
    low: torch.dtype
    keeps: bool = False

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.low, torch.float32)

    @property
    def turn(self) -> calls.Heads:
        return calls.Heads(self.heads, self.kv_heads, self.head_size, self.scale, self.head_eps)


@dataclass(frozen=True, slots=True)
class Turning:
    """What queries and keys go through before they meet: norms (D,) or None, then rotation by the angles (T, D)."""

    q_norm: Tensor | None
    k_norm: Tensor | None
    cos: Tensor
    sin: Tensor

    def apply(self, qkv: Tensor, spec: BlockSpec) -> Tensor:
        """(T, O) → (T, H + 2N, D) fp32: scaled and rotated queries, rotated keys, values."""
        return calls.rotate(qkv, self.q_norm, self.k_norm, self.cos, self.sin, spec.turn)


def has_kernels(turning: Turning, plan: AttentionPlan, spec: BlockSpec) -> bool:
    """Whether the kernels take this row and these tensors."""
    pair = (turning.q_norm is None) == (turning.k_norm is None)
    wide = turning.q_norm, turning.k_norm, turning.cos, turning.sin
    return pair and spec.turn.fits and plan.has_kernel(spec.low, *wide)


def attend_heads(
    qkv: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Projections (T, O) → outputs of the heads (T, H, D) in the compute type, and what may be kept for backward."""
    rows = turning.apply(qkv, spec)
    heads, lse = calls.attend(rows, plan.table, spec.heads, spec.kv_heads, spec.low, spec.keeps)
    if lse is None:
        return heads, ()
    return heads, (lse, rows) if rows.numel() <= _KEEP else (lse,)


def attend_heads_backward(
    qkv: Tensor, kept: Sequence[Tensor], d_heads: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d heads (T, H, D) → d projections (T, O), d q norm, d k norm; `kept` as `attend_heads` gave it."""
    lse, rows = (*kept, None, None)[:2]
    rows = turning.apply(qkv, spec) if rows is None else rows
    if lse is None:
        _, lse = calls.attend(rows, plan.table, spec.heads, spec.kv_heads, spec.low, True)
    assert lse is not None
    grad = d_heads.to(spec.low).contiguous()
    d_rows = calls.attend_backward(rows, plan.table, spec.heads, spec.kv_heads, grad, lse)
    return calls.rotate_backward(d_rows, qkv, turning.q_norm, turning.k_norm, turning.cos, turning.sin, spec.turn)

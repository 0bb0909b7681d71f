"""From the projections of a block to the outputs of its heads and back: norms of the heads, rotation, attention.

Three ways give the same numbers: kernels (`core.kernels`) where groups are short and the machine has them, batches of padded
groups (`core.group_attention`) where groups are short, and a walk over segments (`core.bmm_attention`) for everything else.

Shapes: T tokens, H query heads, N key/value heads, D head size, O = (H + 2N)·D.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from burnish.core.bmm_attention import attend, attend_backward, may_keep, repeat_heads
from burnish.core.group_attention import GroupedRow, attend_grouped, attend_grouped_backward, find_grouped
from burnish.core.kernels import calls
from burnish.core.plan import AttentionPlan
from burnish.core.rowwise import compute_rstd, normalise_backward

_KEEP = 1 << 21  # numbers of turned rows a layer may keep for backward instead of computing them again


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What the block's tensors do not say.

    Attributes:
        heads, kv_heads, head_size: H, N, D.
        scale: Of the attention scores.
        window: Sliding window shorter than the row, or None.
        eps: Of the block's norm. head_eps: Of the norms of queries and keys.
        low: The compute type of matrix products.
        keeps: A backward pass follows: what attention has computed may be kept for it.
    """

    heads: int
    kv_heads: int
    head_size: int
    scale: float
    window: int | None
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


@dataclass(frozen=True, slots=True)
class Kept:
    """What attention leaves for its backward pass, beside its input.

    Attributes:
        way: Which of the three computed it; backward goes the same way.
        tensors: What backward need not compute again; may be empty. Of kernels: log-sum-exp of the scores, turned rows.
    """

    way: Literal["kernels", "groups", "segments"]
    tensors: tuple[Tensor, ...] = ()


def attend_heads(qkv: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec) -> tuple[Tensor, Kept]:
    """Projections (T, O) → outputs of the heads (T, H, D) in the compute type, and what `attend_heads_backward` reads."""
    if _use_kernels(qkv, turning, plan, spec):
        rows = _turn_by_kernel(qkv, turning, spec)
        heads, lse = calls.attend(rows, plan.table, spec.heads, spec.kv_heads, spec.low, spec.keeps)
        if lse is None:
            return heads, Kept("kernels")
        return heads, Kept("kernels", (lse, rows) if rows.numel() <= _KEEP else (lse,))
    row = find_grouped(plan, spec.heads, spec.kv_heads) if spec.window is None else None
    if row is not None:
        keeps = spec.keeps and row.may_keep(spec.heads, spec.head_size)
        heads, kept = attend_grouped(_build_rows(qkv, turning, spec), row, spec.heads, spec.kv_heads, keeps)
        return heads.to(spec.low), Kept("groups", kept)
    keeps = spec.keeps and may_keep(plan, spec.heads, spec.window)
    heads, kept = attend(*_operands(qkv, turning, spec), plan, spec.window, keeps)
    return heads, Kept("segments", kept)


def attend_heads_backward(
    qkv: Tensor, kept: Kept, d_heads: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d heads (T, H, D) → d projections (T, O), d q norm, d k norm."""
    if kept.way == "kernels":
        return _kernel_backward(qkv, kept.tensors, d_heads, turning, plan, spec)
    row = find_grouped(plan, spec.heads, spec.kv_heads) if kept.way == "groups" else None
    if row is not None:
        return _grouped_backward(qkv, kept.tensors, d_heads, turning, row, spec)
    grads = attend_backward(*_operands(qkv, turning, spec), d_heads, plan, spec.window, kept.tensors)
    return _operands_backward(grads, qkv, turning, spec)


# ---- kernels ------------------------------------------------------------------------------------------------------


def _use_kernels(qkv: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec) -> bool:
    return (
        spec.window is None
        and spec.turn.fits
        and (turning.q_norm is None) == (turning.k_norm is None)
        and plan.has_kernel(spec.low, turning.q_norm, turning.k_norm, turning.cos, turning.sin, given=(qkv,))
    )


def _turn_by_kernel(qkv: Tensor, turning: Turning, spec: BlockSpec) -> Tensor:
    return calls.rotate(qkv, turning.q_norm, turning.k_norm, turning.cos, turning.sin, spec.turn)


def _kernel_backward(
    qkv: Tensor, kept: Sequence[Tensor], d_heads: Tensor, turning: Turning, plan: AttentionPlan, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d heads (T, H, D) → d qkv (T, O), d q norm, d k norm."""
    lse, rows = (*kept, None, None)[:2]
    rows = _turn_by_kernel(qkv, turning, spec) if rows is None else rows
    if lse is None:
        _, lse = calls.attend(rows, plan.table, spec.heads, spec.kv_heads, spec.low, True)
    assert lse is not None
    grad = d_heads.to(spec.low).contiguous()
    d_rows = calls.attend_backward(rows, plan.table, spec.heads, spec.kv_heads, grad, lse)
    return calls.rotate_backward(d_rows, qkv, turning.q_norm, turning.k_norm, turning.cos, turning.sin, spec.turn)


# ---- heads --------------------------------------------------------------------------------------------------------


def _cut_heads(qkv: Tensor, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(T, O) → (T, H, D), (T, N, D), (T, N, D), views."""
    parts = qkv.split([n * spec.head_size for n in (spec.heads, spec.kv_heads, spec.kv_heads)], 1)
    q, k, v = (p.unflatten(1, (-1, spec.head_size)) for p in parts)
    return q, k, v


def _operands(qkv: Tensor, turning: Turning, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """What `attend` takes: scaled queries, keys and values by head."""
    q, k, v = _cut_heads(qkv, spec)
    scaled = _rotated(q, turning.q_norm, turning.cos * spec.scale, turning.sin * spec.scale, spec)
    keys = repeat_heads(_rotated(k, turning.k_norm, turning.cos, turning.sin, spec), spec.heads, spec.wide)
    return scaled, keys, repeat_heads(v.transpose(0, 1), spec.heads, spec.low)


def _rotated(x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, spec: BlockSpec) -> Tensor:
    """(T, n, D) → (n, T, D), normalised and rotated, at least fp32."""
    x = x.to(spec.wide, copy=True)
    if norm is not None:
        x.mul_(compute_rstd(x, spec.head_eps, spec.wide)).mul_(norm)
    out = x.new_empty(x.shape[1], x.shape[0], x.shape[2])
    _rotate(x, cos, sin, 1, out.transpose(0, 1))
    return out


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: int, out: Tensor) -> Tensor:
    """(T, n, D) rotated by the angles (sign 1), or its transpose applied (sign −1), into `out`."""
    half = x.shape[-1] // 2
    a, b = x[..., :half], x[..., half:]
    c, s = cos[:, None], sin[:, None]
    first, second = (s[..., :half], s[..., half:]) if sign > 0 else (s[..., half:], s[..., :half])
    torch.mul(a, c[..., :half], out=out[..., :half]).addcmul_(b, first, value=-sign)
    torch.mul(b, c[..., half:], out=out[..., half:]).addcmul_(a, second, value=sign)
    return out


def _operands_backward(
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, turning: Turning, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d scaled queries (H, T, D), d keys and d values (H, T, D) → d qkv (T, O), d q norm, d k norm."""
    dq, dk, dv = grads
    out = torch.empty_like(qkv)
    (q, k, _), (to_q, to_k, to_v) = _cut_heads(qkv, spec), _cut_heads(out, spec)
    cos, sin = turning.cos, turning.sin
    d_qn = _unrotate(dq, q, turning.q_norm, cos * spec.scale, sin * spec.scale, to_q, spec)
    d_kn = _unrotate(_sum_groups(dk, spec), k, turning.k_norm, cos, sin, to_k, spec)
    to_v.copy_(_sum_groups(dv, spec).transpose(0, 1))
    return out, d_qn, d_kn


def _unrotate(
    grad: Tensor, x: Tensor, norm: Tensor | None, cos: Tensor, sin: Tensor, out: Tensor, spec: BlockSpec
) -> Tensor | None:
    """Gradient of `_rotated` (n, T, D) → `out` (T, n, D); returns the norm's."""
    g = grad.transpose(0, 1).to(spec.wide, memory_format=torch.contiguous_format)
    g = _rotate(g, cos, sin, -1, torch.empty_like(g, memory_format=torch.contiguous_format))
    if norm is None:
        out.copy_(g)
        return None
    x = x.to(spec.wide)
    g, d_norm = normalise_backward(g, x, compute_rstd(x, spec.head_eps, spec.wide), norm, None, True)
    out.copy_(g)
    return d_norm


def _sum_groups(x: Tensor, spec: BlockSpec) -> Tensor:
    """(H, T, D) → (N, T, D)."""
    return x if spec.heads == spec.kv_heads else x.unflatten(0, (spec.kv_heads, -1)).sum(1)


# ---- heads of many short groups -----------------------------------------------------------------------------------


def _head_weights(turning: Turning, spec: BlockSpec) -> Tensor:
    """(H + N, 1 or D): what normalised queries and keys are multiplied by; the queries' holds the scale of the scores."""
    q_norm, k_norm = turning.q_norm, turning.k_norm
    if q_norm is None or k_norm is None:
        out = torch.ones(spec.heads + spec.kv_heads, 1, dtype=spec.wide)
    else:
        out = q_norm.new_empty(spec.heads + spec.kv_heads, spec.head_size, dtype=spec.wide)
        out[: spec.heads] = q_norm
        out[spec.heads :] = k_norm
    out[: spec.heads] *= spec.scale
    return out


def _build_rows(qkv: Tensor, turning: Turning, spec: BlockSpec) -> Tensor:
    """(T, O) → (T · (H + 2N), D): scaled and rotated queries, rotated keys, values; at least fp32."""
    x = qkv.to(spec.wide).view(qkv.shape[0], -1, spec.head_size)
    turned = spec.heads + spec.kv_heads
    out = torch.empty_like(x)
    part = x[:, :turned]
    weight = _head_weights(turning, spec)
    if turning.q_norm is not None:
        part = part * compute_rstd(part, spec.head_eps, spec.wide)
        part.mul_(weight)
    else:
        part = part * weight
    _rotate(part, turning.cos, turning.sin, 1, out[:, :turned])
    out[:, turned:] = x[:, turned:]
    return out.view(-1, spec.head_size)


def _grouped_backward(
    qkv: Tensor, kept: Sequence[Tensor], d_heads: Tensor, turning: Turning, row: GroupedRow, spec: BlockSpec
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """d heads (T, H, D) → d qkv (T, O), d q norm, d k norm."""
    if not kept:
        kept = [_build_rows(qkv, turning, spec).index_select(0, row.gather)]
    d_rows = attend_grouped_backward(kept, d_heads.to(spec.wide), row, spec.heads, spec.kv_heads)
    d_rows = d_rows.view(qkv.shape[0], -1, spec.head_size)
    turned = spec.heads + spec.kv_heads
    g = d_rows[:, :turned]
    g = _rotate(g, turning.cos, turning.sin, -1, torch.empty_like(g, memory_format=torch.contiguous_format))
    weight = _head_weights(turning, spec)
    d_qn: Tensor | None = None
    d_kn: Tensor | None = None
    if turning.q_norm is None or turning.k_norm is None:
        torch.mul(g, weight, out=d_rows[:, :turned])
    else:
        part = qkv.to(spec.wide).view(d_rows.shape)[:, :turned]
        rstd = compute_rstd(part, spec.head_eps, spec.wide)
        unit = part * rstd
        d_weight = (g * unit).sum(0)
        d_qn = d_weight[: spec.heads].sum(0).mul_(spec.scale).to(turning.q_norm.dtype)
        d_kn = d_weight[spec.heads :].sum(0).to(turning.k_norm.dtype)
        g.mul_(weight)
        share = (g * unit).sum(-1, keepdim=True).div_(-spec.head_size)
        torch.mul(g.addcmul_(unit, share), rstd, out=d_rows[:, :turned])
    return d_rows.view(qkv.shape).to(qkv.dtype), d_qn, d_kn

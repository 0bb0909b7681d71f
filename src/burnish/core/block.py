"""A pre-norm transformer block (RMS norm, rotary attention, SwiGLU) as two autograd functions, for packed rows on the CPU.

The library's modules run such a block as some sixty element-wise operations a layer, each of which reads and writes the whole
row and most of which keep a tensor for backward. Here a half block keeps its input, the projections' outputs and (attention)
the heads' outputs; norms, rotations and activations are computed again in backward. Matrix products run in the compute type,
everything else in at least fp32; products that share their input are one product.

Shapes: T tokens, h hidden size, H query heads, N key/value heads, D head size, O = (H + 2N)·D, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.bmm_attention import attend, attend_backward, may_keep, repeat_heads
from burnish.core.group_attention import GroupedRow, attend_grouped, attend_grouped_backward, find_grouped
from burnish.core.plan import AttentionPlan

_KEEP = 1 << 19  # numbers of a norm or activation that may be kept for backward instead of being computed again


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """What the block's tensors do not say.

    Attributes:
        heads, kv_heads, head_size: H, N, D.
        scale: Of the attention scores.
        window: Sliding window shorter than the row, or None.
        eps: Of the block's norm. head_eps: Of the norms of queries and keys.
        low: The compute type of matrix products.
        keeps: A backward pass follows: the probabilities of attention may be kept for it.
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


class AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)), at all rows or at those of `keep`.

    Arguments: x (T, h), norm (h,), the weights and biases (None for none) of the query, key and value projections, the norms
    of queries and keys (D,) or None, output weight (h, H·D) and bias, cos and sin (T, D), keep (K,) int64 or None, plan, spec.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, norm: Tensor, wq: Tensor, wk: Tensor, wv: Tensor, bq: Tensor | None, bk: Tensor | None,
        bv: Tensor | None, q_norm: Tensor | None, k_norm: Tensor | None, wo: Tensor, bo: Tensor | None, cos: Tensor,
        sin: Tensor, keep: Tensor | None, plan: AttentionPlan, spec: BlockSpec,
    ) -> Tensor:  # fmt: skip
        rstd = compute_rstd(x, spec.eps, spec.wide)
        bias = None if bq is None or bk is None or bv is None else _stack((bq, bk, bv), spec.low)
        n = _normalise(x, rstd, norm, spec.low)
        qkv = F.linear(n, _stack((wq, wk, wv), spec.low), bias)
        row = find_grouped(plan, spec.heads, spec.kv_heads) if spec.window is None else None
        if row is not None:
            rows = _build_rows(qkv, q_norm, k_norm, cos, sin, spec)
            keeps = spec.keeps and row.may_keep(spec.heads, spec.head_size)
            heads, kept = attend_grouped(rows, row, spec.heads, spec.kv_heads, keeps)
            heads = heads.to(spec.low)
        else:
            keeps = spec.keeps and may_keep(plan, spec.heads, spec.window)
            heads, kept = attend(*_operands(qkv, q_norm, k_norm, cos, sin, spec), plan, spec.window, keeps)
        taken = F.linear(_rows(heads.flatten(1), keep), wo.to(spec.low), None if bo is None else bo.to(spec.low))
        weights = norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo, bo
        ctx.save_for_backward(x, rstd, _if_short(n, spec), qkv, heads, *weights, cos, sin, keep, *kept)
        ctx.plan, ctx.spec, ctx.row = plan, spec, row
        return _add(taken, _rows(x, keep))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rstd, n, qkv, heads, norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo, bo, cos, sin, keep, *kept = (
            ctx.saved_tensors
        )
        spec: BlockSpec = ctx.spec
        need = ctx.needs_input_grad
        low = grad.to(spec.low)
        d_wo = _weight_gradient(low, _rows(heads.flatten(1), keep), wo) if need[10] else None
        d_bo = grad.sum(0).to(bo.dtype) if need[11] and bo is not None else None
        d_heads = _spread(low @ wo.to(spec.low), keep, heads.shape[0]).view(heads.shape)
        if ctx.row is not None:
            d_qkv, d_qn, d_kn = _grouped_backward(qkv, kept, d_heads, q_norm, k_norm, cos, sin, ctx.row, spec)
        else:
            d_qkv, d_qn, d_kn = _operands_backward(
                attend_backward(*_operands(qkv, q_norm, k_norm, cos, sin, spec), d_heads, ctx.plan, spec.window, kept),
                qkv, q_norm, k_norm, cos, sin, spec,
            )  # fmt: skip
        d_weights: list[Tensor | None] = [None] * 3
        if any(need[2:5]):
            n = _normalise(x, rstd, norm, spec.low) if n is None else n
            d_weights = _split_gradient(d_qkv.t() @ n, (wq, wk, wv), need[2:5])
        d_biases: list[Tensor | None] = [None] * 3
        if any(need[5:8]):
            d_biases = _split_gradient(d_qkv.sum(0, dtype=spec.wide), (bq, bk, bv), need[5:8])
        dx, d_norm = None, None
        if need[0] or need[1]:
            dx, d_norm = _norm_backward(d_qkv @ _stack((wq, wk, wv), spec.low), x, rstd, norm, need[1], spec.wide)
            dx = (dx.add_(grad) if keep is None else dx.index_add_(0, keep, grad.to(dx.dtype))).to(x.dtype)
        return dx, d_norm, *d_weights, *d_biases, d_qn, d_kn, d_wo, d_bo, None, None, None, None, None


class MlpHalf(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)) with n = norm(x): x (T, h), norm (h,), gate and up (I, h), down (h, I), spec."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, spec: BlockSpec) -> Tensor:
        rstd = compute_rstd(x, spec.eps, spec.wide)
        n = _normalise(x, rstd, norm, spec.low)
        left, right = (F.linear(n, w.to(spec.low)) for w in (gate, up))  # two: the halves of one would lie scattered
        act = F.silu(left)
        short = _if_short(act, spec)
        ctx.save_for_backward(x, rstd, _if_short(n, spec), left, right, short, norm, gate, up, down)
        ctx.spec = spec
        product = act.mul_(right) if short is None else act * right
        return _add(F.linear(product, down.to(spec.low)), x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rstd, n, left, right, act, norm, gate, up, down = ctx.saved_tensors
        spec: BlockSpec = ctx.spec
        need = ctx.needs_input_grad
        low = grad.to(spec.low)
        d_act = low @ down.to(spec.low)
        kept = act is not None
        act = act if kept else F.silu(left)
        d_both = left.new_empty(left.shape[0], 2 * left.shape[1])
        to_gate, to_up = d_both.chunk(2, 1)
        torch.mul(d_act, act, out=to_up)
        d_down = _weight_gradient(low, act * right if kept else act.mul_(right), down) if need[4] else None
        torch.ops.aten.silu_backward.grad_input(d_act.mul_(right), left, grad_input=to_gate)
        d_gate: Tensor | None = None
        d_up: Tensor | None = None
        if need[2] or need[3]:
            n = _normalise(x, rstd, norm, spec.low) if n is None else n
            d_gate, d_up = _split_gradient(d_both.t() @ n, (gate, up), need[2:4])
        dx, d_norm = None, None
        if need[0] or need[1]:
            dx, d_norm = _norm_backward(d_both @ _stack((gate, up), spec.low), x, rstd, norm, need[1], spec.wide)
            dx = dx.add_(grad).to(x.dtype)
        return dx, d_norm, d_gate, d_up, d_down, None


# ---- norms --------------------------------------------------------------------------------------------------------


def compute_rstd(x: Tensor, eps: float, wide: torch.dtype) -> Tensor:
    """(…, n) → (…, 1): 1 / √(mean x² + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, wide))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _normalise(x: Tensor, rstd: Tensor, weight: Tensor, low: torch.dtype) -> Tensor:
    return (x * rstd).mul_(weight).to(low)


def _norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, need_weight: bool, wide: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Gradients of an RMS norm over the last axis: at least fp32 for x, the weight's type for the weight."""
    g = grad.to(wide)
    unit = x * rstd
    pulled = g * unit
    d_weight = pulled.flatten(0, -2).sum(0).to(weight.dtype) if need_weight else None
    share = (pulled @ weight.to(wide)).unsqueeze(-1).div_(-x.shape[-1])
    return (g * weight).addcmul_(unit, share).mul_(rstd), d_weight


# ---- heads --------------------------------------------------------------------------------------------------------


def _cut_heads(qkv: Tensor, spec: BlockSpec) -> tuple[Tensor, Tensor, Tensor]:
    """(T, O) → (T, H, D), (T, N, D), (T, N, D), views."""
    parts = qkv.split([n * spec.head_size for n in (spec.heads, spec.kv_heads, spec.kv_heads)], 1)
    q, k, v = (p.unflatten(1, (-1, spec.head_size)) for p in parts)
    return q, k, v


def _operands(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, spec: BlockSpec
) -> tuple[Tensor, Tensor, Tensor]:
    """What `attend` takes: scaled queries, keys and values by head."""
    q, k, v = _cut_heads(qkv, spec)
    scaled = _rotated(q, q_norm, cos * spec.scale, sin * spec.scale, spec)
    keys = repeat_heads(_rotated(k, k_norm, cos, sin, spec), spec.heads, spec.wide)
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
    grads: tuple[Tensor, Tensor, Tensor], qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor,
    sin: Tensor, spec: BlockSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """d scaled queries (H, T, D), d keys and d values (H, T, D) → d qkv (T, O), d q norm, d k norm."""
    dq, dk, dv = grads
    out = torch.empty_like(qkv)
    (q, k, _), (to_q, to_k, to_v) = _cut_heads(qkv, spec), _cut_heads(out, spec)
    d_qn = _unrotate(dq, q, q_norm, cos * spec.scale, sin * spec.scale, to_q, spec)
    d_kn = _unrotate(_sum_groups(dk, spec), k, k_norm, cos, sin, to_k, spec)
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
    g, d_norm = _norm_backward(g, x, compute_rstd(x, spec.head_eps, spec.wide), norm, True, spec.wide)
    out.copy_(g)
    return d_norm


def _sum_groups(x: Tensor, spec: BlockSpec) -> Tensor:
    """(H, T, D) → (N, T, D)."""
    return x if spec.heads == spec.kv_heads else x.unflatten(0, (spec.kv_heads, -1)).sum(1)


# ---- heads of many short groups -----------------------------------------------------------------------------------


def _head_weights(q_norm: Tensor | None, k_norm: Tensor | None, spec: BlockSpec) -> Tensor:
    """(H + N, 1 or D): what normalised queries and keys are multiplied by; the queries' holds the scale of the scores."""
    if q_norm is None or k_norm is None:
        out = torch.ones(spec.heads + spec.kv_heads, 1, dtype=spec.wide)
    else:
        out = q_norm.new_empty(spec.heads + spec.kv_heads, spec.head_size, dtype=spec.wide)
        out[: spec.heads] = q_norm
        out[spec.heads :] = k_norm
    out[: spec.heads] *= spec.scale
    return out


def _build_rows(
    qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, spec: BlockSpec
) -> Tensor:
    """(T, O) → (T · (H + 2N), D): scaled and rotated queries, rotated keys, values; at least fp32."""
    x = qkv.to(spec.wide).view(qkv.shape[0], -1, spec.head_size)
    turned = spec.heads + spec.kv_heads
    out = torch.empty_like(x)
    part = x[:, :turned]
    weight = _head_weights(q_norm, k_norm, spec)
    if q_norm is not None:
        part = part * compute_rstd(part, spec.head_eps, spec.wide)
        part.mul_(weight)
    else:
        part = part * weight
    _rotate(part, cos, sin, 1, out[:, :turned])
    out[:, turned:] = x[:, turned:]
    return out.view(-1, spec.head_size)


def _grouped_backward(
    qkv: Tensor, kept: Sequence[Tensor], d_heads: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor,
    sin: Tensor, row: GroupedRow, spec: BlockSpec,
) -> tuple[Tensor, Tensor | None, Tensor | None]:  # fmt: skip
    """d heads (T, H, D) → d qkv (T, O), d q norm, d k norm."""
    if not kept:
        kept = [_build_rows(qkv, q_norm, k_norm, cos, sin, spec).index_select(0, row.gather)]
    d_rows = attend_grouped_backward(kept, d_heads.to(spec.wide), row, spec.heads, spec.kv_heads)
    d_rows = d_rows.view(qkv.shape[0], -1, spec.head_size)
    turned = spec.heads + spec.kv_heads
    g = d_rows[:, :turned]
    g = _rotate(g, cos, sin, -1, torch.empty_like(g, memory_format=torch.contiguous_format))
    weight = _head_weights(q_norm, k_norm, spec)
    d_qn: Tensor | None = None
    d_kn: Tensor | None = None
    if q_norm is None or k_norm is None:
        torch.mul(g, weight, out=d_rows[:, :turned])
    else:
        part = qkv.to(spec.wide).view(d_rows.shape)[:, :turned]
        rstd = compute_rstd(part, spec.head_eps, spec.wide)
        unit = part * rstd
        d_weight = (g * unit).sum(0)
        d_qn = d_weight[: spec.heads].sum(0).mul_(spec.scale).to(q_norm.dtype)
        d_kn = d_weight[spec.heads :].sum(0).to(k_norm.dtype)
        g.mul_(weight)
        share = (g * unit).sum(-1, keepdim=True).div_(-spec.head_size)
        torch.mul(g.addcmul_(unit, share), rstd, out=d_rows[:, :turned])
    return d_rows.view(qkv.shape).to(qkv.dtype), d_qn, d_kn


# ---- weights and rows ---------------------------------------------------------------------------------------------


def _stack(parts: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """Weights one below the other, in the compute type."""
    out = parts[0].new_empty(sum(p.shape[0] for p in parts), *parts[0].shape[1:], dtype=dtype)
    for room, part in zip(out.split([p.shape[0] for p in parts]), parts, strict=True):
        room.copy_(part)
    return out


def _split_gradient(grad: Tensor, parts: Sequence[Tensor | None], need: Sequence[bool]) -> list[Tensor | None]:
    """The gradient of stacked weights, one tensor of each weight's type."""
    sizes = [0 if p is None else p.shape[0] for p in parts]
    pieces = grad.split(sizes)
    return [g.to(p.dtype) if n and p is not None else None for g, p, n in zip(pieces, parts, need, strict=True)]


def _if_short(x: Tensor, spec: BlockSpec) -> Tensor | None:
    """x, if it is small enough to be kept for backward."""
    return x if spec.keeps and x.numel() <= _KEEP else None


def _weight_gradient(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    return (grad.t() @ x).to(weight.dtype)


def _add(product: Tensor, x: Tensor) -> Tensor:
    """x + product in the wider type; two passes of one type are faster than one of two types."""
    wide = torch.promote_types(product.dtype, x.dtype)
    return product.to(wide).add_(x)


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.index_select(0, keep)


def _spread(x: Tensor, keep: Tensor | None, count: int) -> Tensor:
    """The transpose of `_rows`."""
    return x if keep is None else x.new_zeros(count, x.shape[1]).index_add_(0, keep, x)

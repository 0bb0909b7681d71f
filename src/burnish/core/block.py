"""A pre-norm transformer block (RMS norm, rotary attention, SwiGLU) as two autograd functions, for packed rows on the CPU.

The library's modules run such a block as some sixty element-wise operations a layer, each of which reads and writes the whole
row and most of which keep a tensor for backward. Here a half block keeps its input, the projections' outputs and (attention)
the heads' outputs; norms, rotations and activations are computed again in backward. Matrix products run in the compute type,
everything else in at least fp32; products that share their input are one product.

Shapes: T tokens, h hidden size, H query heads, N key/value heads, D head size, O = (H + 2N)·D, I intermediate size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.core.block_attention import BlockSpec, Turning, attend_heads, attend_heads_backward
from burnish.core.rowwise import add_residual, normalise, normalise_backward, scale_rows, swiglu, swiglu_backward
from burnish.core.segments import AttentionPlan

_KEEP = 1 << 19  # numbers of a norm or of stacked weights that may be kept for backward instead of being computed again


class AttentionHalf(torch.autograd.Function):
    """x + attention(norm(x)), at all rows or at those of `keep`; where `block_attention.has_kernels`.

    Arguments: x (T, h), norm (h,), the weights and biases (None for none) of the query, key and value projections, the norms
    of queries and keys (D,) or None, output weight (h, H·D) and bias, cos and sin (T, D), keep (K,) int64 or None, plan, spec.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        norm: Tensor,
        wq: Tensor,
        wk: Tensor,
        wv: Tensor,
        bq: Tensor | None,
        bk: Tensor | None,
        bv: Tensor | None,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        wo: Tensor,
        bo: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        keep: Tensor | None,
        plan: AttentionPlan,
        spec: BlockSpec,
    ) -> Tensor:
        bias = None if bq is None or bk is None or bv is None else _stack((bq, bk, bv), spec.low)
        n, rstd = normalise(x, norm, spec.eps, spec.low)
        stacked = _stack((wq, wk, wv), spec.low)
        qkv = F.linear(n, stacked, bias)
        heads, kept = attend_heads(qkv, Turning(q_norm, k_norm, cos, sin), plan, spec)
        taken = F.linear(_rows(heads.flatten(1), keep), wo.to(spec.low), None if bo is None else bo.to(spec.low))
        weights = norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo, bo
        short = _if_short(n, spec), _if_short(stacked, spec)
        ctx.save_for_backward(x, rstd, *short, qkv, heads, *weights, cos, sin, keep, *kept)
        ctx.plan, ctx.spec = plan, spec
        return add_residual(taken, x, keep)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rstd, n, stacked, qkv, heads, norm, wq, wk, wv, bq, bk, bv, q_norm, k_norm, wo, bo, cos, sin, keep, *rest = (
            ctx.saved_tensors
        )
        spec: BlockSpec = ctx.spec
        need = ctx.needs_input_grad
        low = grad.to(spec.low)
        d_wo = _weight_gradient(low, _rows(heads.flatten(1), keep), wo) if need[10] else None
        d_bo = grad.sum(0).to(bo.dtype) if need[11] and bo is not None else None
        d_heads = _spread(low @ wo.to(spec.low), keep, heads.shape[0]).view(heads.shape)
        d_qkv, d_qn, d_kn = attend_heads_backward(qkv, rest, d_heads, Turning(q_norm, k_norm, cos, sin), ctx.plan, spec)
        d_weights: list[Tensor | None] = [None] * 3
        if any(need[2:5]):
            n = scale_rows(x, rstd, norm, spec.low) if n is None else n
            d_weights = _split_gradient(d_qkv.t() @ n, (wq, wk, wv), need[2:5])
        d_biases: list[Tensor | None] = [None] * 3
        if any(need[5:8]):
            d_biases = _split_gradient(d_qkv.sum(0, dtype=spec.wide), (bq, bk, bv), need[5:8])
        dx, d_norm = None, None
        if need[0] or need[1]:
            pulled = d_qkv @ (_stack((wq, wk, wv), spec.low) if stacked is None else stacked)
            dx, d_norm = normalise_backward(pulled, x, rstd, norm, grad if keep is None else None, need[1])
            dx = dx if keep is None else dx.index_add_(0, keep, grad.to(dx.dtype))
            dx = dx.to(x.dtype)
        return dx, d_norm, *d_weights, *d_biases, d_qn, d_kn, d_wo, d_bo, None, None, None, None, None


class MlpHalf(torch.autograd.Function):
    """x + down(silu(gate(n)) · up(n)) with n = norm(x): x (T, h), norm (h,), gate and up (I, h), down (h, I), spec."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Tensor, gate: Tensor, up: Tensor, down: Tensor, spec: BlockSpec) -> Tensor:
        n, rstd = normalise(x, norm, spec.eps, spec.low)
        stacked = _stack((gate, up), spec.low)
        # two products: the halves of one would lie scattered
        left, right = (F.linear(n, w) for w in stacked.split((gate.shape[0], up.shape[0])))
        ctx.save_for_backward(x, rstd, _if_short(n, spec), _if_short(stacked, spec), left, right, norm, gate, up, down)
        ctx.spec = spec
        return add_residual(F.linear(swiglu(left, right), down.to(spec.low)), x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, rstd, n, stacked, left, right, norm, gate, up, down = ctx.saved_tensors
        spec: BlockSpec = ctx.spec
        need = ctx.needs_input_grad
        low = grad.to(spec.low)
        d_both, product = swiglu_backward(left, right, low @ down.to(spec.low))
        d_down = _weight_gradient(low, product, down) if need[4] else None
        d_gate: Tensor | None = None
        d_up: Tensor | None = None
        if need[2] or need[3]:
            n = scale_rows(x, rstd, norm, spec.low) if n is None else n
            d_gate, d_up = _split_gradient(d_both.t() @ n, (gate, up), need[2:4])
        dx, d_norm = None, None
        if need[0] or need[1]:
            pulled = d_both @ (_stack((gate, up), spec.low) if stacked is None else stacked)
            dx, d_norm = normalise_backward(pulled, x, rstd, norm, grad, need[1])
            dx = dx.to(x.dtype)
        return dx, d_norm, d_gate, d_up, d_down, None


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


def _rows(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else x.index_select(0, keep)


def _spread(x: Tensor, keep: Tensor | None, count: int) -> Tensor:
    """The transpose of `_rows`."""
    return x if keep is None else x.new_zeros(count, x.shape[1]).index_add_(0, keep, x)

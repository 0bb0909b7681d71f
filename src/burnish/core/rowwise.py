"""Norms, activations and residual sums of a block: by kernels where they serve, else by PyTorch's operations.

Shapes: T tokens, h hidden size, I intermediate size.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.kernels import calls


def normalise(x: Tensor, weight: Tensor, eps: float, low: torch.dtype) -> tuple[Tensor, Tensor]:
    """RMS norm of x (T, h) in the type `low`, and 1 / √(mean x² + eps) of each row (T, 1)."""
    if calls.serves(low, x, weight):
        return calls.norm(x, weight, eps, low)
    rstd = compute_rstd(x, eps, torch.promote_types(low, torch.float32))
    return scale_rows(x, rstd, weight, low), rstd


def scale_rows(x: Tensor, rstd: Tensor, weight: Tensor, low: torch.dtype) -> Tensor:
    """x · rstd · weight in the type `low`: a norm again whose `rstd` is known."""
    return (x * rstd).mul_(weight).to(low)


def compute_rstd(x: Tensor, eps: float, wide: torch.dtype) -> Tensor:
    """(…, n) → (…, 1): 1 / √(mean x² + eps)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, wide))
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def normalise_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradients of an RMS norm over the last axis.

    Args:
        residual: Added to the gradient of x.

    Returns:
        The gradient of x in at least fp32, and that of the weight in its type.
    """
    if x.dim() == 2 and calls.serves(grad.dtype, x, rstd, weight, residual, given=(grad,)):
        return calls.norm_backward(grad, x, rstd, weight, residual, need_weight)
    wide = torch.promote_types(grad.dtype, torch.float32)
    g = grad.to(wide)
    unit = x * rstd
    pulled = g * unit
    d_weight = pulled.flatten(0, -2).sum(0).to(weight.dtype) if need_weight else None
    share = (pulled @ weight.to(wide)).unsqueeze(-1).div_(-x.shape[-1])
    dx = (g * weight).addcmul_(unit, share).mul_(rstd)
    return (dx if residual is None else dx.add_(residual)), d_weight


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up of (T, I)."""
    if calls.serves(gate.dtype, given=(gate, up)):
        return calls.swiglu(gate, up)
    return F.silu(gate).mul_(up)


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up side by side (T, 2I), and silu(gate) · up again; may overwrite `grad`."""
    if calls.serves(gate.dtype, given=(gate, up, grad)):
        return calls.swiglu_backward(gate, up, grad)
    act = F.silu(gate)
    both = gate.new_empty(gate.shape[0], 2 * gate.shape[1])
    to_gate, to_up = both.chunk(2, 1)
    torch.mul(grad, act, out=to_up)
    torch.ops.aten.silu_backward.grad_input(grad.mul_(up), gate, grad_input=to_gate)
    return both, act.mul_(up)


def add_residual(product: Tensor, x: Tensor, rows: Tensor | None = None) -> Tensor:
    """x (T, h), or its `rows` (K,), plus the product, in the wider type."""
    if calls.serves(product.dtype, x, given=(product,)):
        return calls.add(product, x, None if rows is None else rows.contiguous())
    x = x if rows is None else x.index_select(0, rows)
    wide = torch.promote_types(product.dtype, x.dtype)
    return product.to(wide).add_(x)  # two passes of one type are faster than one of two types

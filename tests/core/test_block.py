"""Pieces of the fused block against their formulas; the whole is tested beside the library's modules."""

from __future__ import annotations

import torch

from burnish.core import block


def test_rotation_equals_the_formula_and_its_transpose() -> None:
    """Angles that differ between the halves, as multi-dimensional position embeddings have them."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, 8, generator=g, dtype=torch.float64) for _ in range(2))
    cos, sin = (torch.randn(5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    rotated = block._rotate(x, cos, sin, 1, torch.empty_like(x))
    assert torch.allclose(rotated, x * cos[:, None] + turned * sin[:, None], atol=1e-14)
    back = block._rotate(y, cos, sin, -1, torch.empty_like(y))
    assert abs(float((rotated * y).sum() - (x * back).sum())) < 1e-12


def test_norm_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, grad = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 6), (6,), (4, 6)))
    x.requires_grad_()
    w.requires_grad_()
    expected = w * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
    rstd = block.compute_rstd(x.detach(), 0.1, torch.float64)
    assert torch.allclose(block._normalise(x.detach(), rstd, w.detach(), torch.float64), expected, atol=1e-14)
    dx, dw = torch.autograd.grad(expected, [x, w], grad)
    found = block._norm_backward(grad, x.detach(), rstd, w.detach(), True, torch.float64)
    assert torch.allclose(found[0], dx, atol=1e-13) and torch.allclose(found[1], dw, atol=1e-13)

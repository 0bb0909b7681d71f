"""Norms and activations by PyTorch's operations against their formulas; the kernels are tested on their own."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from burnish.core import rowwise


def test_norm_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(0)
    x, w, grad, more = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((4, 6), (6,), (4, 6), (4, 6)))
    x.requires_grad_()
    w.requires_grad_()
    expected = w * x * (x.square().mean(-1, keepdim=True) + 0.1).rsqrt()
    n, rstd = rowwise.normalise(x.detach(), w.detach(), 0.1, torch.float64)
    assert torch.allclose(n, expected, atol=1e-14)
    assert torch.equal(rowwise.scale_rows(x.detach(), rstd, w.detach(), torch.float64), n)
    dx, dw = torch.autograd.grad(expected, [x, w], grad)
    found = rowwise.normalise_backward(grad, x.detach(), rstd, w.detach(), None, True)
    assert found[1] is not None
    assert torch.allclose(found[0], dx, atol=1e-13) and torch.allclose(found[1], dw, atol=1e-13)
    with_more = rowwise.normalise_backward(grad, x.detach(), rstd, w.detach(), more, False)
    assert torch.allclose(with_more[0], dx + more, atol=1e-13) and with_more[1] is None


def test_swiglu_and_its_gradient() -> None:
    g = torch.Generator().manual_seed(1)
    gate, up, grad = (torch.randn(4, 6, generator=g, dtype=torch.float64) for _ in range(3))
    gate.requires_grad_()
    up.requires_grad_()
    expected = F.silu(gate) * up
    wanted = torch.autograd.grad(expected, [gate, up], grad)
    assert torch.allclose(rowwise.swiglu(gate.detach(), up.detach()), expected, atol=1e-14)
    both, again = rowwise.swiglu_backward(gate.detach(), up.detach(), grad.clone())
    assert torch.allclose(both, torch.cat(wanted, 1), atol=1e-13) and torch.allclose(again, expected, atol=1e-14)


def test_the_sum_takes_the_wider_type() -> None:
    x, product = torch.randn(5, 3, dtype=torch.float64), torch.randn(2, 3)
    rows = torch.tensor([4, 1])
    found = rowwise.add_residual(product, x, rows)
    assert found.dtype == torch.float64 and torch.equal(found, x[rows] + product.double())

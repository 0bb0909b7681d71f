"""Pieces of the fused block's attention against their formulas; the whole is tested beside the library's modules."""

from __future__ import annotations

import torch

from burnish.core import block_attention


def test_rotation_equals_the_formula_and_its_transpose() -> None:
    """Angles that differ between the halves, as multi-dimensional position embeddings have them."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(5, 3, 8, generator=g, dtype=torch.float64) for _ in range(2))
    cos, sin = (torch.randn(5, 8, generator=g, dtype=torch.float64) for _ in range(2))
    turned = torch.cat((-x[..., 4:], x[..., :4]), -1)
    rotated = block_attention._rotate(x, cos, sin, 1, torch.empty_like(x))
    assert torch.allclose(rotated, x * cos[:, None] + turned * sin[:, None], atol=1e-14)
    back = block_attention._rotate(y, cos, sin, -1, torch.empty_like(y))
    assert abs(float((rotated * y).sum() - (x * back).sum())) < 1e-12

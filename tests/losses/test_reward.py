"""Closed forms of the reward model's losses."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.losses.reward import compute_bradley_terry_loss, compute_centering_loss


def test_by_hand() -> None:
    """Scores 2 and 1: log(1 + e⁻¹) = 0.313262; margin ½: log(1 + e^−½) = 0.474077; centring (2 + 1)² = 9."""
    chosen, rejected = torch.tensor([2.0], dtype=torch.float64), torch.tensor([1.0], dtype=torch.float64)
    assert compute_bradley_terry_loss(chosen, rejected).item() == pytest.approx(0.31326168751822286, rel=1e-14)
    margin = torch.tensor([0.5])
    assert compute_bradley_terry_loss(chosen, rejected, margin).item() == pytest.approx(0.4740769841801067, rel=1e-14)
    assert compute_centering_loss(chosen, rejected).item() == 9.0


def test_equal_scores_give_ln_2() -> None:
    x = torch.tensor([-3.0, 0.0, 40.0])
    assert compute_bradley_terry_loss(x, x).tolist() == pytest.approx([math.log(2)] * 3)


def test_the_gradient_lifts_chosen_and_lowers_rejected() -> None:
    scores = torch.tensor([[1.0, 5.0], [0.0, -2.0]], requires_grad=True)
    compute_bradley_terry_loss(scores[0], scores[1]).sum().backward()
    assert scores.grad is not None
    assert bool((scores.grad[0] < 0).all()) and bool((scores.grad[1] > 0).all())


def test_a_shift_of_all_scores_changes_only_the_centring() -> None:
    rng = np.random.default_rng(0)
    c, r = torch.from_numpy(rng.normal(size=9)), torch.from_numpy(rng.normal(size=9))
    torch.testing.assert_close(compute_bradley_terry_loss(c + 7, r + 7), compute_bradley_terry_loss(c, r))
    assert compute_centering_loss(c + 7, r + 7).sum() > compute_centering_loss(c, r).sum()


def test_numpy_agrees() -> None:
    rng = np.random.default_rng(1)
    c, r, m = rng.normal(0, 3, 100), rng.normal(0, 3, 100), rng.uniform(0, 2, 100)
    found = compute_bradley_terry_loss(*(torch.from_numpy(x) for x in (c, r, m)))
    np.testing.assert_allclose(found.numpy(), np.logaddexp(0, -(c - r - m)), rtol=1e-12)

"""Scores under other divergences: each is f′ of its definition, and the limits meet."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.losses.divergence import compute_divergence_scores
from burnish.losses.pairs import Pairs
from tests.losses.drawn import Case, as_numpy, detach, draw_pairs


def scores(x: torch.Tensor, *options: object) -> torch.Tensor:
    zero = torch.zeros_like(x)
    return compute_divergence_scores(Pairs(zero, zero, x, zero, zero, zero, zero), *options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "f"),
    [
        (("reverse_kl",), lambda t: t * math.log(t)),
        (("forward_kl",), lambda t: t - 1 - math.log(t)),
        (("js_divergence",), lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2)),
        (("alpha_divergence", 0.4), lambda t: (t**0.4 - 1 - 0.4 * (t - 1)) / (0.4 * (0.4 - 1))),
        (("alpha_divergence", 1.7), lambda t: (t**1.7 - 1 - 1.7 * (t - 1)) / (1.7 * (1.7 - 1))),
    ],
)
def test_a_score_is_the_derivative_of_the_divergence_at_the_ratio(options, f) -> None:
    """Up to a constant, which the difference of two answers loses; derivative by central differences, not by formula."""
    x = torch.tensor([-1.5, -0.2, 0.0, 0.7, 2.0], dtype=torch.float64)
    found = scores(x, *options).numpy()
    t, h = np.exp(x.numpy()), 1e-6
    want = np.array([(f(v * (1 + h)) - f(v * (1 - h))) / (2 * h * v) for v in t])
    np.testing.assert_allclose(found - found[2], want - want[2], rtol=1e-7, atol=1e-7)


def test_the_limits_of_the_order() -> None:
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    torch.testing.assert_close(scores(x, "alpha_divergence", 0.0), scores(x, "forward_kl"))
    assert torch.equal(scores(x, "alpha_divergence", 1.0), x)
    torch.testing.assert_close(scores(x, "alpha_divergence", 1 + 1e-5), x, rtol=1e-4, atol=1e-4)


def test_exponents_are_cut_before_they_overflow() -> None:
    x = torch.tensor([-1e4, 1e4], requires_grad=True)
    found = scores(x, "forward_kl")
    found.sum().backward()
    assert bool(torch.isfinite(found).all()) and x.grad is not None and bool(torch.isfinite(x.grad).all())


@pytest.mark.parametrize("name", ["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "discopop"])
def test_each_loss_of_a_difference_reads_the_scores_in_place_of_the_ratios(name: str) -> None:
    pairs = detach(draw_pairs(12, seed=2))
    p = as_numpy(pairs)
    scored = [torch.from_numpy(math.log(2) - np.logaddexp(0, -p[f])) for f in ("chosen_ratio", "rejected_ratio")]
    replaced = Pairs(
        pairs.chosen, pairs.rejected, *scored, pairs.chosen_tokens, pairs.rejected_tokens, pairs.reference_gap
    )
    found = Case("dpo", name, {"f_divergence_type": "js_divergence"}).compute(pairs)
    want = Case("dpo", name).compute(replaced)
    torch.testing.assert_close(found.loss, want.loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.margin, want.margin, rtol=1e-12, atol=1e-14)

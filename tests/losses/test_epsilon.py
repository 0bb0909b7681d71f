"""ε-DPO: perturbed log-probs, steps, and the running β. Whole models: engine/test_live_reference.py."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from burnish.losses.epsilon import RunningBeta, build_epsilon, build_perturbed, compute_epsilon_loss, compute_steps
from burnish.losses.pairs import Pairs


def build_pairs(up: list[float], here: list[float], down: list[float], margin: float = 2.0) -> Pairs:
    """Pairs whose log-ratios under ε, 0 and −ε are these."""
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (up, here, down)]
    zero = torch.zeros_like(tensors[0])
    sums = {"logprobs_+0.1": (tensors[0], zero), "logprobs_-0.1": (tensors[2], zero)}
    return Pairs(tensors[1].requires_grad_(), zero, zero + margin, zero, zero + 1, zero + 1, zero, sums)


PAIRS = build_pairs([1.2, 0.8, 1.2, 1.0, 0.9], [1.0] * 5, [0.8, 1.2, 1.1, 1.0, 0.7])


@pytest.mark.parametrize("epsilon", [0.1, -0.1])
def test_perturbed_logprobs_equal_their_closed_form(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    own, other = rng.normal(0, 3, (6, 11)), rng.normal(0, 3, (6, 11))
    targets = rng.integers(0, 11, 6)
    mixed = np.exp((1 + epsilon) * own - epsilon * other)
    want = np.log(mixed[np.arange(6), targets] / mixed.sum(-1))
    logits = torch.from_numpy(own).requires_grad_()
    found = build_perturbed(epsilon).fn(logits, torch.from_numpy(targets), torch.from_numpy(other))
    np.testing.assert_allclose(found, want, rtol=1e-10)
    assert not found.requires_grad


def test_where_both_models_agree_nothing_is_perturbed() -> None:
    """Bit for bit: rounding must not decide steps at the start."""
    logits = torch.randn(5, 97, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(5)
    plain = logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, -1)
    for epsilon in (0.01, -0.01):
        assert torch.equal(build_perturbed(epsilon).fn(logits, targets, logits.clone()), plain)


def test_s0_24_steps_are_one_where_the_log_ratio_is_monotonous() -> None:
    assert compute_steps(PAIRS, 0.1).tolist() == [1.0, -1.0, 0.0, 0.0, 0.0]
    assert compute_steps(PAIRS, 0.0).tolist() == [0.0] * 5


def test_the_loss_by_hand() -> None:
    """β = 0.2 · factor 0.5 = 0.1; β_i = 0.1/1.1, 0.1/0.9, 0.1; margin 2."""
    found = compute_epsilon_loss(PAIRS, beta=0.2, epsilon=0.1, state={"factor": 0.5})
    own = [0.1 / 1.1, 0.1 / 0.9, 0.1, 0.1, 0.1]
    assert found.figures["beta"].tolist() == pytest.approx(own, rel=1e-14)
    assert found.loss.tolist() == pytest.approx([math.log1p(math.exp(-2 * b)) for b in own], rel=1e-10)
    assert found.margin.tolist() == pytest.approx([2 * b for b in own], rel=1e-14)
    assert not found.figures["beta"].requires_grad, "β is no function of the weights"


def test_s0_24_beta_moves_after_the_step_by_the_mean() -> None:
    state = RunningBeta.initial()
    assert state == {"factor": 1.0}
    up = build_pairs([1.2, 1.2, 1.0], [1.0] * 3, [0.8, 0.8, 1.0])
    state = RunningBeta.advance(up, beta=0.2, epsilon=0.1, state=state)
    assert state["factor"] == pytest.approx(1 / (1 + 0.1 * 2 / 3), rel=1e-14)
    state = RunningBeta.advance(PAIRS, beta=0.2, epsilon=0.1, state=state)
    assert state["factor"] == pytest.approx(1 / (1 + 0.1 * 2 / 3), rel=1e-14), "+1 and −1 cancel"
    again = RunningBeta.advance(up, beta=0.2, epsilon=0.0, state=state)
    assert again == state


def test_epsilon_zero_reads_nothing() -> None:
    assert build_epsilon(SimpleNamespace(epsilon=0.0)) == ()
    assert [f.name for f in build_epsilon(SimpleNamespace(epsilon=0.1))] == ["logprobs_+0.1", "logprobs_-0.1"]

"""Closed forms of the DPO family: hand-derived values and an independent numpy version."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.core.batch import build_packed_batch
from burnish.losses.dpo import compute_hinge_loss, compute_ipo_loss, compute_sigmoid_loss
from burnish.losses.pairs import Pairs, compute_pairs, compute_wins
from tests.losses.tiny import build_pairs

# One pair by hand. Policy −10 and −12 nats, reference −11 and −11: a = 1, z = −1, Δ = 2.
# Lengths 4 and 2: a/n_c − z/n_r = 0.25 + 0.5 = 0.75.
HAND = Pairs(*(torch.tensor([x], dtype=torch.float64) for x in (-10.0, -12.0, 1.0, -1.0, 4.0, 2.0, 0.0)))


def test_sigmoid_by_hand() -> None:
    """β = ½: βΔ = 1, loss = log(1 + e⁻¹) = 0.313262, rewards ½ and −½."""
    found = compute_sigmoid_loss(HAND, beta=0.5)
    assert found.loss.item() == pytest.approx(0.31326168751822286, rel=1e-14)
    assert (found.chosen_reward.item(), found.rejected_reward.item(), found.margin.item()) == (0.5, -0.5, 1.0)


def test_t01_label_smoothing_is_conservative_dpo() -> None:
    """ε = 0.3: 0.7 · log(1 + e⁻¹) + 0.3 · log(1 + e) = 0.313262 + 0.3 · 1 = 0.613262. TRL's sigmoid ignores ε."""
    found = compute_sigmoid_loss(HAND, beta=0.5, label_smoothing=0.3)
    assert found.loss.item() == pytest.approx(0.6132616875182228, rel=1e-14)
    assert found.margin.item() == 1.0


def test_label_smoothing_pulls_back_beyond_its_best_margin() -> None:
    """The minimum over the margin lies at log((1−ε)/ε), not at infinity."""
    best = math.log(0.9 / 0.1)
    margins = torch.tensor([best - 0.5, best, best + 0.5], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(3, dtype=torch.float64)
    loss = compute_sigmoid_loss(Pairs(zero, zero, margins, zero, zero, zero, zero), beta=1.0, label_smoothing=0.1).loss
    loss.sum().backward()
    assert margins.grad is not None
    assert margins.grad[0] < 0 < margins.grad[2] and abs(margins.grad[1]) < 1e-15


def test_hinge_by_hand() -> None:
    """β = ½: 1 − 1 = 0 exactly at the hinge; β = ¼: 1 − ½ = ½; β = 1: flat, no gradient."""
    assert compute_hinge_loss(HAND, beta=0.5).loss.item() == 0.0
    assert compute_hinge_loss(HAND, beta=0.25).loss.item() == 0.5
    ratio = torch.tensor([1.0], requires_grad=True)
    one = torch.ones(1)
    compute_hinge_loss(Pairs(one, one, ratio, -one, one, one, 0 * one), beta=1.0).loss.sum().backward()
    assert ratio.grad is not None and ratio.grad.item() == 0.0


def test_ipo_by_hand() -> None:
    """β = ½: aim 1/(2β) = 1, margin 0.75 a token, loss (0.75 − 1)² = 0.0625; β = 2/3: aim 0.75, loss 0."""
    found = compute_ipo_loss(HAND, beta=0.5)
    assert found.loss.item() == pytest.approx(0.0625, rel=1e-14)
    assert (found.chosen_reward.item(), found.rejected_reward.item()) == (0.25, -0.5)
    assert compute_ipo_loss(HAND, beta=2 / 3).loss.item() == pytest.approx(0.0, abs=1e-30)


def test_ipo_of_a_completion_without_scored_tokens_is_finite() -> None:
    zero = torch.zeros(1)
    assert compute_ipo_loss(Pairs(zero, zero, zero, zero, zero, zero + 3, zero), beta=0.5).loss.item() == 1.0


def test_pairs_are_summed_from_tokens() -> None:
    batch = build_packed_batch(build_pairs())
    rng = np.random.default_rng(2)
    logprobs, reference = (torch.from_numpy(rng.normal(-3, 1, len(batch.target_ids))) for _ in range(2))
    pairs = compute_pairs(logprobs, reference, batch.table)
    start = 0
    for g, group in enumerate(build_pairs()):
        for side, c in zip(("chosen", "rejected"), group.completions, strict=True):
            piece = slice(start, start + len(c.ids))
            assert getattr(pairs, side)[g].item() == pytest.approx(float(logprobs[piece].sum()), rel=1e-12)
            ratio = float((logprobs[piece] - reference[piece]).sum())
            assert getattr(pairs, f"{side}_ratio")[g].item() == pytest.approx(ratio, rel=1e-12)
            assert getattr(pairs, f"{side}_tokens")[g].item() == len(c.ids)
            start += len(c.ids)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.3, 1.0, None])
def test_tokens_beyond_the_shorter_answer_weigh_ld_alpha(ld_alpha: float | None) -> None:
    """Shared length min(n_c, n_r): the log-ratios weigh the rest by α; plain sums and token counts stay."""
    batch = build_packed_batch(build_pairs())
    rng = np.random.default_rng(4)
    logprobs, reference = (rng.normal(-3, 1, len(batch.target_ids)) for _ in range(2))
    pairs = compute_pairs(torch.from_numpy(logprobs), torch.from_numpy(reference), batch.table, ld_alpha=ld_alpha)
    plain = compute_pairs(torch.from_numpy(logprobs), torch.from_numpy(reference), batch.table)
    assert torch.equal(pairs.chosen, plain.chosen) and torch.equal(pairs.chosen_tokens, plain.chosen_tokens)
    start, alpha = 0, 1.0 if ld_alpha is None else ld_alpha
    for g, group in enumerate(build_pairs()):
        shared, gap = min(len(c.ids) for c in group.completions), []
        for side, c in zip(("chosen", "rejected"), group.completions, strict=True):
            ratio, ref = ((x[start : start + len(c.ids)]) for x in (logprobs - reference, reference))
            want = ratio[:shared].sum() + alpha * ratio[shared:].sum()
            assert getattr(pairs, f"{side}_ratio")[g].item() == pytest.approx(want, rel=1e-12, abs=1e-13)
            gap.append(ref[:shared].sum() + alpha * ref[shared:].sum())
            start += len(c.ids)
        assert pairs.reference_gap[g].item() == pytest.approx(gap[0] - gap[1], rel=1e-12)


def test_without_a_reference_the_ratios_are_the_sums() -> None:
    batch = build_packed_batch(build_pairs())
    pairs = compute_pairs(torch.full((len(batch.target_ids),), -2.0), None, batch.table)
    assert torch.equal(pairs.chosen, pairs.chosen_ratio) and torch.equal(pairs.rejected, pairs.rejected_ratio)
    assert not pairs.reference_gap.any()


def test_ratios_keep_the_digits_that_two_long_sums_lose() -> None:
    """4,000 tokens at −9 nats with differences of 1e−6: the sums are −36,000, where fp32 has steps of 0.004."""
    n, step = 4000, 1e-6
    group = build_pairs()[0]
    long = type(group.completions[0])(np.ones(n, np.int32), np.ones(n, bool))
    batch = build_packed_batch([type(group)("long", group.prompt, (long, group.completions[1]))])
    policy = torch.full((len(batch.target_ids),), -9.0)
    reference = policy.clone()
    reference[:n] = -9.0 - step
    per_token = float(policy[0] - reference[0])  # what fp32 makes of the step
    found = compute_pairs(policy, reference, batch.table).chosen_ratio.item()
    assert found == pytest.approx(n * per_token, rel=1e-5)


def test_ties_count_one_half_and_are_told_apart() -> None:
    wins, ties = compute_wins(torch.tensor([2.0, -1.0, 0.0, 0.0, 1e-30]))
    assert (wins.item(), ties.item()) == (3.0, 2.0)


def test_t30_a_nan_margin_is_never_counted_as_a_loss() -> None:
    wins, _ = compute_wins(torch.tensor([1.0, math.nan]))
    assert math.isnan(wins.item())

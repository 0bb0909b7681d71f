"""The reward model's terms and metrics, and its scores alone and in a batch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from burnish.config.stages import RewardSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Group
from burnish.methods.reward import Reward
from burnish.models.policy import Policy
from tests.losses.tiny import MARGINS, build_completion, build_model, build_pairs

SCORES = torch.tensor([2.0, 1.0, 0.0, 3.0, 1.5, 1.5, 4.0, -4.0, 0.0, 0.0])  # chosen, rejected of five pairs


def test_terms_and_metrics_by_hand() -> None:
    """Differences 1, −3, 0, 8, 0: one half for each of two ties → 3 of 5; sums of squares 9 + 9 + 9 + 0 + 0."""
    method = Reward(RewardSettings(center_rewards_coefficient=0.5))
    groups = build_pairs()
    result = method.compute_loss(Outputs(scores=SCORES), build_packed_batch(groups).table, {})
    loss, centering = result.terms
    want = sum(math.log1p(math.exp(-d)) for d in (1, -3, 0, 8, 0))
    assert (loss.name, loss.unit, loss.count, loss.weight) == ("reward", "pair", 5.0, 1.0)
    assert loss.sum.item() == pytest.approx(want, rel=1e-6)
    assert (centering.name, centering.count, centering.weight) == ("centering", 5.0, 0.5)
    assert centering.sum.item() == pytest.approx(27.0)
    assert method.counts(groups) == {"reward": 5.0, "centering": 5.0}
    figures = {m.name: m.sum.item() / m.count for m in result.metrics}
    assert figures == pytest.approx(
        {"accuracy": 0.6, "ties": 0.4, "scores/chosen": 1.5, "scores/rejected": 0.3, "margin": 1.2}
    )


def test_without_a_coefficient_there_is_no_centring_term() -> None:
    method = Reward(RewardSettings())
    assert method.counts(build_pairs()) == {"reward": 5.0}
    assert len(method.compute_loss(Outputs(scores=SCORES), build_packed_batch(build_pairs()).table, {}).terms) == 1


def test_the_margin_column_moves_the_loss_but_not_the_accuracy() -> None:
    method = Reward(RewardSettings())
    plain, marked = (
        method.compute_loss(Outputs(scores=SCORES), build_packed_batch(build_pairs(m)).table, {})
        for m in (None, MARGINS)
    )
    differences = [1, -3, 0, 8, 0]
    want = sum(math.log1p(math.exp(m - d)) for d, m in zip(differences, MARGINS, strict=True))
    assert marked.terms[0].sum.item() == pytest.approx(want, rel=1e-6)
    assert plain.terms[0].sum.item() < marked.terms[0].sum.item()
    assert [m.sum.item() for m in marked.metrics] == [m.sum.item() for m in plain.metrics]


@pytest.mark.parametrize("attention", ["sdpa", "padded"])
def test_s4_02_a_score_is_the_same_alone_and_in_a_batch(attention: str) -> None:
    policy = Policy(build_model("score", 2), head="score", attention=attention).eval()
    want = frozenset({"scores"})
    groups = build_pairs()
    with torch.no_grad():
        together = policy(build_packed_batch(groups), want).scores
        alone = [policy(build_packed_batch([g]), want).scores for g in groups]
    assert together is not None
    torch.testing.assert_close(together, torch.cat([x for x in alone if x is not None]), rtol=1e-5, atol=1e-6)


def test_t19_the_score_is_read_at_the_last_token_even_if_it_is_the_padding_token() -> None:
    """TRL finds the last position by token value; a completion that ends in the pad or end token is then misread."""
    policy = Policy(build_model("score", 2), head="score").eval()
    scores = []
    for ending in ([], [1], [0]):
        completion = build_completion([60, 70, *ending])
        group = Group("row:0", np.array([10, 20], np.int32), (completion,))
        with torch.no_grad():
            found = policy(build_packed_batch([group]), frozenset({"scores"})).scores
        assert found is not None
        scores.append(round(found.item(), 6))
    assert len(set(scores)) == 3

"""Preference optimisation: metrics, mixes, and the start at ln 2."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from burnish.config.stages import DpoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Group
from burnish.errors import ConfigError
from burnish.methods.dpo import Dpo
from burnish.models.policy import Policy
from tests.losses.tiny import build_model, build_pairs

LOGPROBS = frozenset({"logprobs"})


def attach(groups: list[Group], values: np.ndarray) -> list[Group]:
    """The groups with reference log-probs, (S,) in row order."""
    out, start = [], 0
    for group in groups:
        completions = []
        for c in group.completions:
            column = np.asarray(values[start : start + len(c.ids)], np.float32)
            completions.append(replace(c, token_columns={"ref_logprobs": column}))
            start += len(c.ids)
        out.append(replace(group, completions=tuple(completions)))
    return out


def figures(result) -> dict[str, float]:
    return {m.name: m.sum.item() / m.count for m in result.metrics}


def hand() -> tuple[list[Group], torch.Tensor]:
    """One pair of one token each: policy −1 and −4, reference −2 and −3; a = 1, z = −1, Δ = 2."""
    pair = build_pairs()[0]
    one = tuple(replace(c, ids=c.ids[:1], mask=c.mask[:1]) for c in pair.completions)
    return attach([replace(pair, completions=one)], np.array([-2.0, -3.0])), torch.tensor([-1.0, -4.0])


def test_metrics_by_hand() -> None:
    groups, logprobs = hand()
    result = Dpo(DpoSettings(beta=0.5)).compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
    (term,) = result.terms
    assert (term.name, term.unit, term.count, term.weight) == ("dpo", "pair", 1.0, 1.0)
    assert term.sum.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    assert figures(result) == {
        "rewards/chosen": 0.5,
        "rewards/rejected": -0.5,
        "rewards/margins": 1.0,
        "rewards/accuracies": 1.0,
        "rewards/ties": 0.0,
        "logps/chosen": -1.0,
        "logps/rejected": -4.0,
    }


def test_a_mix_has_a_term_for_each_loss_and_weighs_them() -> None:
    groups, logprobs = hand()
    method = Dpo(DpoSettings(loss_type=["ipo", "sigmoid"], loss_weights=[0.25, 2.0], beta=0.5))
    result = method.compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
    assert [(t.name, t.weight) for t in result.terms] == [("dpo/ipo", 0.25), ("dpo/sigmoid", 2.0)]
    assert method.counts(groups) == {"dpo/ipo": 1.0, "dpo/sigmoid": 1.0}
    assert result.terms[0].sum.item() == pytest.approx((2 - 1) ** 2)
    assert result.terms[1].sum.item() == pytest.approx(math.log1p(math.exp(-1)), rel=1e-6)
    found = figures(result)
    assert found["rewards/margins"] == 2.0, "plain names are those of the first loss"
    assert found["rewards/margins/sigmoid"] == 1.0


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo"])
def test_t23_policy_equal_to_reference_starts_at_the_analytic_value(loss_type: str) -> None:
    """All margins are exactly 0: every pair is a tie, and ties count one half, so nothing looks learnt or unlearnt."""
    policy = Policy(build_model("lm", 0), head="lm").eval()
    groups = build_pairs()
    with torch.no_grad():
        reference = policy(build_packed_batch(groups), LOGPROBS).logprobs
    assert reference is not None
    batch = build_packed_batch(attach(groups, reference.numpy()))
    result = Dpo(DpoSettings(loss_type=loss_type)).compute_loss(policy(batch, LOGPROBS), batch.table, {})
    start = {"sigmoid": math.log(2), "hinge": 1.0, "ipo": 25.0}[loss_type]
    assert result.terms[0].sum.item() / 5 == pytest.approx(start, rel=1e-6)
    found = figures(result)
    assert (found["rewards/margins"], found["rewards/accuracies"], found["rewards/ties"]) == (0.0, 0.5, 1.0)


def test_swapping_chosen_and_rejected_negates_the_margin() -> None:
    groups, logprobs = hand()
    swapped = [replace(g, completions=g.completions[::-1]) for g in groups]
    method = Dpo(DpoSettings(beta=0.5))
    there = method.compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
    back = method.compute_loss(Outputs(logprobs=logprobs.flip(0)), build_packed_batch(swapped).table, {})
    assert figures(there)["rewards/margins"] == -figures(back)["rewards/margins"]
    assert figures(there)["rewards/accuracies"] + figures(back)["rewards/accuracies"] == 1.0
    # −log σ(−x) − (−log σ(x)) = x
    assert back.terms[0].sum.item() - there.terms[0].sum.item() == pytest.approx(1.0, rel=1e-6)


def test_no_gradient_reaches_the_reference_or_leaves_through_metrics() -> None:
    groups, logprobs = hand()
    leaf = logprobs.clone().requires_grad_()
    table = build_packed_batch(groups).table
    reference = table.token_columns["ref_logprobs"].requires_grad_()
    result = Dpo(DpoSettings()).compute_loss(Outputs(logprobs=leaf), table, {})
    result.terms[0].sum.backward()
    assert reference.grad is None and leaf.grad is not None
    assert not any(m.sum.requires_grad for m in result.metrics)


def test_a_missing_reference_is_an_error_not_a_reference_free_loss() -> None:
    batch = build_packed_batch(build_pairs())
    with pytest.raises(ValueError, match="ref_logprobs"):
        Dpo(DpoSettings()).compute_loss(Outputs(logprobs=torch.zeros(len(batch.target_ids))), batch.table, {})


def test_s1_04_the_loss_type_decides_which_loss_is_computed() -> None:
    groups, logprobs = hand()
    values = set()
    for loss_type in ("sigmoid", "hinge", "ipo"):
        method = Dpo(DpoSettings(loss_type=loss_type))
        result = method.compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
        values.add(round(result.terms[0].sum.item(), 6))
    assert values == {0.598139, 0.8, 9.0}, "−log σ(0.2); 1 − 0.2; (2 − 5)²"


def test_t01_smoothing_beside_a_loss_that_ignores_it_is_refused() -> None:
    with pytest.raises(ConfigError, match="label_smoothing"):
        Dpo(DpoSettings(loss_type="ipo", label_smoothing=0.1))


def test_t30_a_nan_log_prob_makes_loss_and_metrics_nan_never_zero() -> None:
    groups, logprobs = hand()
    logprobs[0] = math.nan
    result = Dpo(DpoSettings()).compute_loss(Outputs(logprobs=logprobs), build_packed_batch(groups).table, {})
    assert math.isnan(result.terms[0].sum.item())
    assert math.isnan(figures(result)["rewards/accuracies"]) and math.isnan(figures(result)["rewards/margins"])

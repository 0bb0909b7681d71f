"""MADPO's weights: against their closed form in fp64, at the edges, and in the loss."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from burnish.config.stages import DpoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.losses.madpo import compute_coefficient, compute_margin_weights
from burnish.losses.terms import LossResult
from burnish.methods.dpo import Dpo
from tests.engine.tiny import build_groups

PLAIN = {"c_max": 2.0, "c_min": 0.5, "steepness": 1.0, "tau": math.log(999)}
OTHER = {"c_max": 3.5, "c_min": 0.2, "steepness": 0.7, "tau": 2.0}
MARGINS = [
    0.0,
    1e-9,
    0.3,
    -0.3,
    1.0,
    -1.0,
    1.9,
    -1.9,
    2.1,
    -2.1,
    3.0,
    6.0,
    -6.0,
    6.9,
    -6.9,
    6.91,
    -6.91,
    8.0,
    20.0,
    -20.0,
]


def closed_form(h: float, *, c_max: float, c_min: float, steepness: float, tau: float) -> float:
    """Written out with plain exponentials."""
    if not h > -tau:
        return 1.0
    c = c_min + (c_max - c_min) / (1 + (c_max - 1) / (1 - c_min) * math.exp(steepness * (abs(h) - tau)))
    return (1 + math.exp(-h)) / (1 + math.exp(-c * h))


@pytest.mark.parametrize("shape", [PLAIN, OTHER], ids=["defaults", "others"])
def test_weights_are_the_closed_form(shape: dict[str, float]) -> None:
    found = compute_margin_weights(torch.tensor(MARGINS, dtype=torch.float64), **shape)
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx([closed_form(h, **shape) for h in MARGINS], rel=0, abs=1e-10)


@pytest.mark.parametrize("shape", [PLAIN, OTHER], ids=["defaults", "others"])
def test_the_weight_is_one_at_tau_on_both_sides_and_beyond_it_on_the_left(shape: dict[str, float]) -> None:
    tau, step = shape["tau"], 1e-9
    at = torch.tensor([tau, -tau, -tau - step, -50.0, 0.0], dtype=torch.float64)
    assert compute_margin_weights(at, **shape).tolist() == pytest.approx([1.0] * 5, abs=1e-12)
    assert compute_margin_weights(at, **shape)[1:4].tolist() == [1.0] * 3, "exactly: there the formula is not used"
    near = torch.tensor([-tau + 0.5, tau - 0.5, tau + 0.5], dtype=torch.float64)
    hard, right, easy = compute_margin_weights(near, **shape).tolist()
    assert hard < 1 < right and easy < 1


def test_the_coefficient_goes_from_c_max_to_c_min_through_one() -> None:
    size = torch.tensor([0.0, OTHER["tau"], 1e4], dtype=torch.float64)
    found = compute_coefficient(size, **OTHER).tolist()
    assert found[1:] == pytest.approx([1.0, 0.2], abs=1e-12)
    flat = compute_coefficient(torch.zeros(1, dtype=torch.float64), **{**OTHER, "tau": 60.0}).item()
    assert flat == pytest.approx(3.5, abs=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [2.0, 1e5])
def test_extremes_are_finite(dtype: torch.dtype, tau: float) -> None:
    margins = torch.tensor([1e4, -1e4, 1e-30, -1e-30], dtype=dtype)
    found = compute_margin_weights(margins, **{**PLAIN, "tau": tau, "steepness": 50.0})
    assert found.dtype == dtype and torch.isfinite(found).all()
    assert found[0].item() == 1.0 and found[1].item() == (1.0 if tau == 2.0 else 0.0)
    assert found[2:].tolist() == pytest.approx([1.0, 1.0])


def test_low_precision_is_lifted_and_nothing_is_differentiated() -> None:
    margins = torch.tensor([1.0], dtype=torch.bfloat16, requires_grad=True)
    found = compute_margin_weights(margins, **PLAIN)
    assert found.dtype == torch.float32 and not found.requires_grad


def draw() -> tuple[Any, torch.Tensor]:
    table = build_packed_batch(build_groups(6, reference=True)).table
    torch.manual_seed(0)
    return table, torch.randn(len(table.token_completion), dtype=torch.float64).sub(3).requires_grad_()


def figures(result: LossResult) -> dict[str, float]:
    return {m.name: float(m.sum) / m.count for m in result.metrics}


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_down"])
def test_loss_and_gradient_are_each_pair_s_own_times_its_weight(loss_type: str) -> None:
    table, logprobs = draw()
    outputs = Outputs(logprobs=logprobs)
    settings = {"loss_type": loss_type, "reward_model": "./rm", "madpo_c_max": 4.0, "madpo_tau": 3.0, "beta": 0.3}
    result = Dpo(DpoSettings(**settings)).compute_loss(outputs, table, {})
    plain = Dpo(DpoSettings(loss_type=loss_type, beta=0.3))
    shape = {"c_max": 4.0, "c_min": 0.25, "steepness": 1.0, "tau": 3.0}
    margins = [float(h) for h in table.group_columns["reward_margin"]]
    weights = torch.tensor([closed_form(h, **shape) for h in margins], dtype=torch.float64)
    assert weights.std() > 0.01, "they matter"
    want = (plain.mix[0].compute(plain.compute_pairs(outputs, table)).loss * weights).sum()
    assert result.terms[0].sum.item() == pytest.approx(want.item(), rel=1e-12)
    one, two = (torch.autograd.grad(x, [logprobs], retain_graph=True)[0] for x in (result.terms[0].sum, want))
    torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-15)
    assert result.terms[0].count == 6.0
    found = figures(result)
    assert found["madpo_weights"] == pytest.approx(weights.mean().item())
    assert found["madpo_margins"] == pytest.approx(sum(margins) / 6)


def test_with_wpo_the_weights_multiply_and_the_sft_part_has_none() -> None:
    table, logprobs = draw()
    outputs = Outputs(logprobs=logprobs, functionals={"log_square_sum": logprobs.detach() + 1})
    mix = {"loss_type": ["sigmoid", "sft"]}

    def sums(**settings: Any) -> list[torch.Tensor]:
        return [t.sum for t in Dpo(DpoSettings(**mix, **settings)).compute_loss(outputs, table, {}).terms]

    both, plain = sums(reward_model="./rm", use_weighting=True), sums()
    alone = [
        Dpo(DpoSettings(**s)).weights.compute(outputs, table)[0]
        for s in ({"use_weighting": True}, {"reward_model": "./rm"})
    ]
    method = Dpo(DpoSettings())
    loss = method.mix[0].compute(method.compute_pairs(outputs, table)).loss
    assert both[0].item() == pytest.approx((loss * alone[0] * alone[1]).sum().item(), rel=1e-12)  # type: ignore[operator]
    assert both[0].item() != pytest.approx(sums(use_weighting=True)[0].item(), rel=1e-6)
    assert both[1].item() == plain[1].item()


def test_pairs_without_margins_are_an_error() -> None:
    table, logprobs = draw()
    bare = replace(table, group_columns={})
    with pytest.raises(ValueError, match="reward_margin"):
        Dpo(DpoSettings(reward_model="./rm")).compute_loss(Outputs(logprobs=logprobs), bare, {})


def test_a_micro_batch_without_rows_gives_zero() -> None:
    batch = build_packed_batch([])
    logprobs = torch.zeros(0, dtype=torch.float64, requires_grad=True)
    result = Dpo(DpoSettings(reward_model="./rm")).compute_loss(Outputs(logprobs=logprobs), batch.table, {})
    assert result.terms[0].sum.item() == 0.0 and result.terms[0].count == 0.0

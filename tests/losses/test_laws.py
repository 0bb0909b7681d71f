"""Laws that every registered loss obeys, in fp64; a new entry of the registry is picked up by itself."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.losses.pairs import Pairs
from burnish.losses.reward import compute_bradley_terry_loss, compute_centering_loss
from burnish.losses.sft import compute_nll
from tests.losses.drawn import (
    CASES,
    LEAVES,
    REGISTERED,
    Case,
    build_start,
    build_sums,
    change,
    detach,
    draw_pairs,
    over,
    swap,
    take,
)

SUMS = [case for case in CASES if case.entry.aligned]
SORTING = [case for case in CASES if not case.entry.aligned]
LN2 = math.log(2)
# Policy = reference and both answers equally likely, at β = 0.3, whatever the log-probs are; sft: −Σ log π = 20.
START = {
    "dpo sigmoid": LN2,
    "dpo robust": LN2,
    "dpo hinge": 1.0,
    "dpo ipo": (1 / 0.6) ** 2,
    "dpo sigmoid_norm": LN2,
    "dpo exo_pair": 0.5 * (math.log(0.5) - math.log(0.999)) + 0.5 * (math.log(0.5) - math.log(0.001)),
    "dpo discopop": 0.5 * LN2 + 0.5,
    "dpo nca_pair": 2 * LN2,
    "dpo sppo_hard": 2 * (1 / 0.6) ** 2,
    "dpo bco_pair": math.log1p(math.exp(0.2)) + math.log1p(math.exp(-0.2)),
    "dpo apo_zero": 1.0,
    "dpo apo_down": 1.0,
    "dpo tdpo1": LN2,
    "dpo tdpo2": LN2,
    "dpo radpo1": LN2,
    "dpo radpo2": LN2,
    "dpo epsilon": LN2,
    "dpo aot": LN2,
    "dpo aot_unpaired": LN2,
    "dpo sft": 20.0,
    "cpo sigmoid": LN2,
    "cpo hinge": 1.0,
    "cpo ipo": (1 / 0.6) ** 2,
    "simpo simpo": math.log1p(math.e),
    "orpo orpo": 0.3 * LN2,
}


def gradient(total: Tensor, pairs: Pairs) -> list[Tensor]:
    inputs = [getattr(pairs, name) for name in LEAVES]
    found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


def double(value: float, n: int = 3) -> Tensor:
    return torch.full((n,), value, dtype=torch.float64)


@over(SUMS)
def test_doubled_data_double_the_sum_and_leave_the_mean(case: Case) -> None:
    pairs = detach(draw_pairs(5))
    twice = change(lambda *x: torch.cat(x), pairs, pairs)
    assert case.compute(twice).loss.sum().item() == pytest.approx(2 * case.compute(pairs).loss.sum().item(), rel=1e-13)


@over(SUMS)
@settings(max_examples=8, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0, 50))
def test_any_split_adds_up_in_value_and_gradient(case: Case, cuts: list[int], seed: int) -> None:
    pairs = draw_pairs(9, seed)
    edges = [0, *sorted(cuts), 9]  # empty parts and all
    parts = [case.compute(take(pairs, slice(a, b))).loss.sum() for a, b in pairwise(edges)]
    whole, split = case.compute(pairs).loss.sum(), torch.stack(parts).sum()
    assert split.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(gradient(whole, pairs), gradient(split, pairs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@over(SORTING)
def test_a_loss_that_sorts_is_declared_and_does_change_with_the_split(case: Case) -> None:
    """Were it not declared coupled, the number of micro-batches would be part of the method."""
    assert case.entry.coupled
    pairs = detach(draw_pairs(8))
    halves = [case.compute(take(pairs, rows)).loss.sum() for rows in (slice(0, 4), slice(4, 8))]
    assert abs(float(sum(halves) - case.compute(pairs).loss.sum())) > 1e-3


@over(CASES)
def test_the_order_of_pairs_does_not_matter(case: Case) -> None:
    pairs, order = draw_pairs(9), torch.randperm(9, generator=torch.Generator().manual_seed(0))
    there, back = case.compute(pairs).loss.sum(), case.compute(take(pairs, order)).loss.sum()
    assert there.item() == pytest.approx(back.item(), rel=1e-13)
    for a, b in zip(gradient(there, pairs), gradient(back, pairs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@over(CASES)
def test_nothing_can_run_backward(case: Case) -> None:
    pairs = draw_pairs(0)
    total = case.compute(pairs).loss.sum()
    assert float(total.detach()) == 0.0
    total.backward()
    found = [getattr(pairs, name).grad for name in LEAVES]
    assert any(g is not None and g.shape == (0,) for g in found)


@over(CASES)
def test_completions_without_a_scored_token_are_finite(case: Case) -> None:
    zeros = [torch.zeros(3, dtype=torch.float64, requires_grad=True) for _ in LEAVES]
    pairs = Pairs(*zeros, double(0), double(0), double(0), build_sums(double(0)))
    found = case.compute(pairs).loss
    found.sum().backward()
    assert bool(torch.isfinite(found).all())
    assert all(x.grad is None or bool(torch.isfinite(x.grad).all()) for x in zeros)


@over(CASES)
def test_swapped_pairs_negate_the_margin(case: Case) -> None:
    pairs = detach(draw_pairs(40, seed=4))
    there, back = case.compute(pairs), case.compute(swap(pairs))
    torch.testing.assert_close(there.margin, -back.margin, rtol=0, atol=0)
    if not case.entry.aligned:
        return
    # The better ordering of each pair has the smaller loss; DiscoPOP's blend is not monotone around 0.
    apart = there.margin.abs() > (0.5 if case.name == "discopop" else 0.0)
    assert apart.sum() > 10
    assert bool((((there.loss - back.loss) * there.margin)[apart] <= 1e-12).all())


@over(REGISTERED)
def test_the_analytic_start(case: Case) -> None:
    found = case.compute(build_start(double(-20), double(-20), (7, 7)))
    assert found.loss.tolist() == pytest.approx([START[str(case)]] * 3, rel=1e-13)
    assert found.margin.tolist() == [0.0] * 3


def test_every_registered_loss_has_an_analytic_start() -> None:
    assert set(START) == {str(case) for case in REGISTERED}


@over(CASES)
def test_at_the_start_the_gradient_widens_the_margin(case: Case) -> None:
    sums = [double(value, 4).requires_grad_() for value in (-9, -9)]
    case.compute(build_start(*sums, (5, 5))).loss.sum().backward()
    chosen, rejected = (torch.zeros(4) if x.grad is None else x.grad for x in sums)
    if case.name == "discopop":  # the paper says so: at 0 it rises with the margin, and has its minima beside
        assert bool((chosen - rejected > 0).all())
        return
    assert bool((chosen - rejected < 0).all())
    assert bool((chosen <= 0).all() and (rejected >= 0).all())


@over(CASES)
def test_gradcheck(case: Case) -> None:
    pairs = draw_pairs(6, seed=3)
    leaves = tuple(getattr(pairs, name) for name in LEAVES)
    rest = (pairs.chosen_tokens, pairs.rejected_tokens, pairs.reference_gap, pairs.sums)
    assert torch.autograd.gradcheck(lambda *x: case.compute(Pairs(*x, *rest)).loss, leaves)


@over(CASES)
def test_t11_a_nan_that_is_read_makes_the_loss_nan(case: Case) -> None:
    """No comparison, cut or mean may take a NaN for a number. An input that changes nothing is not read, and is left out."""
    pairs = detach(draw_pairs(5, seed=2))
    read = []
    for name in (*LEAVES, *pairs.sums):
        others = [case.compute(put(pairs, name, 2, value)).loss for value in (-60.0, -0.1, 60.0)]
        if all(torch.equal(loss, case.compute(pairs).loss) for loss in others):
            continue
        read.append(name)
        found = case.compute(put(pairs, name, 2, math.nan)).loss
        assert bool((found[2] if case.entry.aligned else found.sum()).isnan()), name
    assert read
    if case.entry.functionals:
        assert set(read) & set(pairs.sums), "what it reads of the distribution is among them"


def put(pairs: Pairs, name: str, row: int, value: float) -> Pairs:
    """Pairs in which one number is another one; of a functional, the chosen answer's."""

    def change_one(x: Tensor) -> Tensor:
        return x.index_fill(0, torch.tensor([row]), value)

    if name not in pairs.sums:
        return replace(pairs, **{name: change_one(getattr(pairs, name))})
    chosen, rejected = pairs.sums[name]
    return replace(pairs, sums={**pairs.sums, name: (change_one(chosen), rejected)})


@over(CASES)
def test_types_are_kept_from_fp32_on(case: Case) -> None:
    for dtype in (torch.float32, torch.float64):
        found = case.compute(draw_pairs(3, dtype=dtype))
        assert found.loss.dtype == found.chosen_reward.dtype == found.rejected_reward.dtype == dtype


@over(CASES)
def test_huge_margins_stay_finite(case: Case) -> None:
    big = torch.tensor([4000.0, -4000.0], requires_grad=True)
    pairs = Pairs(-big.abs(), -big.abs() / 2, big, -big, torch.ones(2), torch.ones(2), torch.zeros(2), build_sums(big))
    found = case.compute(pairs).loss
    found.sum().backward()
    assert bool(torch.isfinite(found).all()) and big.grad is not None and bool(torch.isfinite(big.grad).all())


@over([case for case in CASES if case.reads("beta")])
def test_beta_may_be_a_number_of_each_pair(case: Case) -> None:
    """A (G,) β is each pair with its own number; a () tensor is the number. Sorting losses take the latter only."""
    pairs, betas = detach(draw_pairs(5, seed=8)), torch.tensor([0.05, 0.2, 1.0, 0.3, 2.0], dtype=torch.float64)
    for beta in (0.05, 1.0):
        one = case.compute(pairs, beta=torch.tensor(beta, dtype=torch.float64))
        torch.testing.assert_close(one.loss, case.compute(pairs, beta=beta).loss, rtol=1e-14, atol=0)
    if case.entry.aligned:
        rows = [case.compute(take(pairs, slice(g, g + 1)), beta=float(b)) for g, b in enumerate(betas)]
        found = case.compute(pairs, beta=betas)
        torch.testing.assert_close(found.loss, torch.cat([r.loss for r in rows]), rtol=1e-13, atol=0)
        torch.testing.assert_close(found.margin, torch.cat([r.margin for r in rows]), rtol=1e-13, atol=1e-15)


def test_bradley_terry_and_centering_obey_the_same_laws() -> None:
    pairs = draw_pairs(8)
    c, r, m = pairs.chosen, pairs.rejected, pairs.chosen_tokens
    for loss in (lambda s: compute_bradley_terry_loss(c[s], r[s], m[s]), lambda s: compute_centering_loss(c[s], r[s])):
        whole = float(loss(slice(None)).sum().detach())
        parts = sum(float(loss(slice(a, b)).sum().detach()) for a, b in ((0, 3), (3, 3), (3, 8)))
        assert parts == pytest.approx(whole, rel=1e-13)
        empty = loss(slice(0, 0)).sum()
        empty.backward()
        assert float(empty.detach()) == 0.0
    assert torch.autograd.gradcheck(lambda a, b: compute_bradley_terry_loss(a, b, m), (c, r))
    assert torch.autograd.gradcheck(compute_centering_loss, (c, r))
    torch.testing.assert_close(compute_centering_loss(c, r), compute_centering_loss(r, c))


def test_half_precision_is_lifted_to_fp32() -> None:
    x = torch.tensor([-1.0, -2.0], dtype=torch.bfloat16)
    assert compute_nll(x).dtype == torch.float32
    assert compute_bradley_terry_loss(x, x).dtype == torch.float32
    assert compute_centering_loss(x, x).dtype == torch.float32

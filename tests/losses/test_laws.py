"""Laws that every registered loss obeys, in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from burnish.config.registry import LOSS_TYPES
from burnish.config.stages import DpoSettings
from burnish.losses.mix import build_mix
from burnish.losses.pairs import PairLoss, Pairs
from burnish.losses.reward import compute_bradley_terry_loss, compute_centering_loss
from burnish.losses.sft import compute_nll

FIELDS = ("chosen", "rejected", "chosen_ratio", "rejected_ratio", "chosen_tokens", "rejected_tokens")
CASES = [(name, 0.0) for name in LOSS_TYPES] + [("sigmoid", 0.2)]


def build_loss(name: str, smoothing: float = 0.0, beta: float = 0.3) -> Callable[[Pairs], PairLoss]:
    (found,) = build_mix(name, None, DpoSettings(loss_type=name, beta=beta, label_smoothing=smoothing))
    return found.compute


def draw_pairs(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Pairs:
    rng = np.random.default_rng(seed)
    tensors = [torch.from_numpy(rng.normal(0, 4, n)).to(dtype).requires_grad_() for _ in range(4)]
    lengths = [torch.from_numpy(rng.integers(1, 30, n)).to(dtype) for _ in range(2)]
    return Pairs(*tensors, *lengths)


def take(pairs: Pairs, rows: slice) -> Pairs:
    return Pairs(*(getattr(pairs, f)[rows] for f in FIELDS))


def swap(pairs: Pairs) -> Pairs:
    p = pairs
    return Pairs(p.rejected, p.chosen, p.rejected_ratio, p.chosen_ratio, p.rejected_tokens, p.chosen_tokens)


def gradient(total: Tensor, pairs: Pairs) -> list[Tensor]:
    inputs = [getattr(pairs, f) for f in FIELDS[:4]]
    found = torch.autograd.grad(total, inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for g, x in zip(found, inputs, strict=True)]


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_doubled_data_double_the_sum_and_leave_the_mean(name: str, smoothing: float) -> None:
    loss, pairs = build_loss(name, smoothing), draw_pairs(5)
    twice = Pairs(*(torch.cat([getattr(pairs, f).detach()] * 2) for f in FIELDS))
    assert loss(twice).loss.sum().item() == pytest.approx(2 * loss(pairs).loss.sum().item(), rel=1e-13)


@pytest.mark.parametrize(("name", "smoothing"), CASES)
@settings(max_examples=20, deadline=None)
@given(cuts=st.lists(st.integers(0, 9), max_size=6), seed=st.integers(0, 50))
def test_any_split_adds_up_in_value_and_gradient(name: str, smoothing: float, cuts: list[int], seed: int) -> None:
    loss, pairs = build_loss(name, smoothing), draw_pairs(9, seed)
    edges = [0, *sorted(cuts), 9]  # empty parts and all
    parts = [loss(take(pairs, slice(a, b))).loss.sum() for a, b in pairwise(edges)]
    whole, split = loss(pairs).loss.sum(), torch.stack(parts).sum()
    assert split.item() == pytest.approx(whole.item(), rel=1e-12)
    for a, b in zip(gradient(whole, pairs), gradient(split, pairs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_nothing_can_run_backward(name: str, smoothing: float) -> None:
    pairs = draw_pairs(0)
    total = build_loss(name, smoothing)(pairs).loss.sum()
    assert float(total.detach()) == 0.0
    total.backward()
    assert pairs.chosen_ratio.grad is not None and pairs.chosen_ratio.grad.shape == (0,)


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_swapped_pairs_negate_the_margin(name: str, smoothing: float) -> None:
    loss, pairs = build_loss(name, smoothing), draw_pairs(7)
    there, back = loss(pairs), loss(swap(pairs))
    torch.testing.assert_close(there.margin, -back.margin, rtol=0, atol=0)
    # The better ordering of each pair has the smaller loss; IPO also punishes a margin beyond its aim.
    aim = 1 / (2 * 0.3) if name == "ipo" else math.inf
    inside = there.margin.abs() < aim
    assert inside.any()
    assert bool((((there.loss - back.loss) * there.margin)[inside] <= 0).all())


@pytest.mark.parametrize(
    ("name", "smoothing", "start"), [("sigmoid", 0.0, math.log(2)), ("sigmoid", 0.2, math.log(2)), ("hinge", 0.0, 1.0),
                                     ("ipo", 0.0, (1 / 0.6) ** 2)]
)  # fmt: skip
def test_the_analytic_start(name: str, smoothing: float, start: float) -> None:
    """Policy = reference: M = 0, whatever the log-probs are."""
    zero = torch.zeros(3, dtype=torch.float64)
    pairs = Pairs(zero - 20, zero - 5, zero, zero, zero + 7, zero + 3)
    found = build_loss(name, smoothing)(pairs)
    assert found.loss.tolist() == pytest.approx([start] * 3, rel=1e-15)
    assert found.margin.tolist() == [0.0] * 3


def test_every_registered_loss_has_an_analytic_start() -> None:
    assert set(LOSS_TYPES) == {"sigmoid", "hinge", "ipo"}, "add the new loss to test_the_analytic_start"


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_at_the_start_the_gradient_lifts_chosen_and_lowers_rejected(name: str, smoothing: float) -> None:
    ratio = [torch.zeros(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    ones = torch.ones(4, dtype=torch.float64)
    pairs = Pairs(-ones, -ones, *ratio, 3 * ones, 5 * ones)
    build_loss(name, smoothing)(pairs).loss.sum().backward()
    chosen, rejected = ratio[0].grad, ratio[1].grad
    assert chosen is not None and rejected is not None
    assert bool((chosen < 0).all()) and bool((rejected > 0).all())


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_gradcheck(name: str, smoothing: float) -> None:
    loss, pairs = build_loss(name, smoothing), draw_pairs(6, seed=3)
    inputs = tuple(getattr(pairs, f) for f in FIELDS)
    assert torch.autograd.gradcheck(lambda *x: loss(Pairs(*x)).loss, inputs)


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_types_are_kept_from_fp32_on(name: str, smoothing: float) -> None:
    for dtype in (torch.float32, torch.float64):
        found = build_loss(name, smoothing)(draw_pairs(3, dtype=dtype))
        assert found.loss.dtype == found.chosen_reward.dtype == found.rejected_reward.dtype == dtype


@pytest.mark.parametrize(("name", "smoothing"), CASES)
def test_huge_margins_stay_finite(name: str, smoothing: float) -> None:
    big = torch.tensor([4000.0, -4000.0], requires_grad=True)
    pairs = Pairs(-big.abs(), -big.abs(), big, -big, torch.ones(2), torch.ones(2))
    found = build_loss(name, smoothing)(pairs).loss
    found.sum().backward()
    assert bool(torch.isfinite(found).all()) and big.grad is not None and bool(torch.isfinite(big.grad).all())


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

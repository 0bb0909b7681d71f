"""Intervals against known values and their own promise (coverage), tests against enumeration and scipy."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from burnish.evals.intervals import (
    compare_marks,
    compute_mcnemar,
    compute_mean,
    compute_ratio,
    compute_sign_flip,
    compute_sign_test,
    compute_wilson,
)


@pytest.mark.parametrize(("k", "n"), [(0, 10), (3, 10), (10, 10), (81, 263), (1, 400)])
def test_proportions_agree_with_scipy(k: int, n: int) -> None:
    result = stats.binomtest(k, n)
    found, want = compute_wilson(k, n), result.proportion_ci(0.95, method="wilson")
    assert (found.low, found.high) == pytest.approx((want.low, want.high), abs=1e-12)
    assert found.low <= k / n <= found.high and found.n == n


def test_wilson_by_hand() -> None:
    """81 of 263 at 95 %: 0.2553 … 0.3662 (Newcombe 1998, table I)."""
    found = compute_wilson(81, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_wilson_covers_as_often_as_promised(p: float) -> None:
    n = 60
    weights = stats.binom.pmf(np.arange(n + 1), n, p)
    inside = [compute_wilson(k, n).low <= p <= compute_wilson(k, n).high for k in range(n + 1)]
    assert 0.92 <= float(weights[inside].sum()) <= 0.98


def test_a_mean_has_students_interval() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    want = stats.t.interval(0.9, 3, loc=4.0, scale=stats.sem(values))
    found = compute_mean(values, 0.9)
    assert (found.value, found.low, found.high) == pytest.approx((4.0, *want))
    assert compute_mean(np.array([3.0])).high == math.inf


def test_a_ratio_is_over_the_sum_of_counts_and_takes_texts_as_units() -> None:
    """1 token at 5 nats and 4 tokens of 1: 9/5. Tokens of a text that are all alike must not narrow the interval."""
    found = compute_ratio(np.array([5.0, 4.0]), np.array([1.0, 4.0]))
    assert found.value == pytest.approx(1.8)
    rng = np.random.default_rng(0)
    level = rng.normal(2, 1, 50)
    short = compute_ratio(level, np.ones(50))
    long = compute_ratio(level * 1000, np.full(50, 1000.0))
    assert (short.low, short.high) == pytest.approx((long.low, long.high))


def test_a_ratio_covers_as_often_as_promised() -> None:
    rng = np.random.default_rng(1)
    hits, runs = 0, 600
    for _ in range(runs):
        counts = rng.integers(1, 40, 80).astype(float)
        sums = counts * rng.normal(3.0, 1.0, 80)
        found = compute_ratio(sums, counts)
        hits += found.low <= 3.0 <= found.high
    assert 0.92 <= hits / runs <= 0.98


def enumerate_sign_flip(d: list[float]) -> float:
    """The permutation test by brute force."""
    observed = abs(sum(d))
    flips = list(itertools.product((1, -1), repeat=len(d)))
    return sum(abs(sum(s * x for s, x in zip(f, d, strict=True))) >= observed - 1e-12 for f in flips) / len(flips)


@pytest.mark.parametrize("d", [[1.0], [1.0, 2.0, -0.5], [3.0, 1.0, 1.0, 1.0, -2.0, 0.25], [-1.0] * 8])
def test_sign_flip_equals_enumeration(d: list[float]) -> None:
    assert compute_sign_flip(np.array([*d, 0.0, 0.0])).p_value == pytest.approx(enumerate_sign_flip(d))


def test_sign_flip_of_many_is_seeded_and_calibrated() -> None:
    rng = np.random.default_rng(3)
    d = rng.normal(0.1, 1, 200)
    found = compute_sign_flip(d, seed=5)
    assert found == compute_sign_flip(d, seed=5)
    assert found.p_value == pytest.approx(float(stats.ttest_1samp(d, 0).pvalue), abs=0.01)
    assert found.test == "sign-flip" and found.low <= found.difference <= found.high
    nulls = [compute_sign_flip(rng.normal(0, 1, 30), draws=400, seed=i).p_value for i in range(300)]
    assert 0.02 <= float(np.mean(np.array(nulls) <= 0.05)) <= 0.09
    assert compute_sign_flip(np.zeros(5)).p_value == 1.0


def test_mcnemar_by_hand() -> None:
    """12 both, 9 only a, 2 only b, 21 neither: p = 2 · Σ_{k ≤ 2} C(11, k) / 2¹¹ = 0.06543; difference 7/44."""
    a = np.array([True] * 21 + [False] * 23)
    b = np.array([True] * 12 + [False] * 9 + [True] * 2 + [False] * 21)
    found = compute_mcnemar(a, b)
    assert found.p_value == pytest.approx(2 * (1 + 11 + 55) / 2**11)
    assert found.difference == pytest.approx(7 / 44) and found.n == 44
    assert found.low < 7 / 44 < found.high
    back = compute_mcnemar(b, a)
    assert (back.low, back.high) == pytest.approx((-found.high, -found.low))


def test_the_paired_interval_covers_as_often_as_promised() -> None:
    rng = np.random.default_rng(4)
    hits, runs = 0, 500
    for _ in range(runs):
        shared = rng.random(60)
        a, b = shared < 0.6, np.where(rng.random(60) < 0.7, shared, rng.random(60)) < 0.45
        found = compute_mcnemar(a, b)
        hits += found.low <= 0.15 <= found.high
    assert 0.92 <= hits / runs <= 0.99


def test_equal_marks_differ_by_nothing_but_keep_an_interval() -> None:
    marks = np.array([1.0, 0.0, 1.0, 1.0])
    found = compare_marks(marks, marks)
    assert (found.difference, found.p_value, found.test) == (0.0, 1.0, "mcnemar")
    assert found.low <= 0.0 <= found.high
    assert compare_marks(np.array([0.5, 1.0]), np.array([0.0, 1.0])).test == "sign-flip"


def test_the_sign_test_leaves_ties_out() -> None:
    assert compute_sign_test(8, 2) == pytest.approx(float(stats.binomtest(8, 10).pvalue))
    assert compute_sign_test(0, 0) == 1.0


@pytest.mark.parametrize(
    "call",
    [
        lambda: compute_wilson(1, 0),
        lambda: compute_wilson(5, 4),
        lambda: compute_ratio(np.array([]), np.array([])),
        lambda: compute_mcnemar(np.array([True]), np.array([True, False])),
    ],
)
def test_nothing_to_measure_is_an_error(call) -> None:
    with pytest.raises(ValueError):
        call()

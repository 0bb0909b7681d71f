"""Confidence intervals and paired tests for the figures of an evaluation (numpy and scipy only).

Every figure that burnish prints has an interval, and two models are compared on the same items: a paired test sees
differences that two separate intervals hide.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A point estimate with its confidence limits."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """A paired difference a − b with its limits and a two-sided p-value.

    Attributes:
        test: What the p-value comes from: "mcnemar", "sign", "sign-flip".
        n: Items that both have.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    n: int


def finite_or_none(value: float) -> float | None:
    """A limit as JSON holds it: None where there is none (a single value has infinite limits)."""
    return float(value) if np.isfinite(value) else None


def compute_wilson(successes: float, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval of a proportion (Wilson 1927).

    Args:
        successes: How many of n; halves (ties) are allowed and make the interval slightly too wide, never too narrow,
            because a value in {0, ½, 1} varies less than a coin of the same mean.
        n: Items.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: n is 0, or successes lie outside [0, n].
    """
    if n < 1 or not 0 <= successes <= n:
        raise ValueError(f"{successes} successes of {n}")
    z = float(stats.norm.ppf((1 + confidence) / 2))
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * float(np.sqrt(p * (1 - p) / n + z * z / (4 * n * n)))
    return Interval(p, 0.0 if successes == 0 else centre - half, 1.0 if successes == n else centre + half, n)


def compute_mean(values: Numbers, confidence: float = 0.95) -> Interval:
    """The mean of independent values with Student's interval; limits are infinite for a single value.

    Raises:
        ValueError: No values.
    """
    return compute_ratio(values, np.ones(len(values)), confidence)


def compute_ratio(sums: Numbers, counts: Numbers, confidence: float = 0.95) -> Interval:
    """Σ sums / Σ counts over independent items, e.g. nats a token over texts of different lengths.

    The standard error is that of the ratio estimator: residuals sum_i − R · count_i, so that tokens of one text are not
    taken as independent (Cochran, Sampling Techniques, 1977, section 6.3).

    Args:
        sums: (n,) sum of each item.
        counts: (n,) count of each item.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: No items, or no counts.
    """
    n, total = len(sums), float(np.sum(counts))
    if n == 0 or total <= 0:
        raise ValueError("a mean of nothing")
    ratio = float(np.sum(sums)) / total
    if n == 1:
        return Interval(ratio, -np.inf, np.inf, 1)
    residuals = np.asarray(sums, np.float64) - ratio * np.asarray(counts, np.float64)
    error = float(np.sqrt(np.sum(residuals**2) * n / (n - 1))) / total
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * error
    return Interval(ratio, ratio - half, ratio + half, n)


def compute_mcnemar(a: NDArray[np.bool_], b: NDArray[np.bool_], confidence: float = 0.95) -> Comparison:
    """Two models on the same yes/no items: exact McNemar test and Newcombe's interval of the difference.

    Sources: McNemar 1947 in its exact binomial form; Newcombe 1998, "Improved confidence intervals for the difference
    between binomial proportions based on paired data", method 10.

    Args:
        a: (n,) whether model a got the item right.
        b: (n,) whether model b did.
        confidence: Coverage in (0, 1).

    Raises:
        ValueError: Different lengths, or no items.
    """
    if len(a) != len(b) or len(a) == 0:
        raise ValueError(f"paired items: {len(a)} and {len(b)}")
    a, b, n = np.asarray(a, bool), np.asarray(b, bool), len(a)
    both, only_a, only_b = int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum())
    neither = n - both - only_a - only_b
    p_value = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    first, second = compute_wilson(int(a.sum()), n, confidence), compute_wilson(int(b.sum()), n, confidence)
    product = (both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither)
    cross = both * neither - only_a * only_b
    if cross > 0:
        cross = max(cross - n / 2, 0.0)
    phi = cross / float(np.sqrt(product)) if product else 0.0
    below_a, above_a = first.value - first.low, first.high - first.value
    below_b, above_b = second.value - second.low, second.high - second.value
    down = np.sqrt(max(below_a**2 - 2 * phi * below_a * above_b + above_b**2, 0.0))
    up = np.sqrt(max(above_a**2 - 2 * phi * above_a * below_b + below_b**2, 0.0))
    difference = first.value - second.value
    return Comparison(difference, float(difference - down), float(difference + up), p_value, "mcnemar", n)


def compute_sign_test(wins: int, losses: int) -> float:
    """Two-sided exact sign test; ties are left out. 1 if nothing is left."""
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def compute_sign_flip(
    differences: Numbers, counts: Numbers | None = None, *, confidence: float = 0.95, draws: int = 20_000, seed: int = 0
) -> Comparison:
    """Paired differences: the permutation test that flips signs, and Student's interval of their mean (or ratio).

    Under the hypothesis of no difference every d_i is as likely as −d_i (Fisher 1935). Up to 16 differences that are
    not 0, all flips are enumerated; else `draws` of them are drawn with the seed and p = (1 + hits) / (1 + draws).

    Args:
        differences: (n,) a − b of each item.
        counts: (n,) weights of a ratio, e.g. tokens; None = a plain mean.
        confidence: Coverage in (0, 1).
        draws: Number of random flips.
        seed: Seed of the flips.

    Raises:
        ValueError: No items.
    """
    d = np.asarray(differences, np.float64)
    interval = compute_ratio(d, np.ones(len(d)) if counts is None else counts, confidence)
    moving = d[d != 0]
    observed = abs(float(moving.sum())) * (1 - 1e-12)
    if len(moving) == 0:
        p_value = 1.0
    elif len(moving) <= 16:
        flips = (np.arange(2 ** len(moving))[:, None] >> np.arange(len(moving))) & 1
        p_value = float(np.mean(np.abs((1 - 2 * flips) @ moving) >= observed))
    else:
        rng = np.random.default_rng([seed, len(moving)])
        hits = 0
        for k in _chunks(draws):
            flips = rng.integers(0, 2, (k, len(moving)), dtype=np.int8)
            hits += int(np.sum(np.abs(moving.sum() - 2 * (flips @ moving)) >= observed))
        p_value = (1 + hits) / (1 + draws)
    return Comparison(interval.value, interval.low, interval.high, p_value, "sign-flip", len(d))


def compare_marks(a: Numbers, b: Numbers, *, confidence: float = 0.95, seed: int = 0) -> Comparison:
    """Marks in [0, 1] of two models on the same items: McNemar if all are 0 or 1, else (ties: ½) the sign-flip test."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if np.isin(a, (0, 1)).all() and np.isin(b, (0, 1)).all():
        return compute_mcnemar(a == 1, b == 1, confidence)
    return compute_sign_flip(a - b, confidence=confidence, seed=seed)


def _chunks(total: int, size: int = 1000) -> list[int]:
    """total as a list of sizes of at most `size`: bounds the memory of resampling."""
    return [min(size, total - start) for start in range(0, total, size)]

"""Evaluations side by side: which numbers stand behind a figure, and the paired test over runs and items."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from burnish.evals.items import Items, compare_items, read_items

ROWS = [
    {"task": "loss", "subject": "p", "id": "a", "nll": 6.0, "tokens": 3.0},
    {"task": "loss", "subject": "p", "id": "b", "nll": 5.0, "tokens": 5.0},
    {"task": "preferences", "subject": "p", "id": "a", "chosen": -2.0, "rejected": -3.0, "margin": -0.5},
    {"task": "preferences", "subject": "p", "id": "b", "chosen": -2.0, "rejected": -2.0, "margin": 0.0},
    {"task": "preferences", "subject": "rm", "id": "a", "chosen": 1.0, "rejected": 3.0},
    {"task": "pocket/maths", "subject": "p", "id": "a", "mark": True, "end": "eos"},
    {"task": "pocket/maths", "subject": "p", "id": "b", "mark": False, "end": "limit"},
    {"task": "win_rate", "subject": "p", "id": "a", "score": 1.25},
]


@pytest.mark.parametrize(
    ("subject", "task", "metric", "values"),
    [
        ("p", "loss", "loss", {"a": 6.0, "b": 5.0}),
        ("p", "preferences", "ranking_accuracy", {"a": 1.0, "b": 0.5}),
        ("p", "preferences", "accuracy", {"a": 0.0, "b": 0.5}),
        ("p", "preferences", "margin", {"a": -0.5, "b": 0.0}),
        ("rm", "preferences", "accuracy", {"a": 0.0}),
        ("rm", "preferences", "margin", {"a": -2.0}),
        ("p", "pocket/maths", "accuracy", {"a": 1.0, "b": 0.0}),
        ("p", "pocket/maths", "ended_share", {"a": 1.0, "b": 0.0}),
        ("p", "win_rate", "judge_score", {"a": 1.25}),
        ("p", "pocket/maths", "answered_share", None),
        ("p", "preferences", "vs_base/accuracy", None),
        ("other", "loss", "loss", None),
    ],
)
def test_the_numbers_behind_a_figure(subject, task, metric, values):
    found = read_items(ROWS, subject, task, metric)
    assert (found.values if found else None) == values
    assert found is None or bool(found.weights) == (metric == "loss")


def marks(*values: float, first: int = 0) -> Items:
    return Items({f"i{n}": v for n, v in enumerate(values, first)}, {})


def test_one_run_each_of_yes_and_no_is_mcnemar():
    found = compare_items([(marks(1, 1, 1, 0, 0), marks(0, 0, 0, 0, 1))])
    assert found is not None
    assert found.test == "mcnemar" and found.n == 5
    assert found.difference == pytest.approx(0.4)
    assert found.p_value == pytest.approx(stats.binomtest(3, 4).pvalue)


def test_several_runs_count_an_item_once():
    """Means over runs, then the exact sign-flip over items: enumerated here."""
    pairs = [(marks(1, 1, 0, 1), marks(0, 0, 0, 1)), (marks(1, 0, 1, 1), marks(0, 0, 0, 0))]
    gaps = np.array([1.0, 0.5, 0.5, 0.5])
    sums = [abs(gaps @ [1 - 2 * (n >> k & 1) for k in range(4)]) for n in range(16)]
    found = compare_items(pairs)
    assert found is not None
    assert (found.test, found.n) == ("sign-flip", 4)
    assert found.p_value == pytest.approx(np.mean(np.array(sums) >= gaps.sum() - 1e-12))
    half = stats.t.ppf(0.975, 3) * gaps.std(ddof=1) / math.sqrt(4)
    assert (found.low, found.high) == pytest.approx((gaps.mean() - half, gaps.mean() + half))


def test_runs_with_other_items_are_paired_run_by_run():
    found = compare_items([(marks(1, 1), marks(0, 0)), (marks(1, 0, first=2), marks(0, 1, first=2))])
    assert found is not None
    assert found.n == 4 and found.difference == pytest.approx(0.25 + 0.25 + 0.25 - 0.25)


def test_a_ratio_keeps_its_weights_and_drops_what_is_counted_otherwise():
    a = Items({"a": 6.0, "b": 5.0, "c": 1.0}, {"a": 3.0, "b": 5.0, "c": 2.0})
    b = Items({"a": 3.0, "b": 6.0, "c": 1.0}, {"a": 3.0, "b": 5.0, "c": 4.0})
    found = compare_items([(a, b)])
    assert found is not None
    assert found.n == 2 and found.difference == pytest.approx((3 - 1) / 8)


def test_nothing_in_common_is_no_comparison():
    assert compare_items([(marks(1), marks(1, first=7))]) is None
    assert compare_items([]) is None

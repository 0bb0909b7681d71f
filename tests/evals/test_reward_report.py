"""Every statistic of a reward report, against numpy and scipy, and where it does not exist."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from scipy import stats

from burnish.evals.reward_report import compute_reward_report


def test_s2_08_every_statistic_by_hand() -> None:
    """Differences 1, −3, 0, 8, 0."""
    chosen, rejected = np.array([2.0, 0.0, 1.5, 4.0, 0.0]), np.array([1.0, 3.0, 1.5, -4.0, 0.0])
    report = compute_reward_report(chosen, rejected)
    assert report["pairs"] == 5
    assert report["accuracy"]["value"] == 0.6, "two wins and two halves"
    assert report["differences"] == {"positive": 2, "negative": 1, "zero": 2, "positive_ratio": 0.4}
    for side, values in (("chosen", chosen), ("rejected", rejected), ("difference", chosen - rejected)):
        found = report[side]
        q = np.percentile(values, [25, 50, 75])
        want = {
            "mean": values.mean(),
            "std": values.std(ddof=1),
            "min": values.min(),
            "max": values.max(),
            "q1": q[0],
            "median": q[1],
            "q3": q[2],
        }
        assert {k: found[k] for k in want} == pytest.approx(want)
    assert report["log_loss"] == pytest.approx(np.mean([math.log1p(math.exp(-d)) for d in (1, -3, 0, 8, 0)]))
    for kind, test in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        want = test(chosen, rejected)
        assert (report[kind]["r"], report[kind]["p_value"]) == pytest.approx((want.statistic, want.pvalue))
    assert json.loads(json.dumps(report, allow_nan=False)) == report


def test_length_bias_and_sources() -> None:
    lengths = np.array([10.0, 20.0, 5.0, 7.0])
    difference = np.array([1.0, 2.0, -1.0, -2.0])  # longer answers always win
    report = compute_reward_report(
        difference,
        np.zeros(4),
        chosen_tokens=lengths,
        rejected_tokens=lengths - difference * 3,
        sources=["a", "a", "b", "b"],
    )
    assert report["length_bias"]["r"] == pytest.approx(1.0) and report["length_bias"]["prefers_longer"] == 1.0
    assert report["by_source"] == {"a": {"accuracy": 1.0, "pairs": 2}, "b": {"accuracy": 0.0, "pairs": 2}}


def test_what_does_not_exist_is_none_never_nan() -> None:
    report = compute_reward_report(
        np.array([1.0]), np.array([1.0]), chosen_tokens=np.ones(1), rejected_tokens=np.ones(1)
    )
    assert report["chosen"]["std"] is None and report["difference"]["low"] is None
    assert report["pearson"] == {"r": None, "p_value": None}
    assert report["length_bias"]["prefers_longer"] is None
    constant = compute_reward_report(np.ones(9), np.arange(9.0))
    assert constant["spearman"] == {"r": None, "p_value": None}
    json.dumps([report, constant], allow_nan=False)
    with pytest.raises(ValueError, match="0 chosen"):
        compute_reward_report(np.array([]), np.array([]))

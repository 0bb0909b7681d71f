"""The report on a reward model: everything its scores of held-out pairs tell (numpy and scipy only)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import stats

from burnish.evals.intervals import Numbers, compute_mean, compute_wilson, finite_or_none


def compute_reward_report(
    chosen: Numbers,
    rejected: Numbers,
    *,
    chosen_tokens: Numbers | None = None,
    rejected_tokens: Numbers | None = None,
    sources: Sequence[str] | None = None,
    confidence: float = 0.95,
) -> dict[str, Any]:
    """Statistics of a reward model on n held-out pairs; JSON values only, None where a figure does not exist.

    Args:
        chosen: (n,) scores of the chosen completions.
        rejected: (n,) scores of the rejected completions.
        chosen_tokens: (n,) lengths of the chosen completions, for the report on length bias.
        rejected_tokens: (n,) lengths of the rejected ones.
        sources: n names; the accuracy is then also split by them.
        confidence: Coverage of the intervals.

    Returns:
        pairs; accuracy (a tie counts ½) with limits; counts of positive, negative and zero differences and the share
        of positive ones; log_loss (mean −log σ(difference), nats); chosen, rejected and difference (mean, std with
        n − 1, min, quartiles, max); the difference's limits; Pearson and Spearman correlation of chosen and rejected
        scores with p-values; length_bias (Spearman correlation of score and length differences); by_source.

    Raises:
        ValueError: No pairs, or lists of different lengths.
    """
    chosen, rejected = np.asarray(chosen, np.float64), np.asarray(rejected, np.float64)
    n = len(chosen)
    if n == 0 or len(rejected) != n:
        raise ValueError(f"a report on {n} chosen and {len(rejected)} rejected scores")
    difference = chosen - rejected
    positive, negative = int((difference > 0).sum()), int((difference < 0).sum())
    zero = n - positive - negative
    accuracy = compute_wilson(positive + zero / 2, n, confidence)
    mean = compute_mean(difference, confidence)
    report: dict[str, Any] = {
        "pairs": n,
        "accuracy": {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high},
        "differences": {"positive": positive, "negative": negative, "zero": zero, "positive_ratio": positive / n},
        "log_loss": float(np.mean(np.logaddexp(0.0, -difference))),
        "chosen": _describe(chosen),
        "rejected": _describe(rejected),
        "difference": _describe(difference) | {"low": finite_or_none(mean.low), "high": finite_or_none(mean.high)},
        "pearson": _correlate(chosen, rejected, "pearson"),
        "spearman": _correlate(chosen, rejected, "spearman"),
    }
    if chosen_tokens is not None and rejected_tokens is not None:
        lengths = np.asarray(chosen_tokens, np.float64) - np.asarray(rejected_tokens, np.float64)
        longer = (np.sign(lengths) == np.sign(difference))[lengths != 0]
        report["length_bias"] = _correlate(difference, lengths, "spearman") | {
            "prefers_longer": float(longer.mean()) if len(longer) else None,
            "pairs_of_unequal_length": len(longer),
        }
    if sources is not None and len(set(sources)) > 1:
        report["by_source"] = {s: _accuracy_of(difference[np.array(sources) == s]) for s in sorted(set(sources))}
    return report


def _describe(values: Numbers) -> dict[str, float | None]:
    """Mean, spread, extremes and quartiles; the standard deviation is that of a sample (n − 1), None for one value."""
    low, q1, median, q3, high = (float(q) for q in np.quantile(values, [0, 0.25, 0.5, 0.75, 1]))
    std = float(np.std(values, ddof=1)) if len(values) > 1 else None
    return {"mean": float(np.mean(values)), "std": std, "min": low, "q1": q1, "median": median, "q3": q3, "max": high}


def _correlate(a: Numbers, b: Numbers, kind: str) -> dict[str, float | None]:
    """Correlation with its two-sided p-value; None for fewer than 3 items or where one side is constant."""
    if len(a) < 3 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return {"r": None, "p_value": None}
    found: Any = stats.pearsonr(a, b) if kind == "pearson" else stats.spearmanr(a, b)
    return {"r": finite_or_none(float(found.statistic)), "p_value": finite_or_none(float(found.pvalue))}


def _accuracy_of(difference: Numbers) -> dict[str, float | int]:
    return {"accuracy": float(np.mean((np.sign(difference) + 1) / 2)), "pairs": len(difference)}

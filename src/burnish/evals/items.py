"""Evaluations of several runs side by side: the numbers behind a figure, and a test on the items that all have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from burnish.evals.intervals import Comparison, compare_marks, compute_sign_flip

Numbers = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Items:
    """What a figure is the mean of.

    Attributes:
        values: Id of an item → its value.
        weights: Id → its weight where the figure is a ratio (tokens of a text); {} for a plain mean.
    """

    values: Mapping[str, float]
    weights: Mapping[str, float]


def read_items(rows: Iterable[Mapping[str, Any]], subject: str, task: str, metric: str) -> Items | None:
    """The items of one subject's figure from the rows of items.jsonl; None where they do not hold it."""
    values: dict[str, float] = {}
    weights: dict[str, float] = {}
    for row in rows:
        if row.get("subject") != subject or row.get("task") != task:
            continue
        value = _read_value(row, task, metric)
        if value is None:
            return None
        values[str(row["id"])] = value
        if metric == "loss":
            weights[str(row["id"])] = float(row["tokens"])
    return Items(values, weights) if values else None


def _read_value(row: Mapping[str, Any], task: str, metric: str) -> float | None:
    if task == "loss":
        return float(row["nll"]) if metric == "loss" else None
    if task == "preferences":
        gap = row["chosen"] - row["rejected"]
        if metric == "ranking_accuracy":
            return _mark(gap)
        margin = row.get("margin", gap)  # a reward model's scores are margins as they are
        return {"accuracy": _mark(margin), "margin": float(margin)}.get(metric)
    if task == "win_rate":
        return float(row["score"]) if metric == "judge_score" else None
    found = {"accuracy": row.get("mark"), "ended_share": row.get("end") == "eos"}.get(metric)
    return None if found is None else float(found)


def _mark(difference: float) -> float:
    """1 where positive, ½ where exactly 0, else 0."""
    return 0.5 if difference == 0 else float(difference > 0)


def compare_items(
    pairs: Sequence[tuple[Items, Items]], *, confidence: float = 0.95, seed: int = 0
) -> Comparison | None:
    """The difference first − second on the items that both have; None if there are none.

    Several pairs are runs (seeds) of the same two things: an item's difference is its mean over the pairs that have it,
    so an item counts once however many runs answered it. One pair with values 0 and 1: McNemar's exact test; otherwise
    the sign-flip test. The test takes the items as the sample and these runs as they are; whether other seeds would do
    the same is told by the spread over seeds, not by this p-value.
    """
    gaps: dict[str, list[float]] = {}
    weights: dict[str, float] = {}
    for a, b in pairs:
        for name, value in a.values.items():
            if name in b.values and a.weights.get(name) == b.weights.get(name):  # another tokenizer counts otherwise
                gaps.setdefault(name, []).append(value - b.values[name])
                weights[name] = a.weights.get(name, 1.0)
    if not gaps:
        return None
    if len(pairs) == 1 and not pairs[0][0].weights:
        a, b = (np.array([side.values[name] for name in gaps]) for side in pairs[0])
        if bool(np.isin([a, b], (0, 0.5, 1)).all()):
            return compare_marks(a, b, confidence=confidence, seed=seed)
    means = np.array([sum(found) / len(found) for found in gaps.values()], np.float64)
    return compute_sign_flip(means, np.array(list(weights.values())), confidence=confidence, seed=seed)

"""What an evaluation found, ordered for reading: a block for each task and metric, and what may be said of it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from burnish.report.numbers import show_difference, show_interval, show_value
from burnish.report.read import as_number, as_rows

ALPHA = 0.05
_TESTS = {
    "mcnemar": "McNemar's exact test",
    "mcnemar exact": "McNemar's exact test",
    "paired bootstrap": "paired bootstrap",
    "sign": "exact sign test",
    "sign-flip": "paired sign-flip test",
}


@dataclass(frozen=True)
class Figure:
    """One subject's value of a metric with its 95 % limits."""

    subject: str
    value: float | None
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class Change:
    """From subject `a` to subject `b`, on the same items: difference is b − a."""

    task: str
    metric: str
    a: str
    b: str
    difference: float
    low: float | None
    high: float | None
    p_value: float | None
    test: str
    higher_is_better: bool

    @property
    def significant(self) -> bool:
        """p below 0.05."""
        return self.p_value is not None and self.p_value < ALPHA

    @property
    def better(self) -> bool:
        """Whether the difference, significant or not, points the good way."""
        return (self.difference > 0) == self.higher_is_better

    @property
    def verdict(self) -> str:
        """better, worse, or "no clear change"."""
        if self.p_value is None:
            return "not tested"
        if not self.significant or self.difference == 0:
            return "no clear change"
        return "better" if self.better else "worse"


@dataclass
class Block:
    """All subjects' values of one metric on one task."""

    task: str
    metric: str
    higher_is_better: bool
    figures: list[Figure] = field(default_factory=list)
    changes: list[Change] = field(default_factory=list)


def read_blocks(figures: dict[str, Any]) -> list[Block]:
    """Blocks of an evaluation's figures, in the order of the table."""
    blocks: dict[tuple[str, str], Block] = {}
    for row in as_rows(figures.get("table")):
        key = (str(row.get("task", "")), str(row.get("metric", "")))
        block = blocks.setdefault(key, Block(*key, bool(row.get("higher_is_better", True))))
        n = as_number(row.get("n"))
        block.figures.append(
            Figure(
                str(row.get("subject", "")),
                as_number(row.get("value")),
                as_number(row.get("low")),
                as_number(row.get("high")),
                int(n) if n is not None and math.isfinite(n) else None,
            )
        )
    for row in as_rows(figures.get("comparisons")):
        block = blocks.get((str(row.get("task", "")), str(row.get("metric", ""))))
        change = _read_change(row, block) if block else None
        if block and change:
            block.changes.append(change)
    ordered = list(blocks.values())
    pairs = {pair: at for at, pair in enumerate(_pairs(ordered))}
    for block in ordered:
        block.changes.sort(key=lambda c: pairs[c.a, c.b])
    return ordered


def _read_change(row: dict[str, Any], block: Block) -> Change | None:
    difference = as_number(row.get("difference"))
    if difference is None:
        return None
    return Change(
        task=block.task,
        metric=block.metric,
        a=str(row.get("a", "")),
        b=str(row.get("b", "")),
        difference=difference,
        low=as_number(row.get("low")),
        high=as_number(row.get("high")),
        p_value=as_number(row.get("p_value")),
        test=_TESTS.get(str(row.get("test", "")).lower(), str(row.get("test", ""))),
        higher_is_better=block.higher_is_better,
    )


def say_task(task: str) -> str:
    """A task's name in words; names of data sets stay as they are."""
    return task if "/" in task else task.replace("_", " ")


def say_metric(metric: str) -> str:
    """A metric's name in words: `win rate against base` for `vs_base/win_rate`."""
    group, _, last = metric.rpartition("/")
    if group.startswith("vs_"):
        return f"{last.replace('_', ' ')} against {group.removeprefix('vs_')}"
    return metric.replace("_", " ")


def say_axis(axis: dict[str, Any], count: int) -> str:
    """An axis of a grid with its size: `2 models`, `5 forms of prefer`, `3 seeds`, `4 values of beta`."""
    label = str(axis.get("label"))
    if label == "model":
        return f"{count} model{'' if count == 1 else 's'}"
    if axis.get("seed"):
        return f"{count} seed{'' if count == 1 else 's'}"
    what = "form" if axis.get("stage") else "value"
    return f"{count} {what}{'' if count == 1 else 's'} of {label}"


_EXPLANATIONS = {
    ("loss", "loss"): "nats a token of held-out answers",
    ("preferences", "ranking_accuracy"): "share of pairs whose chosen answer the model finds likelier",
    ("preferences", "accuracy"): "share of pairs whose chosen answer has the higher reward (for policies: implicit)",
    ("preferences", "margin"): "mean reward of the chosen answer less the rejected one's",
    ("", "answered_share"): "share of answers from which a result could be read",
    ("", "ended_share"): "share of answers that ended by themselves within the limit",
    ("", "judge_score"): "mean score of the answers by the reward model",
    ("", "win_rate"): "share of prompts whose answer the reward model prefers; ties count half",
}


def explain_metric(task: str, metric: str) -> str:
    """What a figure measures, in a few words; "" for those that need none or are unknown."""
    last = metric.rpartition("/")[2]
    return _EXPLANATIONS.get((task, last)) or _EXPLANATIONS.get(("", last), "")


def find_reference(block: Block) -> float | None:
    """Where a block's reference line goes: one half for win rates, else the first row's value."""
    if block.metric.rpartition("/")[2] == "win_rate":
        return 0.5
    return block.figures[0].value if block.figures else None


def count_after_holm(changes: list[Change]) -> int:
    """How many comparisons stay significant when all of them are taken together (Holm 1979)."""
    values = sorted(c.p_value for c in changes if c.p_value is not None)
    kept = 0
    for rank, p in enumerate(values):
        if p > ALPHA / (len(values) - rank):
            break
        kept += 1
    return kept


def write_remarks(blocks: list[Block]) -> list[str]:
    """What may be said, a sentence for each pair of subjects, and a caution when many comparisons were made."""
    changes = [c for b in blocks for c in b.changes]
    remarks = [_say_pair(a, b, [c for c in changes if (c.a, c.b) == (a, b)]) for a, b in _pairs(blocks)]
    significant = [c for c in changes if c.significant]
    if len(changes) > 3 and significant:
        kept = count_after_holm(changes)
        many = f"{len(changes)} comparisons were made, and some would look clear by chance alone. "
        if kept == len(significant):
            remarks.append(f"{many}Taken together (Holm's correction), all {kept} clear ones stay clear.")
        else:
            remarks.append(
                f"{many}Taken together (Holm's correction), {kept} of {len(significant)} clear ones stay so."
            )
    return remarks


def _pairs(blocks: list[Block]) -> list[tuple[str, str]]:
    """Pairs that were compared, in the order of the subjects."""
    order: dict[str, int] = {}
    for block in blocks:
        for figure in block.figures:
            order.setdefault(figure.subject, len(order))
    pairs = {(c.a, c.b) for block in blocks for c in block.changes}
    last = len(order)
    return sorted(pairs, key=lambda p: (order.get(p[1], last), order.get(p[0], last), p))


def _say_pair(a: str, b: str, changes: list[Change]) -> str:
    parts = []
    for verdict, words in (
        ("better", "better on"),
        ("worse", "worse on"),
        ("no clear change", "no significant change on"),
        ("not tested", "not tested on"),
    ):
        found = [c for c in changes if c.verdict == verdict]
        if found:
            parts.append(f"{words} {', '.join(_say_change(c) for c in found)}")
    return f"{b} against {a}: {'; '.join(parts)}."


def _say_change(c: Change) -> str:
    metric = "" if c.metric == c.task else f"{say_metric(c.metric)} "
    return f"{say_task(c.task)} ({metric}{show_difference(c.metric, c.difference)})"


def show_figure(block: Block, figure: Figure) -> tuple[str, str]:
    """Value and interval of a figure as text."""
    return show_value(block.metric, figure.value), show_interval(block.metric, figure.low, figure.high)

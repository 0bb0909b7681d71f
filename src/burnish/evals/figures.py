"""The figures of an evaluation: a table of estimates with intervals, paired comparisons, and the items behind them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from burnish.artifacts.files import write_file, write_json_file
from burnish.artifacts.redact import redact_tree
from burnish.evals.intervals import Comparison, Interval, finite_or_none


@dataclass
class Figures:
    """Grows while the tasks run.

    Attributes:
        table: {"subject", "task", "metric", "value", "low", "high", "n", "higher_is_better"}.
        comparisons: {"task", "metric", "a", "b", "difference" (b − a), "low", "high", "p_value", "test", "n"}.
        reports: Reward subject → its report (see `reward_report`).
        items: One row for each item and subject: what the figures were made from.
        samples: {"task", "id", "prompt", "reference", "answers": {subject: text}, "marks": {subject: bool}}.
        notes: Sentences on what was left out, and why.
    """

    table: list[dict[str, Any]] = field(default_factory=list)
    comparisons: list[dict[str, Any]] = field(default_factory=list)
    reports: dict[str, Any] = field(default_factory=dict)
    items: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, subject: str, task: str, metric: str, interval: Interval, *, higher_is_better: bool = True) -> None:
        """Append an estimate."""
        self.table.append(
            {
                "subject": subject,
                "task": task,
                "metric": metric,
                "value": interval.value,
                "low": finite_or_none(interval.low),
                "high": finite_or_none(interval.high),
                "n": interval.n,
                "higher_is_better": higher_is_better,
            }
        )

    def compare(self, task: str, metric: str, a: str, b: str, found: Comparison) -> None:
        """Append a paired comparison from a to b: `found` holds b − a."""
        self.comparisons.append(
            {
                "task": task,
                "metric": metric,
                "a": a,
                "b": b,
                "difference": found.difference,
                "low": finite_or_none(found.low),
                "high": finite_or_none(found.high),
                "p_value": found.p_value,
                "test": found.test,
                "n": found.n,
            }
        )

    def note(self, text: str) -> None:
        """Append a sentence, once."""
        if text not in self.notes:
            self.notes.append(text)

    def to_json(self) -> dict[str, Any]:
        """What goes into stage.json."""
        out: dict[str, Any] = {"table": self.table, "comparisons": self.comparisons}
        if self.reports:
            out["reward_reports"] = self.reports
        if self.notes:
            out["notes"] = self.notes
        return out

    def save(self, folder: Path) -> None:
        """Write figures.json, items.jsonl and samples.jsonl."""
        folder.mkdir(parents=True, exist_ok=True)
        write_json_file(folder / "figures.json", redact_tree(self.to_json()))
        for name, rows in (("items.jsonl", self.items), ("samples.jsonl", self.samples)):
            lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in redact_tree(rows))
            text = "".join(lines)
            write_file(folder / name, text)


def align(a: Sequence[str], b: Sequence[str]) -> tuple[list[int], list[int]]:
    """Positions in a and in b of the ids that both have, in a's order.

    Models with different tokenizers may have left out different rows.
    """
    where = {name: i for i, name in enumerate(b)}
    common = [(i, where[name]) for i, name in enumerate(a) if name in where]
    return [i for i, _ in common], [j for _, j in common]


def to_plain(row: Mapping[str, Any]) -> dict[str, Any]:
    """numpy scalars as Python numbers."""
    return {k: v.item() if isinstance(v, np.generic) else v for k, v in row.items()}

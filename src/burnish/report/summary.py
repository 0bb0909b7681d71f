"""summary.json of a grid as types: whatever stands in the file, numbers are numbers and text is text."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from burnish.report.read import as_dict, as_list, as_number, as_rows


@dataclass(frozen=True)
class GridChange:
    """How a figure differs from the baseline's.

    Attributes:
        low, high: Limits over the items; seeds: limits over the seeds, where there are several.
        p_holm: p over the items, corrected over the rows of the metric (Holm 1979).
        verdict: "better", "worse" or "within noise".
    """

    difference: float | None
    low: float | None
    high: float | None
    seeds: tuple[float | None, float | None] | None
    p_holm: float | None
    verdict: str

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Limits over the seeds, else over the items."""
        return self.seeds or (self.low, self.high)


@dataclass(frozen=True)
class GridFigure:
    """One metric of one row; `single` are the values of its seeds."""

    task: str
    metric: str
    value: float | None
    low: float | None
    high: float | None
    runs: int
    n: int | None
    higher_is_better: bool
    single: list[float]
    change: GridChange | None


@dataclass(frozen=True)
class GridRow:
    """A model and method; `compared_with` is the place of the row that it is compared with."""

    name: str
    model: str
    subject: str
    values: dict[str, str]
    cells: list[str]
    baseline: bool
    compared_with: int | None
    figures: list[GridFigure]

    @property
    def varied(self) -> bool:
        """Whether it depends on an axis beside the model."""
        return bool(self.values.keys() - {"model"})


@dataclass(frozen=True)
class GridSummary:
    """All of summary.json; `metrics` are (task, metric, whether it is the task's main figure)."""

    rows: list[GridRow] = field(default_factory=list)
    metrics: list[tuple[str, str, bool]] = field(default_factory=list)
    cells: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def select(self, task: str, metric: str) -> list[tuple[GridRow, GridFigure]]:
        """Rows that have a metric, with it."""
        return [(row, f) for row in self.rows for f in row.figures if (f.task, f.metric) == (task, metric)]

    def find_base(self, row: GridRow) -> GridRow | None:
        """The row that one is compared with; the baseline itself for the baseline."""
        if row.baseline:
            return row
        at = row.compared_with
        return self.rows[at] if at is not None and 0 <= at < len(self.rows) else None


def read_summary(raw: Any) -> GridSummary:
    """The summary from JSON; what is missing or of another type is left out."""
    found = as_dict(raw)
    metrics = [(str(m.get("task")), str(m.get("metric")), m.get("main") is True) for m in as_rows(found.get("metrics"))]
    return GridSummary(
        [_read_row(row) for row in as_rows(found.get("rows"))],
        metrics,
        [cell for cell in as_rows(found.get("cells")) if isinstance(cell.get("name"), str)],
        [str(note) for note in as_list(found.get("notes"))],
    )


def _read_row(row: dict[str, Any]) -> GridRow:
    at = row.get("compared_with")
    return GridRow(
        str(row.get("name")),
        _text(row.get("model")),
        _text(row.get("subject")),
        {str(k): str(v) for k, v in as_dict(row.get("values")).items()},
        [str(c) for c in as_list(row.get("cells"))],
        row.get("baseline") is True,
        at if isinstance(at, int) else None,
        [_read_figure(f) for f in as_rows(row.get("figures"))],
    )


def _read_figure(f: dict[str, Any]) -> GridFigure:
    single = [x for x in map(_number, as_dict(f.get("values")).values()) if x is not None]
    change, n = as_dict(f.get("change")), _number(f.get("n"))
    return GridFigure(
        _text(f.get("task")),
        _text(f.get("metric")),
        _number(f.get("value")),
        _number(f.get("low")),
        _number(f.get("high")),
        int(_number(f.get("runs")) or 0),
        int(n) if n is not None else None,
        f.get("higher_is_better") is not False,
        single,
        _read_change(change) if change else None,
    )


def _read_change(c: dict[str, Any]) -> GridChange:
    seeds = as_dict(c.get("seeds"))
    return GridChange(
        _number(c.get("difference")),
        _number(c.get("low")),
        _number(c.get("high")),
        (_number(seeds.get("low")), _number(seeds.get("high"))) if seeds else None,
        _number(c.get("p_holm")),
        _text(c.get("verdict")),
    )


def _text(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _number(value: Any) -> float | None:
    found = as_number(value)
    return found if found is not None and math.isfinite(found) else None

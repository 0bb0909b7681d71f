"""summary.json of a grid as types. A file that is damaged is read as an empty summary that says so."""

from __future__ import annotations

import math
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, Field, ValidationError

Number = Annotated[
    float | None, BeforeValidator(lambda x: None if isinstance(x, float) and not math.isfinite(x) else x)
]


class Limits(BaseModel):
    """Ends of an interval."""

    low: Number = None
    high: Number = None


class GridChange(Limits):
    """How a figure differs from the baseline's.

    Attributes:
        low, high: Limits over the items; seeds: limits over the seeds, where there are several.
        p_holm: p over the items, corrected over the rows of the metric (Holm 1979).
        verdict: "better", "worse" or "within noise".
    """

    difference: Number = None
    seeds: Limits | None = None
    p_holm: Number = None
    verdict: str = ""

    @property
    def limits(self) -> tuple[float | None, float | None]:
        """Limits over the seeds, else over the items."""
        found = self.seeds or self
        return found.low, found.high


class GridFigure(Limits):
    """One metric of one row; `values` are those of its seeds."""

    task: str
    metric: str
    value: Number = None
    runs: int = 0
    n: int | None = None
    higher_is_better: bool = True
    values: dict[str, Number] = Field(default_factory=dict)
    change: GridChange | None = None

    @property
    def single(self) -> list[float]:
        """Values of the single seeds."""
        return [value for value in self.values.values() if value is not None]


class GridRow(BaseModel):
    """A model and method; `compared_with` is the place of the row that it is compared with."""

    name: str
    model: str | None = None
    subject: str = ""
    values: dict[str, str] = Field(default_factory=dict)
    cells: list[str] = Field(default_factory=list)
    baseline: bool = False
    compared_with: int | None = None
    figures: list[GridFigure] = Field(default_factory=list)

    @property
    def varied(self) -> bool:
        """Whether it depends on an axis beside the model."""
        return bool(self.values.keys() - {"model"})


class GridMetric(BaseModel):
    """A figure of a task, and whether it is the task's main one."""

    task: str
    metric: str
    main: bool = False


class GridCell(BaseModel):
    """A cell, its choices on the axes and how its run went."""

    name: str
    values: dict[str, str] = Field(default_factory=dict)
    state: str = "not run"
    seconds: Number = None
    error: str | None = None


class GridSummary(BaseModel):
    """All of summary.json that is read."""

    rows: list[GridRow] = Field(default_factory=list)
    metrics: list[GridMetric] = Field(default_factory=list)
    cells: list[GridCell] = Field(default_factory=list)
    notes: list[str] = Field(default_factory=list)

    def select(self, metric: GridMetric) -> list[tuple[GridRow, GridFigure]]:
        """Rows that have a metric, with it."""
        wanted = (metric.task, metric.metric)
        return [(row, f) for row in self.rows for f in row.figures if (f.task, f.metric) == wanted]

    def find_base(self, row: GridRow) -> GridRow | None:
        """The row that one is compared with; the baseline itself for the baseline."""
        if row.baseline:
            return row
        at = row.compared_with
        return self.rows[at] if at is not None and 0 <= at < len(self.rows) else None


def read_summary(raw: Any) -> GridSummary:
    """The summary from JSON."""
    try:
        return GridSummary.model_validate(raw)
    except ValidationError as error:
        place = ".".join(map(str, error.errors()[0]["loc"]))
        return GridSummary(notes=[f"summary.json is damaged ({place}): `burnish report` makes it again."])

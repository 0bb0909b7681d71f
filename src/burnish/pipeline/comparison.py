"""From a grid's finished cells to one table: means and intervals over seeds, paired tests against the baseline.

Torch-free; reads files only, so it can be made again at any time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from burnish.artifacts.files import write_json_file
from burnish.artifacts.grid_folder import CELLS, SUMMARY, load_grid, read_cell_state
from burnish.artifacts.run_folder import load_stage
from burnish.config.grid import BASE, MODEL
from burnish.config.registry import find_known
from burnish.errors import BurnishError
from burnish.evals.intervals import compute_mean, finite_or_none
from burnish.evals.items import Items, compare_items, read_items
from burnish.pipeline.sharing import find_relevant
from burnish.report.numbers import is_proportion
from burnish.track.metrics import read_metrics

CONFIDENCE = 0.95
ALPHA = 0.05
MAIN = {"loss": "loss", "preferences": "accuracy", "win_rate": "judge_score"}

Metric = tuple[str, str]


@dataclass
class Member:
    """One subject of one cell's evaluation.

    Attributes:
        cell: The first cell that measured it.
        seeds: Values of the seed axes that it depends on.
        table: (task, metric) → its row of the evaluation's table.
        place: The evaluation's folder.
    """

    cell: str
    seeds: tuple[str, ...]
    place: Path
    table: dict[Metric, dict[str, Any]] = field(default_factory=dict)


@dataclass
class Row:
    """One thing that is compared: a subject under some values of the axes, over its seeds."""

    subject: str
    values: dict[str, str]
    members: dict[str, Member] = field(default_factory=dict)


def write_summary(folder: Path) -> dict[str, Any]:
    """Write summary.json into a grid's folder; returns what stands in it.

    Raises:
        UsageError: The folder is no grid.
    """
    summary = build_summary(folder)
    write_json_file(folder / SUMMARY, summary)
    return summary


def build_summary(folder: Path) -> dict[str, Any]:
    """{"cells", "rows", "metrics", "baseline", "notes"} of a grid, from its files."""
    grid = load_grid(folder)
    cells = []
    for cell in grid["cells"]:
        state, record = read_cell_state(folder / CELLS / cell["name"])
        cells.append(
            {
                "name": cell["name"],
                "values": cell["values"],
                "state": state,
                "seconds": record.get("seconds_total"),
                "error": record.get("error"),
            }
        )
    rows = collect_rows(folder, grid)
    found = list(dict.fromkeys(m for row in rows for member in row.members.values() for m in member.table))
    tasks = list(dict.fromkeys(task for task, _ in found))
    metrics = sorted(found, key=lambda m: tasks.index(m[0]))
    baselines = find_baselines(grid, rows)
    seeds = [axis["label"] for axis in grid["axes"] if axis["seed"]]
    out = []
    for at, row in enumerate(rows):
        figures = [_summarise(row, rows[baselines[at]] if at in baselines else None, m) for m in metrics]
        out.append(
            {
                "name": name_row(grid, row),
                "model": row.values.get(MODEL),
                "subject": row.subject,
                "values": row.values,
                "cells": [m.cell for m in row.members.values()],
                "baseline": at in baselines.values(),
                "compared_with": baselines.get(at),
                "figures": [f for f in figures if f is not None],
            }
        )
    _correct(out)
    axes = [
        {"label": a["label"], "choices": [c["name"] for c in a["choices"]], "seed": a["seed"]} for a in grid["axes"]
    ]
    return {
        "axes": axes,
        "baseline": grid["baseline"],
        "seeds": seeds,
        "confidence": CONFIDENCE,
        "cells": cells,
        "metrics": [{"task": t, "metric": m, "main": _is_main(t, m)} for t, m in metrics],
        "rows": out,
        "notes": _remark(cells, out, items_differ=_items_differ(rows)),
    }


def _is_main(task: str, metric: str) -> bool:
    return MAIN.get(task, "accuracy") == metric


# Rows


def collect_rows(folder: Path, grid: Mapping[str, Any]) -> list[Row]:
    """All that the finished evaluations measured: one row for a subject and the values that it depends on."""
    seeds = {axis["label"] for axis in grid["axes"] if axis["seed"]}
    relevant: dict[str, list[str]] = {}
    rows: dict[tuple[Any, ...], Row] = {}
    for cell in grid["cells"]:
        for place in (folder / stage for stage in cell["stages"].values()):
            for subject, table in _read_table(place).items():
                if subject not in relevant:
                    places = [(c["values"], c["stages"].get(subject, c["base"])) for c in grid["cells"]]
                    relevant[subject] = find_relevant([axis["label"] for axis in grid["axes"]], places)
                labels = relevant[subject]
                values = {x: cell["values"][x] for x in labels if x not in seeds}
                row = rows.setdefault((subject, *values.items()), Row(subject, values))
                key = tuple(cell["values"][x] for x in labels if x in seeds)
                member = row.members.setdefault("_".join(key), Member(cell["name"], key, place))
                for metric, figure in table.items():
                    if metric not in member.table:
                        member.table[metric] = figure | {"place": str(place)}
    return _order(grid, list(rows.values()))


def _order(grid: Mapping[str, Any], rows: list[Row]) -> list[Row]:
    """By model, then from base over earlier stages to later ones, then by the axes."""
    places = {axis["label"]: {c["name"]: i for i, c in enumerate(axis["choices"])} for axis in grid["axes"]}
    stages = [BASE, *grid["cells"][0]["stages"]]
    rank = {name: at for at, name in enumerate(stages)}
    labels = [label for label in places if label != MODEL]

    def key(row: Row) -> tuple[int, ...]:
        own = [places[x].get(row.values[x], 0) if x in row.values else -1 for x in labels]
        model = places[MODEL].get(row.values[MODEL], 0) if MODEL in row.values else -1
        return (model, rank.get(row.subject, len(rank)), *own)

    return sorted(rows, key=key)


def _read_table(place: Path) -> dict[str, dict[Metric, dict[str, Any]]]:
    """Subject → (task, metric) → row, of a finished evaluation; {} for anything else."""
    try:
        record = load_stage(place) or {}
    except BurnishError:
        return {}
    spec = find_known(str(record.get("kind")))
    if record.get("state") != "done" or spec is None or spec.trains:
        return {}
    out: dict[str, dict[Metric, dict[str, Any]]] = {}
    for row in record.get("figures", {}).get("table", []):
        out.setdefault(row["subject"], {})[row["task"], row["metric"]] = row
    return out


def name_row(grid: Mapping[str, Any], row: Row) -> str:
    """`dpo`, `dpo beta=0.2`, `sft`: a row without its model."""
    words = [value for label, value in row.values.items() if label != MODEL]
    formed = any(axis["stage"] == row.subject and axis["label"] in row.values for axis in grid["axes"])
    return " ".join(words if formed else [row.subject, *words])


def find_baselines(grid: Mapping[str, Any], rows: Sequence[Row]) -> dict[int, int]:
    """Row → the row that it is compared with: the baseline under the row's own other values."""
    wanted = dict(grid["baseline"])
    if not wanted:
        return {}
    stage = wanted.pop("", None)
    last = next((row.subject for row in reversed(rows) if wanted.keys() <= row.values.keys()), None)
    out = {}
    for at, row in enumerate(rows):
        own = row.subject if wanted.keys() <= row.values.keys() else last  # sft is compared with the forms' baseline
        meant = {**row.values, **wanted}
        for other, base in enumerate(rows):
            same = base.subject == (stage or own) and all(meant.get(k) == v for k, v in base.values.items())
            if other != at and same and wanted.keys() <= base.values.keys():
                out[at] = other
    return out


# Figures


def _summarise(row: Row, base: Row | None, metric: Metric) -> dict[str, Any] | None:
    """Mean with interval of one metric, and how it differs from the baseline's; None where it was not measured."""
    found = {key: member.table[metric] for key, member in row.members.items() if metric in member.table}
    values = {key: float(f["value"]) for key, f in found.items() if f.get("value") is not None}
    if not values:
        return None
    first = next(iter(found.values()))
    out: dict[str, Any] = {
        "task": metric[0],
        "metric": metric[1],
        "runs": len(values),
        "n": first.get("n"),
        "higher_is_better": bool(first.get("higher_is_better", True)),
    }
    interval = compute_mean(np.array(list(values.values())), CONFIDENCE)
    if len(values) > 1:
        low, high = interval.low, interval.high
        if is_proportion(metric[1]):
            low, high = max(low, 0.0), min(high, 1.0)
        out |= {"value": interval.value, "low": low, "high": high, "over": "seeds"}
    else:
        out |= {"value": interval.value, "low": first.get("low"), "high": first.get("high"), "over": "items"}
    out["values"] = values
    if base is not None and (change := _compare(row, base, metric)) is not None:
        out["change"] = change
    return out


def _compare(row: Row, base: Row, metric: Metric) -> dict[str, Any] | None:
    """The difference to the baseline: tested over items, with its interval over seeds where there are several."""
    mine, theirs = _items(row, metric), _items(base, metric)
    matched = _match(list(mine), list(theirs))
    found = compare_items([(mine[a], theirs[b]) for a, b in matched], confidence=CONFIDENCE)
    if found is None:
        return None
    change: dict[str, Any] = {
        "difference": found.difference,
        "low": finite_or_none(found.low),
        "high": finite_or_none(found.high),
        "p_value": found.p_value,
        "test": found.test,
        "n": found.n,
    }
    gaps = [_value(row, a, metric) - _value(base, b, metric) for a, b in matched]
    if len(gaps) > 1:
        spread = compute_mean(np.array(gaps), CONFIDENCE)
        change["seeds"] = {"low": spread.low, "high": spread.high, "n": len(gaps)}
    return change


def _match(mine: Sequence[str], theirs: Sequence[str]) -> list[tuple[str, str]]:
    """Runs of two rows that belong together: of one seed; where one row has a single run, that with each of the other."""
    if len(mine) == 1 or len(theirs) == 1:
        return [(a, b) for a in mine for b in theirs]
    return [(key, key) for key in mine if key in theirs]


def _items(row: Row, metric: Metric) -> dict[str, Items]:
    out = {}
    for key, member in row.members.items():
        if metric in member.table:
            place = Path(member.table[metric]["place"])
            found = read_items(_read_rows(place), row.subject, *metric)
            if found is not None:
                out[key] = found
    return out


@cache
def _read_rows_of(place: Path, stamp: int) -> tuple[dict[str, Any], ...]:
    return tuple(read_metrics(place)[0])


def _read_rows(place: Path) -> Iterable[dict[str, Any]]:
    file = place / "items.jsonl"
    return _read_rows_of(file, file.stat().st_mtime_ns) if file.exists() else ()


def _value(row: Row, key: str, metric: Metric) -> float:
    return float(row.members[key].table[metric]["value"])


# What may be said


def _correct(rows: list[dict[str, Any]]) -> None:
    """Holm's correction (Holm 1979) over all comparisons of a metric, and a verdict that needs items and seeds."""
    changes: dict[Metric, list[tuple[dict[str, Any], bool]]] = {}
    for row in rows:
        for figure in row["figures"]:
            if "change" in figure:
                entry = (figure["change"], figure["higher_is_better"])
                changes.setdefault((figure["task"], figure["metric"]), []).append(entry)
    for found in changes.values():
        largest = 0.0
        for rank, (change, higher) in enumerate(sorted(found, key=lambda item: item[0]["p_value"])):
            largest = max(largest, min(1.0, change["p_value"] * (len(found) - rank)))
            change["p_holm"] = largest
            change["verdict"] = _judge(change, higher)


def _judge(change: Mapping[str, Any], higher: bool) -> str:
    seeds = change.get("seeds")
    steady = seeds is None or seeds["low"] > 0 or seeds["high"] < 0
    if change["p_holm"] >= ALPHA or not steady or change["difference"] == 0:
        return "within noise"
    return "better" if (change["difference"] > 0) == higher else "worse"


def _items_differ(rows: Sequence[Row]) -> bool:
    """Whether the seeds of some row were measured on different items."""
    for row in rows:
        for metric in {m for member in row.members.values() for m in member.table}:
            if len({frozenset(found.values) for found in _items(row, metric).values()}) > 1:
                return True
    return False


def _remark(cells: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]], *, items_differ: bool) -> list[str]:
    """What a reader must know before believing the table."""
    notes = []
    open_cells = [c for c in cells if c["state"] != "done"]
    if open_cells:
        notes.append(f"{len(open_cells)} of {len(cells)} cells are not finished; the table holds what there is.")
    runs = max((f["runs"] for row in rows for f in row["figures"]), default=0)
    tests = sorted({f["change"]["test"] for row in rows for f in row["figures"] if "change" in f})
    named = {"mcnemar": "McNemar's exact test", "sign-flip": "the sign-flip test"}
    if runs > 1:
        notes.append(f"Values are means over seeds with Student's {CONFIDENCE:.0%} interval of that mean.")
    elif rows:
        notes.append("One run each: intervals are those over the held-out items; another seed may differ by more.")
    if items_differ:
        notes.append(
            "Seeds hold out different items, so the spread over seeds holds that of the items too; data with a test split "
            "of their own, or eval_data, keep them equal."
        )
    if tests:
        how = " and ".join(named.get(str(t), str(t)) for t in tests)
        over = "an item's difference being its mean over seeds" if runs > 1 else "one run each"
        notes.append(
            f"Differences to the baseline are tested in pairs on the same held-out items ({how}, {over}), with Holm's "
            f"correction over all rows of a metric."
        )
    if runs > 1 and tests:
        notes.append(
            "“better” and “worse” need both: p < 0.05 over the items, and an interval of the difference over seeds "
            "that leaves 0 out. Everything else is within noise."
        )
    return notes

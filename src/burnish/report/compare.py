"""The page of a grid: one table with intervals and paired tests, learning curves side by side, links to every cell."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from burnish.artifacts.files import write_file
from burnish.artifacts.grid_folder import CELLS, load_grid, load_summary
from burnish.artifacts.redact import redact, redact_tree
from burnish.artifacts.run_folder import load_run
from burnish.clock import show_seconds
from burnish.report import charts
from burnish.report.headline import badge, render_facts
from burnish.report.numbers import show_difference, show_interval, show_p, show_value
from burnish.report.page import REPORT, build_page, describe_command, join_words
from burnish.report.read import as_dict, as_list, as_number, as_rows, read_json, read_yaml
from burnish.report.results import explain_metric, say_axis, say_metric, say_task
from burnish.report.summary import GridCell, GridFigure, GridMetric, GridRow, GridSummary, read_summary
from burnish.report.svg import Series, draw_interval, draw_lines, find_limits, smooth
from burnish.track.metrics import METRICS, read_metrics

Curves = tuple[GridRow, list[list[dict[str, Any]]]]  # a row of the summary, and the training rows of its runs

_CLASS = {"better": "better", "worse": "worse"}
_SHORT = {"better": "▲ better", "worse": "▼ worse", "within noise": "within noise"}


@dataclass
class GridFiles:
    """All that the page reads."""

    path: Path
    record: dict[str, Any]
    grid: dict[str, Any]
    summary: GridSummary
    environment: dict[str, Any]
    recipe: str
    notes: list[str] = field(default_factory=list)

    @property
    def cells(self) -> list[GridCell]:
        """Cells of the summary, with states; without a summary those of the grid."""
        found = [GridCell(name=c["name"], values=c["values"]) for c in as_rows(self.grid["cells"])]
        return self.summary.cells or found

    def place_of(self, cell: str, stage: str) -> Path | None:
        """The folder of a cell's stage."""
        stages = next((as_dict(c.get("stages")) for c in as_rows(self.grid["cells"]) if c["name"] == cell), {})
        return self.path / str(stages[stage]) if stage in stages else None


def render_comparison(folder: Path) -> Path:
    """Write `report.html` into a grid's folder from the files there, and return its path.

    Raises:
        UsageError: The folder is no grid.
        ResourceError: The page cannot be written.
    """
    files = _read(Path(folder))
    place = files.path / REPORT
    write_file(place, render_page(files))
    return place


def _read(path: Path) -> GridFiles:
    notes: list[str] = []
    text, _ = read_yaml(path / "recipe.yaml", notes)
    return GridFiles(
        path,
        redact_tree(load_run(path)),
        redact_tree(load_grid(path)),
        read_summary(redact_tree(load_summary(path))),
        redact_tree(read_json(path / "environment.json", notes)),
        redact(text),
        notes,
    )


def render_page(files: GridFiles) -> str:
    """The page as text."""
    sections = [
        ("results", "Comparison", _render_results(files)),
        ("curves", "Learning curves", _render_curves(files)),
        ("cells", "Cells", _render_cells(files)),
        ("varies", "What varies", _render_axes(files)),
    ]
    return build_page(
        str(files.record.get("name") or files.path.name), _render_head(files), sections, describe_command(files.record)
    )


# The top


def _render_head(files: GridFiles) -> str:
    record = files.record
    states = [c.state for c in files.cells]
    counted = {state: states.count(state) for state in dict.fromkeys(states)}
    axes = [say_axis(a, len(as_list(a.get("choices")))) for a in as_rows(files.grid["axes"])]
    seconds = as_number(record.get("seconds_total"))
    lead = f"{len(states)} cells: {' × '.join(axes)}."
    if counted.get("done", 0) < len(states):
        lead += " " + join_words([f"{n} {state}" for state, n in counted.items()]) + "."
    if seconds:
        lead += f" {show_seconds(seconds)} in all."
    baseline = " ".join(map(str, as_dict(files.grid.get("baseline")).values())) or "–"
    facts = render_facts(record, files.environment, [("Compared with", baseline)])
    parts = [
        '<p class="kicker">burnish comparison</p>',
        f"<h1>{escape(str(record.get('name') or files.path.name))}</h1>",
        f'<p class="lead">{escape(lead)}</p>',
    ]
    failed = [c for c in files.cells if c.error]
    if failed:
        lines = "".join(f"<p><b>{escape(c.name)}</b>: {escape(str(c.error))}</p>" for c in failed[:10])
        parts.append(f'<div class="warn bad">{lines}</div>')
    if files.notes:
        parts.append(f'<div class="warn">{"".join(f"<p>{escape(n)}</p>" for n in files.notes)}</div>')
    return "\n".join([*parts, facts])


# The table


def _render_results(files: GridFiles) -> str:
    summary = files.summary
    if not summary.rows:
        return '<p class="soft">No cell has finished an evaluation yet.</p>'
    notes = "".join(f"<li>{escape(note)}</li>" for note in summary.notes)
    parts = [_render_metric(summary, metric) for metric in summary.metrics if metric.main]
    others = [_render_metric(summary, metric) for metric in summary.metrics if not metric.main]
    if any(others):
        parts.append(f"<details><summary>{len(others)} further figures</summary>{''.join(others)}</details>")
    legend = (
        '<p class="note">Large dots are means, bars their 95 % intervals, small dots single seeds, dotted lines the '
        "baseline. Intervals are over seeds; where there is one run, over its items.</p>"
    )
    return "".join(parts) + legend + f'<ul class="remarks">{notes}</ul>'


def _render_metric(summary: GridSummary, shown: GridMetric) -> str:
    found, task, metric = summary.select(shown), shown.task, shown.metric
    if not found:
        return ""
    scale = _find_scale(found)
    several = len({row.model for row, _ in found}) > 1
    body, before = [], None
    for row, figure in found:
        first = row.model != before
        model = (row.model or "") if several and first else ""
        body.append(_render_row(summary, row, figure, scale, model, begin=bool(body) and first))
        before = row.model
    counts = {f.n for _, f in found if f.n is not None}
    n = f" · n = {counts.pop():,} items" if len(counts) == 1 else ""
    direction = "" if found[0][1].higher_is_better else " · lower is better"
    what = f"{'' if task == metric else say_metric(metric)}{n}{direction}".removeprefix(" · ")
    explained = explain_metric(task, metric)
    note = f'<p class="note">{escape(explained)}</p>' if explained else ""
    head = "<th>model</th>" if several else "<th></th>"
    title = f'<div class="block"><h3>{escape(say_task(task))} <span>{escape(what)}</span></h3>{note}</div>'
    return (
        f'{title}<div class="wide"><table class="compare"><tr>{head}<th>method</th><th class="num">mean</th>'
        '<th class="plot"></th><th class="num">against the baseline</th><th></th></tr>'
        f"{''.join(body)}</table></div>"
    )


def _render_row(
    summary: GridSummary, row: GridRow, figure: GridFigure, scale: tuple[float, float], model: str, *, begin: bool
) -> str:
    metric, value, change = figure.metric, figure.value, figure.change
    interval = show_interval(metric, figure.low, figure.high)
    label = f"{row.name}: {show_value(metric, value)}" + (f", 95 % interval {interval}" if interval else "")
    if value is not None and not scale[0] <= value <= scale[1]:
        side = ' style="text-align:right"' if value > scale[1] else ""
        plot = f'<span class="limits"{side}>{"off the scale ▸" if value > scale[1] else "◂ off the scale"}</span>'
    else:
        single = figure.single if len(figure.single) > 1 else ()
        mark = _find_mark(summary, row, figure)
        plot = draw_interval(figure.low, value, figure.high, scale, mark, label, single)
    gap = limits = p = verdict = ""
    if change is not None:
        gap, verdict, p = show_difference(metric, change.difference), change.verdict, show_p(change.p_holm)
        limits = show_interval(metric, *change.limits, difference=True)
    kind = _CLASS.get(verdict, "same")
    marks = " ".join(word for word, on in (("begin", begin), ("base", row.baseline)) if on)
    return (
        f'<tr class="{marks}"><td>{escape(model)}</td><td>{escape(row.name)}</td>'
        f'<td class="num">{escape(show_value(metric, value))}<span class="limits">{escape(interval)}</span></td>'
        f'<td class="plot">{plot}</td><td class="num"><b class="{kind}">{escape(gap)}</b>'
        f'<span class="limits">{escape(limits)}</span></td>'
        f'<td><span class="{kind}">{escape(_SHORT.get(verdict, verdict))}</span>'
        f'<span class="limits">{escape(p)}</span></td></tr>'
    )


def _find_mark(summary: GridSummary, row: GridRow, figure: GridFigure) -> float | None:
    """The baseline's mean."""
    base = summary.find_base(row)
    found = base.figures if base is not None else []
    return next((f.value for f in found if (f.task, f.metric) == (figure.task, figure.metric)), None)


def _find_scale(found: Sequence[tuple[GridRow, GridFigure]]) -> tuple[float, float]:
    """All means and single values of the rows that the grid varies; what lies far from them leaves the scale."""
    figures = [f for row, f in found if row.baseline or row.varied] or [f for _, f in found]
    points = [x for f in figures for x in (f.value, *f.single) if x is not None]
    if not points:
        return (0.0, 1.0)
    span = max(points) - min(points) or abs(max(points)) * 0.05 or 0.5
    others = [x for _, f in found for x in (f.value, f.low, f.high) if x is not None]
    near = [x for x in others if min(points) - span / 2 <= x <= max(points) + span / 2]
    low, high = min([*points, *near]), max([*points, *near])
    pad = 0.06 * (high - low) or 0.5
    return (low - pad, high + pad)


# Learning curves


def _render_curves(files: GridFiles) -> str:
    """One chart for each row and metric: lines are seeds; accuracies share a scale, losses only within a method."""
    rows = [row for row in files.summary.rows if row.varied] or files.summary.rows
    curves: list[Curves] = []
    for row in rows:
        places = [files.place_of(cell, row.subject) for cell in row.cells]
        read = [read_metrics(place / METRICS)[0] for place in places if place is not None]
        curves.append((row, [[r for r in one if r.get("kind", "train") == "train"] for one in read]))
    parts = []
    for panel in charts.PANELS[:3]:
        name = next((n for n in panel.train for _, runs in curves if any(charts.find_points(r, n) for r in runs)), None)
        if name is not None:
            note = f" {panel.note}" if panel.note else ""
            parts.append(f'<h3>{escape(panel.title)}<span class="soft">{escape(note)}</span></h3>')
            by_model: dict[str, list[str]] = {}
            for row, figure in _draw_panel(panel, name, curves):
                by_model.setdefault(row.model or "", []).append(figure)
            for model, figures in by_model.items():
                title = f"<h4>{escape(model)}</h4>" if len(by_model) > 1 else ""
                parts.append(f'{title}<div class="multiples">{"".join(figures)}</div>')
    if parts:
        parts.append('<p class="note">Training, smoothed; a line for each seed.</p>')
    return "".join(parts)


def _draw_panel(panel: charts.Panel, name: str, curves: Sequence[Curves]) -> list[tuple[GridRow, str]]:
    """(row, its chart) of one metric."""
    drawn: list[tuple[GridRow, list[Series]]] = []
    for row, runs in curves:
        series = []
        for at, rows in enumerate(runs):
            points = charts.find_points(rows, next((n for n in panel.train if charts.find_points(rows, n)), name))
            if points:
                smoothed, _ = smooth(points)
                series.append(Series(f"run {at + 1}", smoothed or points, f"s{at % 4 + 1}"))
        if series:
            drawn.append((row, series))
    groups: dict[Any, list[float]] = {}
    for row, series in drawn:
        ys = [y for s in series for _, y in s.points if math.isfinite(y)]
        groups.setdefault(_scale_group(panel, row), []).extend(find_limits(ys) if ys else ())
    out: list[tuple[GridRow, str]] = []
    for row, series in drawn:
        ends = groups[_scale_group(panel, row)]
        title = " · ".join(x for x in (row.model, row.name) if x)
        last = sum(s.points[-1][1] for s in series) / len(series)
        label = f"{panel.title} of {title} by step, at the end {show_value(name, last)}"
        chart = draw_lines(series, metric=name, label=label, limits=(min(ends), max(ends)) if ends else None)
        if chart is not None:
            value = f'<span class="key"><b>{escape(show_value(name, last))}</b> at the end</span>'
            caption = f'<figcaption><span class="what">{escape(row.name)}</span> {value}</figcaption>'
            out.append((row, f"<figure>{caption}{chart.svg}</figure>"))
    return out


def _scale_group(panel: charts.Panel, row: GridRow) -> str:
    """Rows that share a scale: all for an accuracy; for a loss only those of one method, since losses differ in kind."""
    return "all" if panel.title == "Accuracy" else row.name


# Cells and axes


def _render_cells(files: GridFiles) -> str:
    seeds = {str(a["label"]) for a in as_rows(files.grid["axes"]) if a.get("seed")}
    lines: dict[tuple[str, ...], list[str]] = {}
    for cell in files.cells:
        key = tuple(v for k, v in cell.values.items() if k not in seeds)
        words = " ".join(v for k, v in cell.values.items() if k in seeds) or "report"
        done = cell.state == "done"
        took = f' <span class="soft">{show_seconds(cell.seconds)}</span>' if cell.seconds and done else ""
        there = (files.path / CELLS / cell.name / REPORT).is_file()
        shown = f'<a href="{CELLS}/{quote(cell.name)}/{REPORT}">{escape(words)}</a>' if there else escape(words)
        mark = "" if done else f" {badge(cell.state)}"
        lines.setdefault(key, []).append(f"<td>{shown}{took}{mark}</td>")
    labels = [str(a["label"]) for a in as_rows(files.grid["axes"]) if str(a["label"]) not in seeds]
    head = "".join(f"<th>{escape(label)}</th>" for label in labels)
    width = max(len(tds) for tds in lines.values()) if lines else 0
    body = "".join(
        "<tr>"
        + "".join(f"<td>{escape(v)}</td>" for v in key)
        + "".join(tds)
        + "<td></td>" * (width - len(tds))
        + "</tr>"
        for key, tds in lines.items()
    )
    return (
        '<p class="soft">Each cell is a run of its own, with a report of its own.</p>'
        f'<div class="wide"><table class="cells"><tr>{head}<th colspan="{width}">reports</th></tr>{body}</table></div>'
    )


def _render_axes(files: GridFiles) -> str:
    parts = []
    for axis in as_rows(files.grid["axes"]):
        rows = "".join(
            f"<tr><td>{escape(str(c.get('name')))}</td><td><code>{escape(_show_setting(c.get('value')))}</code></td></tr>"
            for c in as_rows(axis.get("choices"))
        )
        of = " (the stage)" if axis.get("stage") else ""
        parts.append(
            f'<h3>{escape(str(axis["label"]))}{of}</h3><div class="wide"><table class="settings">{rows}</table></div>'
        )
    if files.recipe:
        parts.append(f"<details><summary>The recipe</summary><pre>{escape(files.recipe)}</pre></details>")
    return "".join(parts)


def _show_setting(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k}: {_show_setting(v)}" for k, v in value.items())
    return "none" if value is None else str(value)

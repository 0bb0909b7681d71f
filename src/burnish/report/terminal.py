"""The table of results for a terminal."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from burnish.report.numbers import show_difference, show_interval, show_p, show_value
from burnish.report.results import Block, read_blocks, say_metric, say_task, show_figure, write_remarks
from burnish.report.summary import GridFigure, Limits, read_summary

_MARKS = {"better": "▲", "worse": "▼", "no clear change": "="}


def render_table(figures: dict[str, Any]) -> str:
    """The figures of an evaluation as aligned text: values with 95 % intervals, then the paired comparisons.

    ▲ better, ▼ worse (both p < 0.05), = no clear change. Returns "" without figures.
    """
    blocks = read_blocks(figures)
    if not blocks:
        return ""
    lines: list[str] = []
    values: list[tuple[str, ...]] = [("task", "metric", "model", "value", "95 % interval", "n")]
    for block in blocks:
        for at, figure in enumerate(block.figures):
            value, interval = show_figure(block, figure)
            head = (block.task, say_metric(block.metric)) if at == 0 else ("", "")
            values.append((*head, figure.subject, value, interval, "" if figure.n is None else str(figure.n)))
    lines += _align_below_titles(values, {3, 5})
    changes = [("", "task", "metric", "from → to", "difference", "95 % interval", "p", "test")]
    changes += [row for block in blocks for row in _change_rows(block)]
    if len(changes) > 1:
        lines += ["", *_align_below_titles(changes, {4})]
    remarks = write_remarks(blocks)
    if len(changes) > 1:
        lines += ["", *remarks]
    return "\n".join(lines) + "\n"


def render_summary(raw: dict[str, Any]) -> str:
    """The summary of a grid as aligned text: the main figure of each task, a line for each model and method.

    ▲ better, ▼ worse than the baseline, = within noise; the remarks below say what that takes. "" without rows.
    """
    summary = read_summary(raw)
    lines: list[tuple[str, ...]] = []
    for shown in (metric for metric in summary.metrics if metric.main):
        for at, (row, figure) in enumerate(summary.select(shown)):
            name = f"{row.name} *" if row.baseline else row.name
            value, interval = (
                show_value(shown.metric, figure.value),
                show_interval(shown.metric, figure.low, figure.high),
            )
            head = (say_task(shown.task) if at == 0 else "", row.model or "", name)
            lines.append((*head, value, interval, str(figure.runs), *_show_change(figure)))
    if not lines:
        return ""
    titles = ("task", "model", "method", "mean", "95 % interval", "runs", "", "difference", "over seeds", "p")
    if not any(line[1] for line in lines):
        titles, lines = titles[:1] + titles[2:], [line[:1] + line[2:] for line in lines]
    right = {titles.index("mean"), titles.index("runs"), titles.index("difference")}
    baseline = ["* the baseline"] if any(row.baseline for row in summary.rows) else []
    return "\n".join([*_align_below_titles([titles, *lines], right), "", *baseline, *summary.notes]) + "\n"


def _show_change(figure: GridFigure) -> tuple[str, ...]:
    change = figure.change
    if change is None:
        return ("", "", "", "")
    seeds = change.seeds or Limits()
    return (
        {"better": "▲", "worse": "▼", "within noise": "="}.get(change.verdict, " "),
        show_difference(figure.metric, change.difference),
        show_interval(figure.metric, seeds.low, seeds.high, difference=True),
        show_p(change.p_holm).removeprefix("p = ").removeprefix("p "),
    )


def _change_rows(block: Block) -> list[tuple[str, ...]]:
    return [
        (
            _MARKS.get(c.verdict, " "),
            block.task,
            say_metric(block.metric),
            f"{c.a} → {c.b}",
            show_difference(c.metric, c.difference),
            show_interval(c.metric, c.low, c.high, difference=True),
            show_p(c.p_value).removeprefix("p = ").removeprefix("p "),
            c.test,
        )
        for c in block.changes
    ]


def align(rows: list[tuple[str, ...]], right: Collection[int] = ()) -> list[str]:
    """Rows as lines, columns as wide as their widest cell; those in `right` are set to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths))).rstrip()
        for row in rows
    ]


def _align_below_titles(rows: list[tuple[str, ...]], right: Collection[int]) -> list[str]:
    titles, *lines = align(rows, right)
    rule = "  ".join("─" * max(map(len, column)) for column in zip(*rows, strict=True))
    return [titles, rule, *lines]

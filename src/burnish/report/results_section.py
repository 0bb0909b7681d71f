"""Results and sample answers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from html import escape
from typing import Any

from burnish.report.numbers import show_difference, show_interval, show_p, show_value
from burnish.report.read import RunFiles, StageFiles, as_dict, as_list
from burnish.report.results import (
    Block,
    Change,
    Figure,
    explain_metric,
    find_reference,
    read_blocks,
    say_metric,
    say_task,
    show_figure,
    write_remarks,
)
from burnish.report.reward_section import render_reward_report
from burnish.report.svg import draw_interval

_SPECIAL = re.compile(r"&lt;\|[^|&<>]{1,40}\|&gt;")  # tokens of chat templates, escaped
_PALE = r'<span class="token">\g<0></span>'
_CLASS = {"better": "better", "worse": "worse"}


def render_results(run: RunFiles) -> str:
    """What the evaluations found, model by model: remarks first, then values with intervals and paired tests."""
    parts = []
    for model in run.models:
        for stage in run.stages:
            if stage.model == model and stage.evaluates and stage.figures:
                title = f"<h3>{escape(model)}</h3>" if len(run.models) > 1 and model else ""
                parts.append(title + render_evaluation(stage))
    if parts:
        return _compare_models(run) + "\n".join(parts)
    if not run.stages:
        return ""
    return '<p class="soft">No evaluation has been made in this run; the curves below are all there is to judge by.</p>'


def _compare_models(run: RunFiles) -> str:
    """All values of all models in one table; "" for a run of one model."""
    found = [(str(s.model), read_blocks(s.figures)) for s in run.stages if s.evaluates and s.model]
    if len({model for model, _ in found}) < 2:
        return ""
    titles = list(dict.fromkeys((b.task, b.metric) for _, blocks in found for b in blocks))
    head = "".join(
        f'<th class="num">{escape(say_task(task))}<br>{escape(say_metric(metric))}</th>' for task, metric in titles
    )
    rows = []
    for model, blocks in found:
        cells = {(f.subject, b.task, b.metric): show_value(b.metric, f.value) for b in blocks for f in b.figures}
        for subject in dict.fromkeys(subject for subject, _, _ in cells):
            values = "".join(f'<td class="num">{escape(cells.get((subject, *t), "–"))}</td>' for t in titles)
            rows.append(f"<tr><td>{escape(model)}</td><td>{escape(subject)}</td>{values}</tr>")
    return (
        f'<div class="wide"><table><tr><th>model</th><th>stage</th>{head}</tr>{"".join(rows)}</table></div>'
        '<p class="note">Values of different models are not tested against each other.</p>'
    )


def render_evaluation(stage: StageFiles) -> str:
    """One evaluation stage."""
    blocks = read_blocks(stage.figures)
    if not blocks:
        return '<p class="soft">The evaluation has no figures.</p>'
    remarks = write_remarks(blocks)
    lines = "".join(f"<li>{escape(r)}</li>" for r in remarks)
    listed = f'<ul class="remarks">{lines}</ul>' if remarks else ""
    note = (
        '<p class="note">Dots are measured values, bars their 95 % intervals, dotted lines the first row (win rates: one half). '
        "Differences are measured on the same items for both and tested in pairs.</p>"
    )
    left_out = "".join(f'<p class="note">{escape(str(n))}</p>' for n in as_list(stage.figures.get("notes")))
    rewards = "".join(
        render_reward_report(str(name), as_dict(report))
        for name, report in as_dict(stage.figures.get("reward_reports")).items()
    )
    return f'{listed}<div class="results">{"".join(map(_render_block, blocks))}</div>{note}{left_out}{rewards}'


def _render_block(block: Block) -> str:
    scale = _scale(block)
    reference = find_reference(block)
    explanation = explain_metric(block.task, block.metric)
    explained = f'<p class="note">{escape(explanation)}</p>' if explanation else ""
    counts = {f.n for f in block.figures if f.n is not None}
    n = f" · n = {counts.pop():,}" if len(counts) == 1 else ""
    direction = "" if block.higher_is_better else " · lower is better"
    rows = "".join(_render_figure(block, figure, scale, reference, show_n=bool(counts)) for figure in block.figures)
    changes = "".join(_render_change(c) for c in block.changes)
    listed = f'<ul class="changes">{changes}</ul>' if changes else ""
    metric = "" if block.metric == block.task else escape(say_metric(block.metric))
    what = f"{metric}{n}{direction}".removeprefix(" · ")
    title = f"<h3>{escape(say_task(block.task))} <span>{what}</span></h3>"
    return f'<div class="block">{title}{explained}<table>{rows}</table>{listed}</div>'


def _render_figure(
    block: Block, figure: Figure, scale: tuple[float, float], mark: float | None, *, show_n: bool
) -> str:
    value, interval = show_figure(block, figure)
    extra = f" · n = {figure.n:,}" if show_n and figure.n is not None else ""
    label = f"{figure.subject}: {value}" + (f", 95 % interval {interval}" if interval else "")
    plot = draw_interval(figure.low, figure.value, figure.high, scale, mark, label)
    limits = f'<span class="limits">{escape(interval)}{extra}</span>' if interval or extra else ""
    return (
        f'<tr><td>{escape(figure.subject)}</td><td class="num">{escape(value)}{limits}</td>'
        f'<td class="plot">{plot}</td></tr>'
    )


def _render_change(change: Change) -> str:
    interval = show_interval(change.metric, change.low, change.high, difference=True)
    details = [f"[{interval}]" if interval else "", show_p(change.p_value), change.test]
    kind = _CLASS.get(change.verdict, "same")
    return (
        f"<li>{escape(change.a)} → {escape(change.b)}: "
        f'<b class="{kind}">{escape(show_difference(change.metric, change.difference))}</b>, '
        f'<span class="{kind}">{escape(change.verdict)}</span> '
        f'<span class="how">{escape(", ".join(d for d in details if d))}</span></li>'
    )


def _scale(block: Block) -> tuple[float, float]:
    values = [x for f in block.figures for x in (f.low, f.value, f.high)]
    found = [x for x in [*values, find_reference(block)] if x is not None and math.isfinite(x)]
    if not found:
        return (0.0, 1.0)
    low, high = min(found), max(found)
    pad = 0.08 * (high - low) or abs(high) * 0.05 or 0.5
    return (low - pad, high + pad)


def render_samples(run: RunFiles, *, most: int = 24) -> str:
    """Prompts with the answers of all models side by side."""
    parts = []
    for stage in run.stages:
        if stage.samples:
            title = f"<h3>{escape(stage.model)}</h3>" if stage.model and len(run.models) > 1 else ""
            order = [f.subject for block in read_blocks(stage.figures) for f in block.figures]
            shown = "".join(render_sample(row, list(dict.fromkeys(order))) for row in stage.samples[:most])
            rest = len(stage.samples) - most
            more = f'<p class="soft">{rest} more are in <code>samples.jsonl</code>.</p>' if rest > 0 else ""
            parts.append(title + shown + more)
    return "\n".join(parts)


def render_sample(row: dict[str, Any], order: Sequence[str] = ()) -> str:
    """One prompt and its answers, subjects in the given order."""
    answers, marks = as_dict(row.get("answers")), as_dict(row.get("marks"))
    ranks = {subject: at for at, subject in enumerate(order)}
    answers = dict(sorted(answers.items(), key=lambda item: ranks.get(item[0], len(ranks))))
    head = " · ".join(escape(str(row[k])) for k in ("task", "id") if row.get(k) not in (None, ""))
    cells = "".join(
        f"<div><h4>{escape(str(who))}{_mark(marks.get(who))}</h4>{_render_text(text)}</div>"
        for who, text in answers.items()
    )
    reference = row.get("reference")
    wanted = (
        f'<p class="note">Reference answer: <span class="said">{escape(str(reference))}</span></p>'
        if reference not in (None, "")
        else ""
    )
    return (
        f'<article class="sample"><h4>{head}</h4><div class="prompt">{_render_text(row.get("prompt"))}</div>{wanted}'
        f'<div class="answers">{cells}</div></article>'
    )


def _render_text(text: Any) -> str:
    if isinstance(text, list):  # messages
        text = "\n".join(f"{as_dict(m).get('role', '?')}: {as_dict(m).get('content', '')}" for m in text)
    if text in (None, ""):
        return '<p class="said"><span class="empty">(empty)</span></p>'
    return f'<p class="said">{_SPECIAL.sub(_PALE, escape(str(text)))}</p>'


def _mark(mark: Any) -> str:
    if mark is True:
        return ' <span class="better">✓ right</span>'
    if mark is False:
        return ' <span class="worse">✗ wrong</span>'
    if isinstance(mark, (int, float)):
        return f' <span class="same">{escape(show_value("score", float(mark)))}</span>'
    return f' <span class="same">{escape(str(mark))}</span>' if mark else ""

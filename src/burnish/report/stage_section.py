"""Training stages: what was done, the curves, what became of the data."""

from __future__ import annotations

import math
from html import escape
from statistics import median
from typing import Any

from burnish.clock import show_seconds
from burnish.report.charts import draw_stage
from burnish.report.headline import badge, describe_data
from burnish.report.margin_charts import DRAWN, draw_margins, write_margin_remarks
from burnish.report.numbers import show_count, show_number
from burnish.report.read import RunFiles, StageFiles, as_dict, as_list, as_number

_LEFT_OUT = (
    ("malformed", "malformed, left out"),
    ("over_length", "over the length limit, left out"),
    ("identical", "pairs with two equal answers, left out"),
    ("made_equal", "pairs made equal by a cut, left out"),
    ("leaked", "held-out rows whose prompt is trained on, left out"),
    ("cut", "cut to the length limit"),
    ("duplicates", "duplicates, used all the same"),
    ("apart", "tokenised apart where prompt and answer meet"),
    ("without_eos", "answers without an end token"),
    ("own_turns", "split into one example for each assistant turn"),
)


def render_stages(run: RunFiles) -> str:
    """All training stages, in order; and what is known of others that failed."""
    shown = [s for s in run.stages if not s.evaluates or s.state != "done"]
    return "\n".join(render_stage(stage, several=len(run.models) > 1) for stage in shown)


def render_stage(stage: StageFiles, *, several: bool = False) -> str:
    """One stage."""
    name = f"{stage.model} / {stage.name}" if several and stage.model else stage.name
    parts = [f"<h3>{escape(name)} {badge(stage.state)}</h3>"]
    if not stage.evaluates:
        parts.append(f"<p>{escape(_sentence(stage))}</p>")
    if stage.record.get("error"):
        parts.append(f'<div class="warn bad"><p>{escape(str(stage.record["error"]))}</p></div>')
    warned, noted = write_margin_remarks(stage)
    parts += [f'<div class="warn"><p>{escape(text)}</p></div>' for text in warned]
    remarks = write_stage_remarks(stage) + noted
    if remarks:
        parts.append(f'<ul class="remarks">{"".join(f"<li>{escape(r)}</li>" for r in remarks)}</ul>')
    margins, averaged = draw_margins(stage)
    main, others, window = draw_stage(stage, DRAWN if margins else frozenset())
    if main or margins:
        parts.append(f'<div class="charts">{"".join([*main, *margins])}</div>')
        window = max(window, averaged)
        if window > 1:
            parts.append(f'<p class="note">Lines are means of {window} logged steps, pale lines single ones.</p>')
    elif not stage.evaluates:
        parts.append('<p class="soft">No step has been logged.</p>')
    if others:
        parts.append(
            f"<details><summary>{len(others)} further curve{'' if len(others) == 1 else 's'}</summary>"
            f'<div class="charts">{"".join(others)}</div></details>'
        )
    parts.append(render_data(as_dict(stage.record.get("data"))))
    return "\n".join(part for part in parts if part)


def _sentence(stage: StageFiles) -> str:
    """`300 steps on pocket/chat in 1 min 12 s: 1,024,000 tokens, 14,200 a second; …`"""
    figures, record = stage.figures, stage.record
    steps = as_number(figures.get("steps"))
    if steps is None:
        steps = max((as_number(r.get("step")) or 0 for r in stage.metrics), default=0)
    parts = [f"{show_count(steps)} step{'' if steps == 1 else 's'}"]
    data = describe_data(stage)
    if data:
        parts[0] += f" on {', '.join(data)}"
    seconds = as_number(figures.get("seconds"))
    if seconds:
        parts[0] += f" in {show_seconds(seconds)}"
    tokens, speed = as_number(figures.get("tokens")), _tokens_per_second(stage)
    if tokens:
        parts.append(f"{show_count(tokens)} tokens" + (f" ({show_count(speed)} a second)" if speed else ""))
    trainable = as_dict(record.get("trainable"))
    trained, of = as_number(trainable.get("parameters")), as_number(trainable.get("of"))
    if trained and of:
        part = f"{show_count(trained)} parameters trained ({100 * trained / of:.3g} % of {show_count(of)})"
        parts.append(part if trained != of else f"all {show_count(of)} parameters trained")
    parts += [str(record[k]) for k in ("precision",) if record.get(k)]
    if record.get("attention"):
        parts.append(f"{record['attention']} attention")
    return ", ".join(parts) + "."


def _tokens_per_second(stage: StageFiles) -> float | None:
    speeds = []
    for row in stage.timing:
        direct = as_number(row.get("tokens_per_second"))
        tokens, seconds = as_number(row.get("tokens")), as_number(row.get("seconds"))
        if direct is not None:
            speeds.append(direct)
        elif tokens and seconds:
            speeds.append(tokens / seconds)
    sound = [s for s in speeds if math.isfinite(s)]
    return median(sound) if sound else None


def write_stage_remarks(stage: StageFiles) -> list[str]:
    """What a reader should know about a stage's course: overfitting, steps skipped, an early stop, a resume."""
    figures, out = stage.figures, []
    evaluated = [
        (int(r["step"]), v)
        for r in stage.metrics
        if r.get("kind") == "eval"
        and (v := as_number(r.get("eval_loss"))) is not None
        and math.isfinite(v)
        and as_number(r.get("step")) is not None
    ]
    if len(evaluated) > 2:
        step, lowest = min(evaluated, key=lambda e: e[1])
        last = evaluated[-1][1]
        if last > lowest + 0.02 * abs(lowest):
            out.append(
                f"The held-out loss was lowest at step {step:,} ({show_number(lowest)}) and ended at "
                f"{show_number(last)}: by this measure an earlier checkpoint was better."
            )
    best = as_number(figures.get("best_step"))
    if best is not None and as_dict(stage.record.get("settings")).get("load_best_model_at_end"):
        out.append(f"The result is the best checkpoint, step {best:,.0f}, not the last.")
    if figures.get("stopped_early"):
        out.append("Training stopped early: the evaluation had not improved for as long as was set.")
    skipped = [r for r in stage.metrics if r.get("kind") == "skipped"]
    if skipped:
        steps = ", ".join(str(r.get("step")) for r in skipped[:5]) + (" …" if len(skipped) > 5 else "")
        many = "1 step was" if len(skipped) == 1 else f"{len(skipped)} steps were"
        out.append(f"{many} skipped for a non-finite loss or gradient (step {steps}).")
    resumed = as_number(stage.record.get("resumed_from"))
    if resumed is not None:
        out.append(f"Interrupted and continued from step {resumed:,.0f}.")
    return out


def render_data(data: dict[str, Any]) -> str:
    """What became of the rows, a column for each split."""
    splits = {name: as_dict(split) for name, split in as_dict(data.get("splits")).items()}
    if not splits:
        return ""
    rows: list[tuple[str, list[str]]] = [
        ("rows read", [_count(s.get("rows_read")) for s in splits.values()]),
        ("rows used", [_kept(s) for s in splits.values()]),
    ]
    for key, title in _LEFT_OUT:
        found = [as_dict(s.get(key)) for s in splits.values()]
        if any(as_number(f.get("count")) for f in found):
            rows.append((title, [_named(f) for f in found]))
    if any(as_number(s.get("unused")) for s in splits.values()):
        rows.append(("outside the slice, sample or mixture", [_count(s.get("unused")) for s in splits.values()]))
    rows.append(("tokens of prompts", [_count(s.get("prompt_tokens")) for s in splits.values()]))
    rows.append(("tokens trained on or scored", [_count(s.get("scored_tokens")) for s in splits.values()]))
    names = {"train": "training", "held_out": "held out"}
    head = "".join(f'<th class="num">{escape(names.get(n, n))}</th>' for n in splits)
    body = "".join(
        f"<tr><td>{escape(title)}</td>{''.join(f'<td class=num>{cell}</td>' for cell in cells)}</tr>"
        for title, cells in rows
    )
    notes = [f"held-out rows come from {data['held_out_from']}"] if data.get("held_out_from") else []
    notes += [str(n) for n in as_list(data.get("notes"))]
    notes += [str(n) for s in splits.values() for n in as_list(s.get("notes"))]
    footnote = f'<p class="note">{escape("; ".join(notes))}</p>' if notes else ""
    summary = "; ".join(
        f"{names.get(name, name)} {_count(s.get('kept'))} of {_count(s.get('rows_read'))} rows"
        for name, s in splits.items()
    )
    return (
        f"<p>Data used: {escape(summary)}.</p><details><summary>What became of the rows</summary>"
        f'<div class="wide"><table class="data"><tr><th></th>{head}</tr>{body}</table></div>{footnote}</details>'
    )


def _count(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else show_count(number)


def _kept(split: dict[str, Any]) -> str:
    kept, groups = as_number(split.get("kept")), as_number(split.get("groups"))
    made = f" <span class=soft>({show_count(groups)} examples)</span>" if groups and groups != kept else ""
    return _count(kept) + made


def _named(found: dict[str, Any]) -> str:
    count = as_number(found.get("count")) or 0
    names = [str(n) for n in as_list(found.get("rows"))]
    if not count:
        return "–"
    more = ", …" if count > len(names) else ""
    tip = f' title="{escape(", ".join(names) + more, quote=True)}"' if names else ""
    return f"<span{tip}>{show_count(count)}</span>"

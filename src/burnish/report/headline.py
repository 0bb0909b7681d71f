"""The top of the report: what ran, on what, how long, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from burnish import __version__
from burnish.clock import show_seconds
from burnish.report.numbers import show_count
from burnish.report.page import join_words
from burnish.report.read import RunFiles, StageFiles, as_dict, as_number, as_rows

_OUTCOME = {
    "done": "Finished in {}.",
    "failed": "Failed after {}.",
    "interrupted": "Interrupted after {}; the same command continues it.",
    "running": "Not finished.",
}


def render_headline(run: RunFiles) -> str:
    """Title, one sentence, the few facts everybody asks for, and what went wrong if something did."""
    record = run.record
    name = str(record.get("name") or run.path.name)
    parts = [
        '<p class="kicker">burnish run</p>',
        f"<h1>{escape(name)}</h1>",
        f'<p class="lead">{escape(_sentence(run))}</p>',
        _problems(run),
        _facts(run),
    ]
    return "\n".join(part for part in parts if part)


def _sentence(run: RunFiles) -> str:
    """`sft → reward → dpo → evaluate on pocket. Finished in 4 min 12 s.`"""
    chain = " → ".join(_chain(run)) or "No stage was begun"
    models = run.models if len(run.models) > 1 else [run.resolved.get("model") or _stage_model(run)]
    named = [str(m) for m in models if m]
    on = f" on {join_words(named)}" if named else ""
    state = str(run.record.get("state", "unknown"))
    seconds = _seconds(run)
    outcome = _OUTCOME.get(state, f"{state.capitalize()}.")
    outcome = (
        outcome.format(show_seconds(seconds)) if seconds else outcome.replace(" in {}", "").replace(" after {}", "")
    )
    return f"{chain}{on}. {outcome}"


def _chain(run: RunFiles) -> list[str]:
    """Names of the first model's stages in the recipe's order; those that did not finish say so."""
    begun = {s.name: s for s in run.stages if s.model == run.models[0]}
    names = [str(s.get("name") or s.get("kind")) for s in as_rows(run.resolved.get("stages"))]
    chain = []
    for name in [*names, *(n for n in begun if n not in names)]:
        stage = begun.get(name)
        state = "not run" if stage is None else stage.state
        chain.append(name if state == "done" else f"{name} ({state})")
    return chain if begun else []


def _stage_model(run: RunFiles) -> Any:
    for stage in run.stages:
        model = as_dict(stage.record.get("settings")).get("model")
        if model:
            return model
    return None


def _seconds(run: RunFiles) -> float | None:
    for key in ("seconds_total", "seconds"):
        seconds = as_number(run.record.get(key))
        if seconds:
            return seconds
    timed = [as_number(row.get("seconds")) or 0.0 for stage in run.stages for row in stage.timing]
    return sum(timed) or None


def _facts(run: RunFiles) -> str:
    trained = [s for s in run.stages if not s.evaluates]
    tokens = sum(as_number(s.figures.get("tokens")) or 0 for s in trained)
    own = [
        ("Tokens trained on", show_count(tokens) if tokens else ""),
        ("Data", ", ".join(dict.fromkeys(d for s in trained for d in describe_data(s)))),
        ("Seed", str(run.resolved.get("seed", ""))),
    ]
    return render_facts(run.record, run.environment, own)


def render_facts(record: dict[str, Any], environment: dict[str, Any], own: Sequence[tuple[str, str]]) -> str:
    """The few facts that everybody asks for: those of every run, and (title, text) of this one; empty ones are left out."""
    device = str(environment.get("device") or "")
    where = environment.get("processor") if device in ("", "cpu") else device
    starts = as_number(record.get("starts")) or 1
    torch = as_dict(environment.get("packages")).get("torch", "–")
    facts = [
        ("Began", str(record.get("created") or "")[:16].replace("T", " ")),
        *own,
        ("Ran on", " · ".join(str(p) for p in (where, _plural(environment.get("threads"), "thread")) if p)),
        ("Starts", f"{starts:.0f} (resumed {starts - 1:.0f}×)" if starts > 1 else ""),
        ("Versions", f"burnish {record.get('burnish') or __version__}, torch {torch}"),
    ]
    cells = "".join(f"<div><dt>{title}</dt><dd>{escape(text)}</dd></div>" for title, text in facts if text)
    outcome = badge(str(record.get("state", "unknown")))
    return f'<dl class="facts"><div><dt>Outcome</dt><dd>{outcome}</dd></div>{cells}</dl>'


def describe_data(stage: StageFiles) -> list[str]:
    """Names of a stage's sources."""
    data = as_dict(stage.record.get("settings")).get("data")
    sources = data if isinstance(data, list) else [data]
    return [str(s.get("source")) if isinstance(s, dict) else str(s) for s in sources if s]


def _problems(run: RunFiles) -> str:
    out = []
    if run.record.get("error"):
        message, _, remedy = str(run.record["error"]).partition("\n")
        extra = f"<p>{escape(remedy.strip())}</p>" if remedy.strip() else ""
        out.append(f'<div class="warn bad"><p><b>{escape(message)}</b></p>{extra}</div>')
    notes = [*run.notes, *(f"{s.folder.name}: {n}" for s in run.stages for n in s.notes)]
    if notes:
        items = "".join(f"<p>{escape(n)}</p>" for n in notes)
        out.append(f'<div class="warn">{items}</div>')
    return "".join(out)


def badge(state: str) -> str:
    """A state as a small label."""
    known = state if state in ("done", "failed", "interrupted", "running", "damaged") else "unknown"
    return f'<span class="state {known}">{escape(state)}</span>'


def _plural(count: Any, noun: str) -> str:
    number = as_number(count)
    return "" if number is None else f"{number:.0f} {noun}{'' if number == 1 else 's'}"

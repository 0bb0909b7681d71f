"""`burnish data stats`: how long, how many, how balanced."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TextIO

import numpy as np

from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.data.assemble import Loaded, find_sources, load_all
from burnish.data.example import Example, name_answers
from burnish.data.lengths import Limits
from burnish.data.prepare import build_encoding, reading_of
from burnish.data.problems import ProblemLog
from burnish.data.report import DataReport
from burnish.data.show import tokenizer_or_bundled
from burnish.data.tokenise import encode_examples

QUANTILES = {"min": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "99 %": 0.99, "max": 1.0}
BARS = 10


def run_stats(settings: TrainSettings, *, tokenizer: str | None, out: TextIO, as_json: bool, limit: int = 5) -> int:
    """Print figures of a stage's data: lengths, duplicates, leaks, length bias, labels.

    Args:
        settings: The stage.
        tokenizer: Model whose tokenizer is used; default: the settings' model, else the bundled one.
        out: Where to print.
        as_json: Print one JSON object.
        limit: Rows to name in lists.

    Returns:
        The exit status, 0.

    Raises:
        DataError: The rows are malformed.
    """
    used, note = tokenizer_or_bundled(settings, tokenizer)
    encoding = build_encoding(settings, used, None)
    measured = replace(encoding, limits=Limits(None), drop_identical=True)
    log = ProblemLog(settings.on_error)
    relaxed = settings.model_copy(update={"drop_identical": True})
    loaded = load_all(relaxed, find_sources(settings), reading_of(settings, used), log)
    log.raise_if_due()
    figures: dict[str, Any] = {"splits": {}, "max_length": encoding.limits.total}
    for name, examples in (("train", loaded.train), ("held_out", loaded.held_out)):
        if name in loaded.report.splits:
            groups = encode_examples(examples, measured, log, loaded.report.splits[name])
            figures["splits"][name] = compute_stats(examples, groups, encoding.limits, loaded.report, name, limit)
    log.raise_if_due()
    figures["both_sides"] = both_sides(loaded, limit)
    figures["notes"] = [*([note] if note else []), *log.notes]
    if as_json:
        out.write(json.dumps(figures, ensure_ascii=False) + "\n")
    else:
        out.write("\n".join(_lines(figures)) + "\n")
    return 0


def compute_stats(
    examples: Sequence[Example], groups: Sequence[Group], limits: Limits, report: DataReport, name: str, limit: int
) -> dict[str, Any]:
    """The figures of one split; lengths in tokens, before any cut."""
    counts = report.splits[name]
    lengths: dict[str, list[int]] = {"prompt": [len(group.prompt) for group in groups]}
    for group in groups:
        for part, completion in zip(name_answers(len(group.completions)), group.completions):
            lengths.setdefault(part, []).append(len(completion.ids))
    lengths["total"] = [group.longest for group in groups]
    over = [group.id for group in groups if limits.total is not None and group.longest > limits.total]
    figures: dict[str, Any] = {
        "rows_read": counts.rows_read,
        "rows": len(examples),
        "examples": len(groups),
        "prompts": len({example.prompt_text for example in examples}),
        "tokens": {
            "prompt": counts.prompt_tokens,
            "completion": counts.completion_tokens,
            "scored": counts.scored_tokens,
        },
        "lengths": {part: _quantiles(values) for part, values in lengths.items() if values},
        "histogram": _histogram(lengths["total"]),
        "over_limit": {"count": len(over), "share": len(over) / len(groups) if groups else 0.0, "rows": over[:limit]},
        "malformed": counts.malformed.count,
        "identical": counts.identical.count,
        "duplicates": {"count": counts.duplicates.count, "rows": counts.duplicates.rows[:limit]},
        "tokenised_apart": counts.apart.count,
        "without_eos": counts.without_eos.count,
        "sources": dict(counts.sources),
    }
    if groups and all(len(group.completions) == 2 for group in groups):
        figures["length_bias"] = _length_bias(groups)
    labels = [example.extra["label"] for example in examples if "label" in example.extra]
    if labels:
        figures["labels"] = {"true": sum(labels), "false": len(labels) - sum(labels)}
    margins = [example.columns["margin"] for example in examples if "margin" in example.columns]
    if any(margins):
        figures["margin"] = {k: float(np.quantile(margins, q)) for k, q in QUANTILES.items()}
    return figures


def both_sides(loaded: Loaded, limit: int) -> dict[str, Any]:
    """Prompts that are trained on and evaluated on, those that were left out for it included."""
    trained = {example.prompt_text: example.place for example in loaded.train}
    shared = [(e.place, trained[e.prompt_text]) for e in loaded.held_out if e.prompt_text in trained]
    held_out = loaded.report.splits.get("held_out")
    left_out = held_out.leaked if held_out else None
    rows = [f"{place} (= {other})" for place, other in shared] + (left_out.rows if left_out else [])
    return {"count": len(shared) + (left_out.count if left_out else 0), "rows": rows[:limit]}


def _quantiles(values: Sequence[int]) -> dict[str, float]:
    made = {name: float(np.quantile(values, q)) for name, q in QUANTILES.items()}
    return {**made, "mean": float(np.mean(values))}


def _histogram(values: Sequence[int]) -> list[dict[str, int]]:
    if not values:
        return []
    low, high = min(values), max(values)
    edges = sorted({round(low + (high + 1 - low) * i / BARS) for i in range(BARS + 1)})
    counts, _ = np.histogram(values, bins=edges)
    return [{"from": a, "to": b - 1, "count": int(n)} for a, b, n in zip(edges, edges[1:], counts)]


def _length_bias(groups: Sequence[Group]) -> dict[str, Any]:
    """How often the longer answer is the chosen one; ties apart."""
    longer = sum(len(g.completions[0].ids) > len(g.completions[1].ids) for g in groups)
    shorter = sum(len(g.completions[0].ids) < len(g.completions[1].ids) for g in groups)
    decided = longer + shorter
    return {
        "chosen_longer": longer,
        "chosen_shorter": shorter,
        "equal": len(groups) - decided,
        "longer_wins": longer / decided if decided else 0.5,
    }


def _lines(figures: dict[str, Any]) -> list[str]:
    lines: list[str] = []
    for name, split in figures["splits"].items():
        made = f", {split['examples']:,} examples" if split["examples"] != split["rows"] else ""
        lines.append(
            f"{name}: {split['rows_read']:,} rows read, {split['rows']:,} usable{made}, {split['prompts']:,} prompts"
        )
        tokens = split["tokens"]
        lines.append(
            f"  tokens: prompt {tokens['prompt']:,}, completion {tokens['completion']:,}, scored {tokens['scored']:,}"
        )
        lines += _table(split["lengths"])
        lines += _bars(split["histogram"])
        lines += _further(split, figures["max_length"])
    shared = figures["both_sides"]
    if "held_out" in figures["splits"]:
        lines.append(f"prompts on both sides of the split: {shared['count']:,}{_names(shared['rows'])}")
    return lines + figures["notes"]


def _table(lengths: dict[str, dict[str, float]]) -> list[str]:
    names = [*QUANTILES, "mean"]
    head = "  tokens    " + "".join(f"{name:>9}" for name in names)
    return [
        head,
        *(f"  {part:<10}" + "".join(f"{values[n]:>9,.0f}" for n in names) for part, values in lengths.items()),
    ]


def _bars(histogram: list[dict[str, int]]) -> list[str]:
    most = max((bar["count"] for bar in histogram), default=0)
    width = max((len(f"{bar['from']:,}–{bar['to']:,}") for bar in histogram), default=0)
    return [
        f"  {bar['from']:,}–{bar['to']:,}".ljust(width + 3)
        + f"{'█' * round(40 * bar['count'] / most) or ('▏' if bar['count'] else '')} {bar['count']:,}"
        for bar in histogram
    ]


def _further(split: dict[str, Any], limit: int | None) -> list[str]:
    lines = []
    over = split["over_limit"]
    if limit is not None:
        lines.append(f"  over max_length {limit:,}: {over['count']:,} ({over['share']:.1%}){_names(over['rows'])}")
    for title, key in (
        ("malformed rows left out", "malformed"),
        ("identical pairs", "identical"),
        ("tokenised apart at the border", "tokenised_apart"),
        ("answers without an end token", "without_eos"),
    ):
        if split[key]:
            lines.append(f"  {title}: {split[key]:,}")
    if split["duplicates"]["count"]:
        lines.append(f"  duplicates: {split['duplicates']['count']:,}{_names(split['duplicates']['rows'])}")
    if "length_bias" in split:
        bias = split["length_bias"]
        lines.append(
            f"  the longer answer is chosen in {bias['longer_wins']:.1%} of "
            f"{bias['chosen_longer'] + bias['chosen_shorter']:,} pairs of unequal length ({bias['equal']:,} equal)"
        )
    if "labels" in split:
        lines.append(f"  labels: {split['labels']['true']:,} true, {split['labels']['false']:,} false")
    if len(split["sources"]) > 1:
        lines.append("  by source: " + ", ".join(f"{name} {count:,}" for name, count in split["sources"].items()))
    return lines


def _names(rows: Sequence[str]) -> str:
    return f": {', '.join(rows[:5])}{', …' if len(rows) > 5 else ''}" if rows else ""

"""`burnish data check`: every problem of some data in one pass, with file, line and remedy."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any, TextIO

from burnish.config.train import TrainSettings
from burnish.data.assemble import find_sources, load_all
from burnish.data.prepare import build_encoding, check_outcome, reading_of
from burnish.data.problems import DataProblems, Problem, ProblemLog, listing
from burnish.data.report import DataReport
from burnish.data.tokenise import encode_examples
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import BurnishError


def load_tokenizer(settings: TrainSettings, tokenizer: str | None) -> TextTokenizer | None:
    """The tokenizer that is named, else the stage's model's, else None."""
    name = tokenizer if tokenizer is not None else settings.model
    return TextTokenizer.load(name, revision=settings.revision) if name is not None else None


def run_check(settings: TrainSettings, *, tokenizer: str | None, out: TextIO, as_json: bool, limit: int = 20) -> int:
    """Check the data of a stage and print what is wrong.

    Args:
        settings: The stage.
        tokenizer: Model whose tokenizer is used; without one (here or in the settings) lengths are not checked.
        out: Where to print.
        as_json: Print one JSON object.
        limit: Problems to list; the rest is counted.

    Returns:
        0 = the stage can train on these data, 2 = it cannot.
    """
    log = ProblemLog("raise", listed=limit)
    report, checked = DataReport(), False
    try:
        text_tokenizer = load_tokenizer(settings, tokenizer)
        report, checked = _collect(settings, text_tokenizer, log)
    except DataProblems as error:
        for problem in error.problems:
            log.add(problem)
    except BurnishError as error:
        log.add(Problem(error.where or "data", None, "", error.message, error.remedy, "settings", fatal=True))
    failed = bool(log.fatal) or (log.total > 0 and settings.on_error == "raise")
    if as_json:
        out.write(json.dumps(_as_json(log, report, failed, checked), ensure_ascii=False) + "\n")
    else:
        _print(log, report, failed, checked, out)
    return 2 if failed else 0


def _collect(settings: TrainSettings, tokenizer: TextTokenizer | None, log: ProblemLog) -> tuple[DataReport, bool]:
    """Read everything; without a tokenizer only the rows' form is checked."""
    sources = find_sources(settings)
    loaded = load_all(settings, sources, reading_of(settings, tokenizer), log)
    report = loaded.report
    if tokenizer is None:
        for name, examples in (("train", loaded.train), ("held_out", loaded.held_out)):
            if name in report.splits:
                report.splits[name].kept = report.splits[name].groups = len(examples)
        if not loaded.train and not log.total:
            log.add(Problem("data", None, "", "no training row is left", "widen the slice", "empty", fatal=True))
        return report, False
    encoding = build_encoding(settings, tokenizer, None)
    groups = encode_examples(loaded.train, encoding, log, report.splits["train"])
    if "held_out" in report.splits:
        encode_examples(loaded.held_out, encoding, log, report.splits["held_out"])
    if groups or not log.total:
        check_outcome(groups, report)
    return report, True


def _as_json(log: ProblemLog, report: DataReport, failed: bool, checked: bool) -> dict[str, Any]:
    problems = [{**asdict(problem), "where": problem.where} for problem in log.problems]
    return {
        "ok": not failed,
        "total": log.total,
        "kinds": dict(sorted(log.kinds.items())),
        "problems": problems,
        "dropped": {"total": log.dropped_total, "rows": [asdict(problem) for problem in log.dropped]},
        "notes": list(log.notes),
        "tokens_checked": checked,
        "report": report.to_json(),
    }


def _print(log: ProblemLog, report: DataReport, failed: bool, checked: bool, out: TextIO) -> None:
    for line in listing(log.problems, log.total, log.more):
        out.write(line + "\n")
    if len(log.kinds) > 1 or log.total > len(log.problems):
        counts = ", ".join(f"{name} {count:,}" for name, count in log.kinds.most_common())
        out.write(f"by kind: {counts}\n")
    named = bool(log.total) and not log.dropped
    for line in [*report.lines(), *log.notes]:
        if not (named and "malformed, left out" in line):
            out.write(line + "\n")
    if not checked:
        out.write("tokens and lengths were not checked: name a model (--model) to check them\n")
    if failed:
        out.write(f"{log.total:,} problem{'s' if log.total != 1 else ''}: a stage would refuse these data\n")
    else:
        skipped = f"; {log.total:,} malformed rows would be skipped" if log.total else ""
        out.write(f"ok{skipped}\n")

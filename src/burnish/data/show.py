"""`burnish data show`: rows as the model will see them, with the trained tokens marked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any, TextIO

import numpy as np
from rich.console import Console
from rich.text import Text

from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.data.assemble import find_sources, mapping_of
from burnish.data.check import load_tokenizer
from burnish.data.example import Example, name_answers
from burnish.data.load import iter_examples
from burnish.data.noise import flip_labels
from burnish.data.prepare import build_encoding, find_runs, reading_of
from burnish.data.problems import ProblemLog
from burnish.data.report import SplitReport
from burnish.data.tokenise import encode_examples
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import UsageError

FALLBACK = "pocket"


def run_show(settings: TrainSettings, *, tokenizer: str | None, out: TextIO, as_json: bool, limit: int = 3) -> int:
    """Print the first rows of each source as groups.

    Args:
        settings: The stage.
        tokenizer: Model whose tokenizer and template are used; default: the settings' model, else the bundled one.
        out: Where to print; colours only on a terminal and without NO_COLOR.
        as_json: One JSON object a row, with every token.
        limit: Rows of each source.

    Returns:
        The exit status, 0.

    Raises:
        DataError: The rows are malformed.
    """
    used, note = tokenizer_or_bundled(settings, tokenizer)
    log, report = ProblemLog(settings.on_error), SplitReport()
    encoding = build_encoding(settings, used, None)
    groups: list[Group] = []
    for examples in _first_examples(settings, used, log, report, limit):
        groups += encode_examples(examples, encoding, log, report)
    log.raise_if_due()
    if as_json:
        for group in groups:
            out.write(json.dumps(_as_json(group, used), ensure_ascii=False) + "\n")
        return 0
    console = Console(file=out, highlight=False, soft_wrap=True, no_color=bool(os.environ.get("NO_COLOR")) or None)
    colour = console.is_terminal and not console.no_color
    for group in groups:
        console.print(_rendered(group, used, colour))
    for line in [*([note] if note else []), *report.lines()[1:], *log.notes]:
        console.print(Text(line))
    return 0


def tokenizer_or_bundled(settings: TrainSettings, tokenizer: str | None) -> tuple[TextTokenizer, str]:
    """The tokenizer that is named, else the bundled model's with a note.

    Raises:
        UsageError: None is named and none is bundled.
    """
    found = load_tokenizer(settings, tokenizer)
    if found is not None:
        return found, ""
    from burnish.data.bundled import resolve_model

    if resolve_model(FALLBACK) is None:
        raise UsageError(
            "no model is named, so there is no tokenizer", where="--model", remedy="name one: --model MODEL"
        )
    return TextTokenizer.load(
        FALLBACK
    ), f"note: no model is named; these are the tokens of {FALLBACK} (--model chooses)"


def _first_examples(
    settings: TrainSettings, tokenizer: TextTokenizer, log: ProblemLog, report: SplitReport, limit: int
) -> Iterator[list[Example]]:
    for source in find_sources(settings).train:
        reading = replace(reading_of(settings, tokenizer), format=source.settings.format)
        mapping = mapping_of(source, settings)
        rows = iter_examples(source, source.split, reading, mapping, log, report, settings.drop_identical)
        examples = list(islice(rows, limit))
        flip_labels(examples, settings.flip_share, settings.seed, report)
        yield examples


def _rendered(group: Group, tokenizer: TextTokenizer, colour: bool) -> Text:
    """A group as text: the prompt dim, scored tokens green (or between « and »), unscored ones grey."""
    text = Text()
    columns = "".join(f" {name}={value:g}" for name, value in group.columns.items())
    text.append(f"── {group.id}{columns}\n", style="bold")
    text.append(f"prompt, {len(group.prompt)} tokens\n", style="cyan")
    text.append(tokenizer.decode(group.prompt.tolist()), style="dim" if colour else "")
    text.append("⏎ the prompt ends here\n" if colour else "⏎\n", style="cyan")
    for name, completion in zip(name_answers(len(group.completions)), group.completions):
        text.append(f"{name}, {len(completion.ids)} tokens, {completion.scored} scored\n", style="cyan")
        for run, scored in find_runs(completion):
            piece = tokenizer.decode(run)
            if colour:
                text.append(piece, style="green" if scored else "dim")
            else:
                text.append(f"«{piece}»" if scored else piece)
        text.append("\n")
    return text


def _as_json(group: Group, tokenizer: TextTokenizer) -> dict[str, Any]:
    def tokens(ids: np.ndarray, mask: np.ndarray) -> list[dict[str, Any]]:
        return [{"id": int(i), "text": tokenizer.decode([int(i)]), "scored": bool(m)} for i, m in zip(ids, mask)]

    completions = [
        {"name": name, "text": tokenizer.decode(c.ids.tolist()), "tokens": tokens(c.ids, c.mask)}
        for name, c in zip(name_answers(len(group.completions)), group.completions)
    ]
    return {
        "id": group.id,
        "prompt": {
            "text": tokenizer.decode(group.prompt.tolist()),
            "tokens": tokens(group.prompt, np.zeros(len(group.prompt), bool)),
        },
        "completions": completions,
        "columns": dict(group.columns),
        "tags": dict(group.tags),
    }

"""Prompts for evaluation and sampling: what the model is asked, its ids, and what a right answer is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from burnish.config.data import DataSource
from burnish.data.columns import apply_mapping, find_mapping
from burnish.data.example import Example, Reading
from burnish.data.formats import normalise
from burnish.data.problems import ProblemLog, RowDropped, RowError
from burnish.data.readers import Row
from burnish.data.slices import Split
from burnish.data.sources import as_sources, resolve_source
from burnish.data.template import load_template
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import DataError

_TEXTS = (str, int, float, bool)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to be answered.

    Attributes:
        id: The row's name ("test.jsonl.gz:17").
        text: The prompt as it is tokenised: rendered with the generation prompt, or the plain text.
        prompt_ids: Its token ids, BOS included where the tokenizer puts one.
        answer: What is checked: GSM8K's number behind ####, else the column answer or ground_truth; "" if none.
        reference: A reference answer in full (worked solution, chosen), "" if none.
        source: Name of the source.
    """

    id: str
    text: str
    prompt_ids: list[int]
    answer: str
    reference: str
    source: str


def load_prompts(
    source: str | DataSource | list[str | DataSource], tokenizer: TextTokenizer, *, chat_template: str | None = None
) -> list[PromptRow]:
    """The prompts of a source, or of several: of their test splits where they have one and name no split.

    Args:
        source: A source, or several.
        tokenizer: The model's tokenizer.
        chat_template: A file or a text; default: the tokenizer's own, else the plain one.

    Raises:
        DataError: Malformed rows, or no prompt at all.
    """
    template = load_template(chat_template, tokenizer)
    chat = tokenizer.chat_template is not None or chat_template is not None
    log = ProblemLog()
    found: list[tuple[Example, Mapping[str, Any], str, str]] = []  # with the text and the name of the source
    for settings in as_sources(source):
        place = resolve_source(settings)
        mapping = find_mapping(settings.columns)
        reading = Reading("prompt", chat, "instruct" if mapping and mapping.chat else settings.format)
        split = Split(place.held_out) if settings.split is None and place.held_out else place.split
        for row in place.rows(split, log):
            try:
                data = apply_mapping(row.data, mapping)
                example = normalise(Row(row.file, row.line, data), reading)
                text = example.prompt
                if example.form == "chat":
                    text = template.render(example.prompt, add_generation_prompt=True, tools=example.tools)
                found.append((example, data, text, place.name))
            except RowDropped as dropped:
                log.drop(dropped.at(row.file, row.line))
            except RowError as error:
                log.add(error.at(row.file, row.line))
    log.raise_if_due()
    if not found:
        raise DataError("there is no prompt in these data", where=str(source), remedy="give another source or split")
    rows = []
    for (example, data, text, name), ids in zip(found, tokenizer.encode_many([text for _, _, text, _ in found])):
        plain = example.form != "chat" or template.is_default
        if plain and tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        rows.append(PromptRow(example.place, text, ids, *_find_answers(example, data), name))
    return rows


def _find_answers(example: Example, data: Mapping[str, Any]) -> tuple[str, str]:
    """(what is checked, a reference answer in full) of a row."""
    answer = example.extra.get("answer", data.get("answer", data.get("ground_truth", "")))
    reference = example.extra.get("reference", data.get("reference", data.get("completion", "")))
    if not reference and isinstance(data.get("chosen"), list) and data["chosen"]:
        reference = data["chosen"][-1].get("content", "") if isinstance(data["chosen"][-1], dict) else ""
    return str(answer) if isinstance(answer, _TEXTS) else "", reference if isinstance(reference, str) else ""

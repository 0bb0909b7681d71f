"""Prompts for evaluation and sampling: what the model is asked, its ids, and what a right answer is checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from burnish.config.data import DataSource
from burnish.data.columns import apply_mapping, find_mapping
from burnish.data.example import Example, Reading
from burnish.data.formats import normalise
from burnish.data.messages import Message
from burnish.data.problems import ProblemLog, RowDropped, RowError
from burnish.data.readers import Row
from burnish.data.slices import Split
from burnish.data.sources import Source, as_sources, resolve_source
from burnish.data.splits import sample_rows
from burnish.data.template import ChatTemplate, load_template
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import DataError

_TEXTS = (str, int, float, bool)
_NOT_TAGS = (
    "id",
    "question",
    "answer",
    "prompt",
    "text",
    "reference",
    "ground_truth",
    "chosen",
    "rejected",
    "completion",
)


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to be answered.

    Attributes:
        id: The row's name ("test.jsonl.gz:17").
        messages: The conversation, which ends in a user's (or tool's) turn; None if the prompt is a plain text.
        text: The prompt as it is tokenised: rendered with the generation prompt, or the plain text.
        prompt_ids: Its token ids, BOS included where the tokenizer puts one.
        answer: What is checked: GSM8K's number behind ####, else the column answer or ground_truth; "" if none.
        reference: A reference answer in full (worked solution, chosen), "" if none.
        tags: Short columns of the row (level, source …) by which results may be split.
        prompt_text: The prompt with even white space, to find the same prompt elsewhere.
    """

    id: str
    messages: list[Message] | None
    text: str
    prompt_ids: list[int]
    answer: str = ""
    reference: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)
    prompt_text: str = ""


def load_prompts(
    source: str | DataSource | list[str | DataSource],
    tokenizer: TextTokenizer,
    *,
    split: str | None = None,
    held_out: bool = True,
    max_items: int | None = None,
    seed: int = 42,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
    columns: Mapping[str, str] | str | None = None,
    max_prompt_length: int | None = None,
    on_error: str = "raise",
) -> list[PromptRow]:
    """The prompts of a source.

    Args:
        source: A source, or several.
        tokenizer: The model's tokenizer.
        split: The split to read; default: the source's own, see `held_out`.
        held_out: Without a split, prefer the source's test split to its train split.
        max_items: A seeded sample of at most this many prompts.
        seed: Seed of that sample.
        chat_template: A file or a text; default: the tokenizer's own, else the plain one.
        chat_template_kwargs: Further variables for it.
        columns: Column mapping of sources that have none of their own.
        max_prompt_length: Longer prompts are left out.
        on_error: "raise" or "skip" malformed rows.

    Raises:
        DataError: Malformed rows, or no prompt at all.
    """
    template = load_template(chat_template, tokenizer, chat_template_kwargs)
    chat = tokenizer.chat_template is not None or chat_template is not None
    log = ProblemLog("skip" if on_error == "skip" else "raise")
    found: list[PromptRow] = []
    for settings in as_sources(source):
        chosen = settings.model_copy(update={"split": split}) if split is not None else settings
        place = resolve_source(chosen)
        own = find_mapping(settings.columns if settings.columns is not None else _plain_mapping(columns))
        reading = Reading("prompt", chat, "instruct" if own and own.chat else settings.format)
        for row in place.rows(_split_of(place, split, held_out, settings), log):
            try:
                data = apply_mapping(row.data, own)
                example = normalise(Row(row.file, row.line, data), reading)
                found.append(_prompt_row(example, data, template, place.name))
            except RowDropped as dropped:
                log.drop(dropped.at(row.file, row.line))
            except RowError as error:
                log.add(error.at(row.file, row.line))
    log.raise_if_due()
    sampled = sample_rows(found, lambda p: p.id, max_items, seed) if max_prompt_length is None else found
    rows = _with_ids(sampled, template, tokenizer)
    if max_prompt_length is not None:
        rows = [row for row in rows if len(row.prompt_ids) <= max_prompt_length]
        rows = sample_rows(rows, lambda p: p.id, max_items, seed)
    if not rows:
        raise DataError("there is no prompt in these data", where=str(source), remedy="give another source or split")
    return rows


def _plain_mapping(columns: Mapping[str, str] | str | None) -> dict[str, str] | str | None:
    return dict(columns) if isinstance(columns, Mapping) else columns


def _split_of(place: Source, split: str | None, held_out: bool, settings: DataSource) -> Split:
    if split is None and settings.split is None and held_out and place.held_out:
        return Split(place.held_out)
    return place.split


def _prompt_row(example: Example, data: Mapping[str, Any], template: ChatTemplate, source: str) -> PromptRow:
    """The prompt of an example; its ids are filled in later, all at once."""
    if example.form == "chat":
        messages, text = (
            example.prompt,
            template.render(example.prompt, add_generation_prompt=True, tools=example.tools),
        )
    else:
        messages, text = None, example.prompt
    tags = {"source": source}
    for name, value in data.items():
        if isinstance(value, _TEXTS) and name not in _NOT_TAGS and len(str(value)) <= 64:
            tags[name] = str(value)
    answer = example.extra.get("answer", data.get("answer", data.get("ground_truth", "")))
    reference = example.extra.get("reference", data.get("reference", data.get("completion", "")))
    if not reference and isinstance(data.get("chosen"), list) and data["chosen"]:
        reference = data["chosen"][-1].get("content", "") if isinstance(data["chosen"][-1], dict) else ""
    return PromptRow(
        id=example.place,
        messages=messages,
        text=text,
        prompt_ids=[],
        answer=str(answer) if isinstance(answer, _TEXTS) else "",
        reference=reference if isinstance(reference, str) else "",
        tags=tags,
        prompt_text=example.prompt_text,
    )


def _with_ids(rows: list[PromptRow], template: ChatTemplate, tokenizer: TextTokenizer) -> list[PromptRow]:
    encoded = tokenizer.encode_many([row.text for row in rows]) if rows else []
    filled = []
    for row, ids in zip(rows, encoded):
        plain = row.messages is None or template.is_default
        if plain and tokenizer.adds_bos and tokenizer.bos_id is not None and ids[:1] != [tokenizer.bos_id]:
            ids = [tokenizer.bos_id, *ids]
        filled.append(
            PromptRow(row.id, row.messages, row.text, ids, row.answer, row.reference, row.tags, row.prompt_text)
        )
    return filled

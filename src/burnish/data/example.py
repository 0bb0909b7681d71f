"""A row in one form for all shapes: a prompt and its completions, before rendering."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from burnish.config.spec import RowShape
from burnish.data.messages import Message
from burnish.data.problems import Problem, RowError, row_name

Form = Literal["text", "plain", "chat", "hh", "ids"]


@dataclass(slots=True)
class Example:
    """A row as a prompt and its completions, before it is rendered.

    Attributes:
        file: The file it came from, as the user named it.
        line: Its line.
        form: How to read `prompt` and `completions`: `text` (one text, no prompt), `plain` (texts), `chat` (messages),
            `hh` (a raw dialogue: prompt text and segments), `ids` (token ids with masks).
        prompt: The prompt in that form.
        completions: One (SFT) or two (chosen, rejected) in that form.
        opening: What the conversation begins with; rows with the same opening stay on one side of a split.
        prompt_text: The whole prompt, to find the same prompt elsewhere.
        conversation: The completion may hold user turns (a whole conversation).
        tools: Tool descriptions for the template.
        columns: Numbers of the row (margin).
        extra: Further columns for evaluation (answer, reference …).
        source: Name of the source.
    """

    file: str
    line: int
    form: Form
    prompt: Any
    completions: list[Any]
    opening: str
    prompt_text: str
    conversation: bool = False
    tools: list[Any] | None = None
    columns: dict[str, float] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def place(self) -> str:
        """The row's short name, `file:line`."""
        return row_name(self.file, self.line)


@dataclass(frozen=True, slots=True)
class Reading:
    """How rows are to be read.

    Attributes:
        want: What is needed of a row: a completion, a pair, a completion with a label (or a pair, which is one of each),
            or only a prompt.
        chat: Dialogues become messages for a chat template; otherwise they stay raw text.
        format: A shape's name, or "auto".
        strip_think: Remove reasoning blocks from answers.
        strip_control: Remove control characters instead of refusing them.
    """

    rows: RowShape
    chat: bool = True
    format: str = "auto"
    strip_think: bool = False
    strip_control: bool = False


def name_answers(count: int) -> tuple[str, ...]:
    """What the completions of a row are called, by how many there are."""
    return ("chosen", "rejected") if count == 2 else ("completion",) * count


def refuse_identical(example: Example) -> Problem:
    """The problem of a pair whose two answers are equal."""
    error = RowError(
        "chosen and rejected are equal",
        kind="identical pair",
        field="rejected",
        remedy="remove such rows, or set drop_identical: true (then left out and counted)",
    )
    return error.at(example.file, example.line)


def content_text(example: Example) -> str:
    """What a row says, prompt and completions, as one text: equal for equal rows, wherever they stand."""
    return json.dumps([example.prompt, example.completions], default=_plain, sort_keys=True)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    return (
        [getattr(value, name) for name in value.__dataclass_fields__]
        if hasattr(value, "__dataclass_fields__")
        else str(value)
    )


def identical(example: Example) -> bool:
    """Whether a pair's two answers are the same."""
    if len(example.completions) != 2:
        return False
    a, b = example.completions
    if example.form == "ids":
        return a.ids == b.ids
    if example.form == "chat":
        return _comparable(a) == _comparable(b)
    if example.form == "hh":
        return "".join(s.text for s in a).strip() == "".join(s.text for s in b).strip()
    return a.strip() == b.strip()


def _comparable(messages: list[Message]) -> list[Any]:
    return [{**m, "content": m["content"].strip()} for m in messages]

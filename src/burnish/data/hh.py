"""The strict parser for raw HH-RLHF dialogues (`\\n\\nHuman: …\\n\\nAssistant: …`).

A turn begins at a tag that stands after a blank line; the words "Human:" or "Assistant:" within a message begin none.
A pair is split at the last assistant tag of `chosen`; the prompt keeps the tag. A row is dropped, and named, when
`rejected` does not begin with that prompt, or when the prompt or an answer is empty.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from burnish.data.problems import RowDropped

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_TAG = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn of a dialogue: role "user" or "assistant", the raw text behind its tag."""

    role: str
    text: str


@dataclass(frozen=True, slots=True)
class HHPair:
    """A parsed pair: the prompt's text with the last assistant tag, and both answers' text."""

    prompt: str
    chosen: str
    rejected: str


def looks_like_hh(text: object) -> bool:
    """Whether a value is a raw HH dialogue."""
    if not isinstance(text, str):
        return False
    bare = _normalise(text)
    return bare.startswith(HUMAN) and (text.startswith("\n\n") or ASSISTANT in bare)


def parse_pair(chosen: str, rejected: str) -> HHPair:
    """The common prompt and the two answers.

    Raises:
        RowDropped: The rules drop this row.
    """
    chosen, rejected = _normalise(chosen), _normalise(rejected)
    prompt, answer = _cut(chosen, "chosen")
    if not rejected.startswith(prompt):
        raise RowDropped("rejected does not begin with the prompt of chosen", kind="hh: not prefixed", field="rejected")
    pair = HHPair(prompt, answer, _without_newline(rejected[len(prompt) :]))
    for field, text in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        if not first_answer(text).strip():
            raise RowDropped("the answer is empty", kind="hh: empty", field=field)
    return pair


def parse_dialogue(text: str, field: str = "chosen") -> list[Turn]:
    """The turns of a dialogue, without a trailing human turn.

    Raises:
        RowDropped: No assistant turn, or an empty last one.
    """
    turns = split_turns(_normalise(text))
    while turns and turns[-1].role == "user":
        turns.pop()
    if not turns:
        raise RowDropped("the dialogue has no assistant turn", kind="hh: no answer", field=field)
    if turns[0].role != "user":
        raise RowDropped("the prompt is empty", kind="hh: empty", field=field)
    if not turns[-1].text.strip():
        raise RowDropped("the answer is empty", kind="hh: empty", field=field)
    return turns


def split_turns(text: str) -> list[Turn]:
    """The turns of a text that begins with a tag; text before the first tag is an error.

    Raises:
        RowDropped: It does not begin with a tag.
    """
    tags = list(_TAG.finditer(text))
    if not tags or text[: tags[0].start()].strip():
        raise RowDropped("the dialogue does not begin with a Human: or Assistant: tag", kind="hh: no tag", field="")
    ends = [tag.start() for tag in tags[1:]] + [len(text)]
    return [Turn(_ROLES[tag.group(1)], text[tag.end() : end]) for tag, end in zip(tags, ends)]


def join_turns(turns: list[Turn]) -> str:
    """The raw text of turns."""
    return "".join((HUMAN if turn.role == "user" else ASSISTANT) + turn.text for turn in turns)


def merge_turns(turns: list[Turn]) -> list[Turn]:
    """Neighbours of one role as one turn: chat templates know only alternating roles."""
    merged: list[Turn] = []
    for turn in turns:
        if merged and merged[-1].role == turn.role:
            merged[-1] = Turn(turn.role, f"{merged[-1].text.rstrip()}\n\n{turn.text.strip()}")
        else:
            merged.append(turn)
    return merged


def first_answer(text: str) -> str:
    """An answer up to a following human turn."""
    return text.split(HUMAN, 1)[0]


def to_messages(turns: list[Turn]) -> list[dict[str, str]]:
    """Turns as messages: merged, white space at both ends removed."""
    return [{"role": turn.role, "content": turn.text.strip()} for turn in merge_turns(turns)]


def _normalise(text: str) -> str:
    text = text.replace("\r\n", "\n")
    return text if text.startswith("\n\n") else "\n\n" + text.lstrip("\n")


def _without_newline(text: str) -> str:
    return text[1:] if text.startswith("\n") else text


def _cut(text: str, field: str) -> tuple[str, str]:
    head, tag, answer = text.rpartition(ASSISTANT)
    if not tag:
        raise RowDropped("there is no Assistant: turn", kind="hh: no answer", field=field)
    if not head.strip():
        raise RowDropped("the prompt is empty", kind="hh: empty", field=field)
    return head + tag, _without_newline(answer)

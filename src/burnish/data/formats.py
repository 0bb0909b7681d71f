"""Row shapes: which one a row has, and the checks that all of them share."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from burnish.config.spec import RowShape
from burnish.data import shapes
from burnish.data.example import Example, Form, Reading, name_answers
from burnish.data.problems import SKIP_REMEDY, RowError
from burnish.data.readers import Row
from burnish.data.strict_json import describe
from burnish.data.tokenised import read_tokenised
from burnish.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """A row shape: its name, the columns that show it, and what reads it."""

    name: str
    columns: tuple[str, ...]
    gives: frozenset[str]
    read: Callable[[Row, Reading], Example]


def normalise(row: Row, reading: Reading) -> Example:
    """The row as an example.

    Raises:
        RowError: It has no known shape, or something in it is wrong.
    """
    data = {name: value for name, value in row.data.items() if value is not None}
    row = Row(row.file, row.line, data)
    shape = _recognise(data, reading)
    example = shape.read(row, _reading_for(shape, reading))
    if "margin" in data and reading.rows == "pair":
        example.columns["margin"] = _number(data["margin"], "margin")
    if reading.rows != "prompt":
        _check_answers(example)
    return example


def _gives(shape: Shape, rows: RowShape) -> bool:
    """Whether a shape gives what is wanted; a pair is also a good and a bad row."""
    return rows in shape.gives or (rows == "label" and "pair" in shape.gives)


def _reading_for(shape: Shape, reading: Reading) -> Reading:
    """How a shape reads a row of which a label is wanted: as a pair where it has one."""
    return replace(reading, rows="pair") if reading.rows == "label" and "pair" in shape.gives else reading


def check_format(name: str, rows: RowShape) -> None:
    """Refuse a setting `format` that does not exist, or that cannot give what the stage needs.

    Raises:
        ConfigError: With the names that there are.
    """
    if name in ("auto", "instruct"):
        return
    fitting = [shape.name for shape in SHAPES.values() if _gives(shape, rows)]
    if name not in SHAPES:
        near = difflib.get_close_matches(name, SHAPES, 1)
        hint = f"did you mean {near[0]}? " if near else ""
        message, remedy = f"there is no row format {name!r}", f"{hint}known are auto, instruct, {', '.join(fitting)}"
        raise ConfigError(message, where="data.format", remedy=remedy)
    if name not in fitting:
        message = f"rows of the format {name!r} give no {rows}, which this stage needs"
        raise ConfigError(message, where="data.format", remedy=f"formats that do: auto, instruct, {', '.join(fitting)}")


def _recognise(data: Mapping[str, Any], reading: Reading) -> Shape:
    if reading.format not in ("auto", "instruct"):
        shape = SHAPES[reading.format]
        missing = [name for name in shape.columns if name not in data]
        if missing:
            raise missing_columns(missing, data)
        return shape
    for shape in SHAPES.values():
        if _gives(shape, reading.rows) and all(name in data for name in shape.columns):
            if shape.name == "hh" and not shapes.is_hh(data):
                continue
            return shape
    raise _no_shape(data, reading.rows)


def _no_shape(data: Mapping[str, Any], rows: RowShape) -> RowError:
    """The error for a row of no known shape: what lacks of the nearest one, or which there are."""
    nearest, best = None, (0.0, 0)
    for shape in SHAPES.values():
        if not _gives(shape, rows) or shape.name == "hh":
            continue
        near = sum(bool(difflib.get_close_matches(n, data, 1, 0.7)) for n in shape.columns if n not in data)
        present = sum(n in data for n in shape.columns)
        score = (present + 0.9 * near, -len(shape.columns))
        if score > best and score[0] > 0:
            nearest, best = shape, score
    if nearest is not None:
        return missing_columns([name for name in nearest.columns if name not in data], data)
    accepted = " | ".join("+".join(s.columns) for s in SHAPES.values() if _gives(s, rows) and s.name != "hh")
    first = {
        "pair": "chosen: <your column>, rejected: <your column>",
        "label": "prompt: <your column>, completion: <your column>, label: <your column>",
        "prompt": "prompt: <your column>",
    }.get(rows, "prompt: <your column>, completion: <your column>")
    return RowError(
        f"no known row shape; columns found: {', '.join(map(str, data)) or 'none'}; accepted: {accepted}",
        kind="missing column",
        remedy=f"rename the columns, or set data.columns: {{{first}}}",
    )


def missing_columns(missing: Iterable[str], data: Iterable[str]) -> RowError:
    """The error for columns that are not there: which are, the mapping to set, the nearest name."""
    present, missing = list(data), list(missing)
    hints = []
    for name in missing:
        near = difflib.get_close_matches(name, present, 1, 0.7)
        hints.append(f"{name}: {near[0]}" if near else f"{name}: <your column>")
    guesses = [hint for hint in hints if "<" not in hint]
    meant = f" (did you mean {guesses[0].split(': ')[1]!r}?)" if guesses else ""
    return RowError(
        f"missing column {', '.join(map(repr, missing))}{meant}; columns found: {', '.join(present) or 'none'}",
        kind="missing column",
        field=missing[0],
        remedy=f"rename the column, or set data.columns: {{{', '.join(hints)}}}",
    )


def _number(value: Any, name: str) -> float:
    try:
        if isinstance(value, bool):
            raise ValueError
        return float(value)
    except (TypeError, ValueError):
        raise RowError(f"expected a number, found {describe(value)}", kind="type", field=name) from None


def _check_answers(example: Example) -> None:
    """Refuse empty answers and, for pairs, equal ones."""
    for name, completion in zip(name_answers(len(example.completions)), example.completions):
        if not _scored_text(example.form, completion).strip():
            raise RowError(
                "the answer is empty", kind="empty answer", field=name, remedy=f"fill or remove the row; {SKIP_REMEDY}"
            )


def _scored_text(form: Form, completion: Any) -> str:
    if form == "chat":
        last = completion[-1]
        return last["content"] or ("call" if last.get("tool_calls") else "")
    if form == "hh":
        return next((s.text for s in reversed(completion) if s.scored), "")
    return "x" if form == "ids" else completion


_ANY = frozenset({"completion", "pair", "prompt"})
_ONE = frozenset({"completion", "prompt"})

SHAPES: dict[str, Shape] = {
    shape.name: shape
    for shape in (
        Shape(
            "tokenised_pair",
            ("input_ids_chosen", "input_ids_rejected"),
            frozenset({"completion", "pair"}),
            read_tokenised,
        ),
        Shape("tokenised", ("input_ids",), frozenset({"completion"}), read_tokenised),
        Shape("judged", ("prompt_messages", "chosen", "rejected"), _ANY, shapes.read_judged),
        Shape("rollout", ("prompt_messages",), frozenset({"prompt"}), shapes.read_judged),
        Shape("hh", ("chosen", "rejected"), _ANY, shapes.read_hh),
        Shape("preference", ("chosen", "rejected"), _ANY, shapes.read_pair),
        Shape("messages", ("messages",), _ONE, shapes.read_messages),
        # a conversation of from and value
        Shape("sharegpt", ("conversations",), _ONE, shapes.read_sharegpt),
        Shape("alpaca", ("instruction", "output"), _ONE, shapes.read_alpaca),
        Shape("prompt_completion", ("prompt", "completion"), frozenset({"completion"}), shapes.read_completion),
        # prompt and completion with a label: true = good, false = bad
        Shape("labelled", ("prompt", "completion", "label"), frozenset({"label"}), shapes.read_labelled),
        Shape("question_answer", ("question", "answer"), _ONE, shapes.read_question),
        Shape("prompt", ("prompt",), frozenset({"prompt"}), shapes.read_prompt),
        # plain text, all of it trained on
        Shape("text", ("text",), frozenset({"completion"}), shapes.read_text),
    )
}

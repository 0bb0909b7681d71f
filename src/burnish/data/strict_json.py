"""JSON without the surprises of Python's reader: duplicate keys, NaN, huge numbers and deep nesting are errors."""

from __future__ import annotations

import json
import math
from typing import Any

from burnish.data.problems import SKIP_REMEDY, RowError


class _Refused(ValueError):
    def __init__(self, message: str, kind: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.kind, self.remedy = message, kind, remedy


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _Refused(
                    f"the key {key!r} stands twice in one object",
                    "duplicate key",
                    f"keep one of the two; {SKIP_REMEDY}",
                )
            seen.add(key)
    return found


def _constant(name: str) -> float:
    raise _Refused(f"{name} is not a JSON number", "number", f"write null or a number instead; {SKIP_REMEDY}")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise _Refused(f"the number {text[:40]} is too large", "number", f"write a finite number; {SKIP_REMEDY}")
    return value


def _integer(text: str) -> int:
    if len(text) > 400:
        raise _Refused(f"an integer of {len(text)} digits", "number", f"write it as a text; {SKIP_REMEDY}")
    return int(text)


_DECODER = json.JSONDecoder(
    object_pairs_hook=_no_duplicates, parse_constant=_constant, parse_float=_finite, parse_int=_integer
)


def parse_json(text: str, start: int = 0) -> tuple[Any, int]:
    """The JSON value that begins at `start` (white space skipped), and where it ends.

    Raises:
        RowError: With the column in the message.
    """
    start = skip_space(text, start)
    try:
        return _DECODER.raw_decode(text, start)
    except _Refused as error:
        raise RowError(error.message, kind=error.kind, remedy=error.remedy) from error
    except json.JSONDecodeError as error:
        near = text[max(0, error.pos - 20) : error.pos + 20]
        raise RowError(
            f"not valid JSON: {error.msg.rstrip('. ')} at column {error.colno} (near {near!r})", kind="json"
        ) from error
    except RecursionError:
        raise RowError(
            "brackets nest too deeply", kind="nesting", remedy=f"flatten the value or store it as a text; {SKIP_REMEDY}"
        ) from None


def parse_row(text: str) -> dict[str, Any]:
    """The JSON object that is the whole of `text`.

    Raises:
        RowError: It is not one valid object.
    """
    value, end = parse_json(text)
    rest = skip_space(text, end)
    if rest != len(text):
        raise RowError(
            f"not valid JSON: further text after the value at column {rest + 1} ({text[rest : rest + 20]!r})",
            kind="json",
            remedy=f"one JSON object a line; {SKIP_REMEDY}",
        )
    return as_object(value)


def as_object(value: Any) -> dict[str, Any]:
    """The value if it is an object with columns.

    Raises:
        RowError: It is something else.
    """
    if isinstance(value, dict):
        return value
    raise RowError(f'expected an object like {{"prompt": …}}, found {describe(value)}', kind="type", remedy=SKIP_REMEDY)


def describe(value: Any) -> str:
    """A value as messages name it: its JSON type and the beginning of its text."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {str(value)[:40]}"
    if isinstance(value, str):
        return f"the text {value[:40]!r}" + ("…" if len(value) > 40 else "")
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    if isinstance(value, dict):
        return f"an object with {', '.join(map(str, list(value)[:6])) or 'no keys'}"
    return f"a {type(value).__name__}"


def skip_space(text: str, start: int) -> int:
    """The first position from `start` on that is no white space."""
    while start < len(text) and text[start] in " \t\r\n":
        start += 1
    return start

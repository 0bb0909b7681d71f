"""Reading the final number of an answer, and comparing it exactly.

The rule, in order:

1. The text is normalised: compatibility forms (full-width digits) become plain ones, invisible characters go.
2. What stands inside `<think>…</think>` is no answer; an unclosed `<think>` leaves no answer.
3. With `####` in the text, the answer is the number right behind it ("#### 17", "#### $1,234.50 in all"). No number
   behind it: no answer. Several `####` with different numbers: ambiguous, which is no answer either.
4. Without `####`, the answer is the last number in the text.

Numbers are `-3`, `1,234`, `18.00`, `3/4`, `50%` (= 50), with at most 60 digits; `1e5`, `1,00` and `1.2.3` are none.
"""

from __future__ import annotations

import re
import unicodedata
from collections import deque
from dataclasses import dataclass
from fractions import Fraction

MARKER = re.compile(r"#{4,}")
_DIGITS = 60
_WHOLE = r"(?:[0-9]{1,3}(?:,[0-9]{3})++|[0-9]++)(?:\.[0-9]++)?+"
_NUMBER = re.compile(
    r"(?<![0-9A-Za-z_.,/])(?:(?<![0-9A-Za-z)])[-+])?\$?(?P<top>" + _WHOLE + r")(?:/(?P<bottom>[0-9]++))?+"
    r"(?![0-9]|[.,/][0-9]|[eE][-+]?[0-9])"
)
_BEHIND = re.compile(r"[\s*=:$]*")


@dataclass(frozen=True, slots=True)
class FinalNumber:
    """What was read: the number, or why there is none ("no_answer", "ambiguous", "too_large")."""

    value: Fraction | None
    reason: str = ""


def parse_final_number(text: str) -> FinalNumber:
    """The final number of an answer by the rule at the top of this module."""
    text = _normalise(text)
    lowered = text.lower()
    closed = lowered.rfind("</think>")
    if lowered.rfind("<think>") > closed:
        return FinalNumber(None, "no_answer")
    if closed >= 0:
        text = text[closed + len("</think>") :]
    marked = MARKER.split(text)[1:]
    if marked:
        return _read_marked(marked)
    found = deque(_NUMBER.finditer(text), maxlen=1)
    return _read(found[0] if found else None)


def _normalise(text: str) -> str:
    text = unicodedata.normalize("NFKC", text).replace("\N{MINUS SIGN}", "-")
    return "".join(c for c in text if unicodedata.category(c) != "Cf")


def _read_marked(parts: list[str]) -> FinalNumber:
    found = []
    for part in parts:
        decoration = _BEHIND.match(part)
        found.append(_read(_NUMBER.match(part, decoration.end() if decoration else 0)))
    values = {f.value for f in found if f.value is not None}
    if len(values) > 1:
        return FinalNumber(None, "ambiguous")
    return found[-1]


def _read(match: re.Match[str] | None) -> FinalNumber:
    if match is None:
        return FinalNumber(None, "no_answer")
    if sum(c.isdigit() for c in match.group()) > _DIGITS:
        return FinalNumber(None, "too_large")
    value = Fraction(match["top"].replace(",", ""))
    if match["bottom"] is not None:
        if int(match["bottom"]) == 0:
            return FinalNumber(None, "no_answer")
        value /= int(match["bottom"])
    return FinalNumber(-value if "-" in match.group() else value)

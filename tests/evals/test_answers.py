"""The final number of an answer: what is read, what is not, hostile texts among them."""

from __future__ import annotations

from fractions import Fraction

import pytest

from burnish.evals.answers import parse_final_number
from tests.waiting import bounded


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("First 20 - 9 = 11 nails. Then 11 + 6 = 17 nails.\n#### 17", 17),
        ("#### 1,234", 1234),
        ("#### -3", -3),
        ("#### \N{MINUS SIGN}3", -3),
        ("#### $1,234.50 in all", Fraction("1234.5")),
        ("#### -$5", -5),
        ("#### $-5", -5),
        ("#### 18.00", 18),
        ("####17", 17),
        ("##### 17", 17),
        ("#### **42**", 42),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 50%", 50),
        ("#### 12 apples, not 13", 12),
        ("#### x = 7", None),
        ("#### = 7", 7),
        ("#### 5\n#### 5.0", 5),
        ("So 12 + 13 = 25 carrots.", 25),
        ("20-9", 9),
        ("It is -4.", -4),
        ("The answer is 1,000,000.", 1000000),
        ("in 2024, 3 cats", 3),
        ("#### \uff11\uff17", 17),
        ("#### 1\u200b7", 17),
        ("<think>perhaps 3</think>#### 4", 4),
        ("<THINK>3</THINK> 4", 4),
        ("10/2=5", 5),
    ],
)
def test_what_is_read(text: str, value: Fraction | int | None) -> None:
    assert parse_final_number(text).value == value


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no_answer"),
        (" " * 50_000, "no_answer"),
        ("no number at all", "no_answer"),
        ("#### none, so 12", "no_answer"),
        ("12 ####", "no_answer"),
        ("#### 1e400", "no_answer"),
        ("#### nan", "no_answer"),
        ("#### 1,00", "no_answer"),
        ("#### 1.2.3", "no_answer"),
        ("#### 1/0", "no_answer"),
        ("#### 1\n#### 2", "ambiguous"),
        ("<think>the answer is #### 7", "no_answer"),
        ("</think>#### 7 <think>", "no_answer"),
        ("#### " + "9" * 1_000_000, "too_large"),
        ("#### 1/" + "9" * 100, "too_large"),
    ],
)
def test_what_is_no_answer(text: str, reason: str) -> None:
    found = parse_final_number(text)
    assert (found.value, found.reason) == (None, reason)


@pytest.mark.parametrize(
    "text", ["1" * 2_000_000 + "!", "1," * 1_000_000, "-" * 2_000_000, "####" * 500_000, "1/" * 1_000_000]
)
def test_hostile_texts_take_linear_time(text: str) -> None:
    with bounded():
        parse_final_number(text)


def test_numbers_are_exact() -> None:
    def read(text: str) -> object:
        return parse_final_number(text).value

    assert read("so 18.00") == read("#### 18") == read("36/2") and read("1,000") == read("1000")
    assert read("18.001") != 18 and read("0." + "3" * 40) != read("1/3"), "no rounding"

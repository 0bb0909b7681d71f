"""Reasoning blocks (S4-08)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.think import strip_think
from tests.waiting import bounded


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("<think>a</think>b", "b"),
        ("<think>\nline one\nline two\n</think>\n\nThe answer.", "The answer."),
        ("before <think>x</think>after", "before after"),
        ("<think>a</think>b<think>c</think>d", "bd"),
        ("<think>never closed\nanswer", ""),
        ("said <think>never closed", "said "),
        ("opened in the prompt</think>b", "b"),
        ("<THINK>a</Think>b", "b"),
        ("<think>a<think>b</think>c</think>d", "d"),
        ("<thinking>a</thinking>b", "b"),
        ("no tags, 1 < 2", "no tags, 1 < 2"),
        ("", ""),
    ],
)
def test_s4_08_blocks_are_removed(text: str, left: str) -> None:
    assert strip_think(text) == left


@given(st.text(), st.text())
def test_a_block_in_front_leaves_the_answer(inside: str, answer: str) -> None:
    if "think" not in (inside + answer).lower():
        assert strip_think(f"<think>{inside}</think>{answer}") == answer.lstrip()
        assert strip_think(answer) == answer


@given(st.lists(st.sampled_from(["<think>", "</think>", "a", "\n"])))
def test_no_tag_is_ever_left(pieces: list[str]) -> None:
    once = strip_think("".join(pieces))
    assert "<think>" not in once and "</think>" not in once


def test_many_tags_take_linear_time() -> None:
    with bounded():
        strip_think("<think>" * 1_000_000 + "a" * 1_000_000)

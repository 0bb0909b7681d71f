"""Split names with slices (S0-30)."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.slices import Split, parse_split
from burnish.errors import DataError

bounds = st.none() | st.integers(-30, 30).map(str) | st.integers(-100, 100).map(lambda n: f"{n}%")


@given(bounds, bounds, st.integers(0, 25))
def test_s0_30_slices_are_python_slices(start: str | None, stop: str | None, total: int) -> None:
    def bound(text: str | None) -> int | None:
        if text is None:
            return None
        if not text.endswith("%"):
            return int(text)
        number = round(total * abs(float(text[:-1])) / 100)
        return -number if text.startswith("-") and number else (total if text.startswith("-") else number)

    split = parse_split(f"train[{start or ''}:{stop or ''}]")
    assert (split.name, split.start, split.stop) == ("train", start, stop)
    first, last = split.span(total)
    assert list(range(total))[first:last] == list(range(total))[bound(start) : bound(stop)]


@given(st.integers(0, 50), st.lists(st.integers(0, 100), min_size=1, max_size=4))
def test_percent_slices_cut_a_set_without_gap_or_overlap(total: int, cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), 100]
    rows: list[int] = []
    for a, b in pairwise(edges):
        first, last = parse_split(f"train[{a}%:{b}%]").span(total)
        rows += range(total)[first:last]
    assert rows == list(range(total))


def test_names_and_defaults() -> None:
    assert parse_split(None) == Split("train")
    assert parse_split("test").whole
    assert parse_split("train_prefs[:10]") == Split("train_prefs", None, "10")
    assert not parse_split("train[100:200]").needs_total
    assert parse_split("train[100:200]").span(None) == (100, 200)
    assert parse_split("train[:1%]").needs_total


@pytest.mark.parametrize("text", ["train[", "train[5]", "train+test", "train,test", "train[:1.5]", "train[:120%]", ""])
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(DataError) as caught:
        parse_split(text)
    assert caught.value.where == "data.split"

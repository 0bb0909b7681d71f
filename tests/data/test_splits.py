"""Slices and splits by prompt, samples, mixtures (S1-05, S2-05, S4-18, S4-20)."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.splits import in_slice, mixture_sizes, sample_rows, split_rows, unit_hash

keys = st.lists(st.text(max_size=3), max_size=40)


@given(keys, st.floats(0, 0.99), st.integers(0, 5))
def test_s4_18_a_prompt_is_on_one_side_only(rows: list[str], share: float, seed: int) -> None:
    train, held_out = split_rows(rows, lambda r: r, share, seed)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(rows)
    if rows:
        assert train
    if share > 0 and len(set(rows)) > 1:
        assert held_out
    if share == 0:
        assert not held_out


def test_s1_05_the_split_is_seeded_and_of_its_share() -> None:
    rows = [str(i) for i in range(1000)]
    train, held_out = split_rows(rows, lambda r: r, 0.1, 42)
    assert len(held_out) == 100
    assert (train, held_out) == split_rows(rows, lambda r: r, 0.1, 42)
    assert held_out != split_rows(rows, lambda r: r, 0.1, 43)[1]
    moved = split_rows(rows[::-1], lambda r: r, 0.1, 42)[1]
    assert set(moved) == set(held_out), "the order of rows does not matter"


@given(keys, st.floats(0.01, 1), st.floats(0, 0.99))
def test_s2_05_disjoint_slices_share_no_prompt(rows: list[str], share: float, offset: float) -> None:
    share = min(share, 1 - offset)
    if share <= 0:
        return
    first = {r for r in rows if in_slice(r, share, offset)}
    rest = {r for r in rows if in_slice(r, 1 - share, (offset + share) % 1.0) if share < 1}
    assert not (first & rest) or share + offset == 1.0


def test_s2_05_slices_have_their_share_and_ignore_seeds() -> None:
    rows = [f"prompt {i}" for i in range(4000)]
    sft = {r for r in rows if in_slice(r, 0.2, 0.0)}
    reward = {r for r in rows if in_slice(r, 0.3, 0.2)}
    rest = {r for r in rows if in_slice(r, 0.5, 0.5)}
    assert not sft & reward and sft | reward | rest == set(rows)
    assert abs(len(sft) - 800) < 100 and abs(len(reward) - 1200) < 120
    assert all(in_slice(r, None, 0.7) for r in rows)
    wrapped = {r for r in rows if in_slice(r, 0.4, 0.8)}
    assert wrapped >= sft and abs(len(wrapped) - 1600) < 140


def test_s4_20_samples_are_seeded_and_keep_the_order() -> None:
    rows = [str(i) for i in range(100)]
    sample = sample_rows(rows, lambda r: r, 30, 1)
    assert len(sample) == 30 and sample == sorted(sample, key=int)
    assert sample == sample_rows(rows, lambda r: r, 30, 1) != sample_rows(rows, lambda r: r, 30, 2)
    assert set(sample_rows(rows, lambda r: r, 20, 1)) < set(sample)
    assert sample_rows(rows, lambda r: r, None, 1) == rows == sample_rows(rows, lambda r: r, 500, 1)


@pytest.mark.parametrize(
    ("sizes", "weights", "taken"),
    [
        ([100, 10], None, [100, 10]),
        ([100, 10], [1.0, 1.0], [10, 10]),
        ([100, 10], [3.0, 1.0], [30, 10]),
        ([100, 100], [0.5, 0.25], [100, 50]),
        ([100, 0], [1.0, 1.0], [100, 0]),
        ([1000, 1], [0.001, 1.0], [1, 1]),
    ],
)
def test_mixtures(sizes: list[int], weights: list[float] | None, taken: list[int]) -> None:
    assert mixture_sizes(sizes, weights) == taken


@given(st.text(), st.text(max_size=5))
def test_hashes_are_numbers_below_one(text: str, salt: str) -> None:
    assert 0 <= unit_hash(text, salt) < 1
    assert unit_hash(text, salt) == unit_hash(text, salt)

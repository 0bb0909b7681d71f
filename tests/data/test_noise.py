"""`flip_share`: which rows are flipped, and that held-out rows never are."""

from __future__ import annotations

import io
import itertools
import random
from pathlib import Path
from typing import Any

import pytest

from burnish.config.stages import KtoSettings
from burnish.core.group import Group
from burnish.data.prepare import PreparedData, prepare_data
from burnish.data.show import run_show
from tests.data.toys import chat_folder, chat_tokenizer, dpo, pair, plain_tokenizer, reward, write_lines

GOOD, BAD = " good", " bad"
PINNED = [5, 6, 9, 14, 15, 17, 23, 24, 26, 27, 31, 35, 36, 37]  # a hash that differs by process would not give this


def make(path: Path, rows: list[Any], **settings: Any) -> PreparedData:
    return prepare_data(dpo(write_lines(path, rows), **settings), plain_tokenizer())


def flipped(groups: list[Group]) -> set[str]:
    """Prompts of the pairs whose better answer stands second."""
    decode = plain_tokenizer().decode
    return {decode(g.prompt.tolist()) for g in groups if decode(g.completions[0].ids.tolist()).startswith(BAD)}


def test_the_share_is_met_within_binomial_bounds_and_counted(tmp_path: Path) -> None:
    rows, share = [pair(i) for i in range(2000)], 0.3
    made = make(tmp_path / "a.jsonl", rows, flip_share=share)
    count = len(flipped(made.train))
    assert abs(count - share * len(rows)) < 4 * (share * (1 - share) * len(rows)) ** 0.5
    assert made.report.splits["train"].flipped.count == count
    assert any(f"{count:,} labels flipped on purpose" in line for line in made.report.lines())
    assert made.report.from_json(made.report.to_json()).lines() == made.report.lines()


def test_the_same_rows_whatever_their_order_and_company_in_every_process(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(40)]
    found = flipped(make(tmp_path / "a.jsonl", rows, flip_share=0.25, seed=7).train)
    numbers = sorted(int(prompt.removeprefix("question ").rstrip(":")) for prompt in found)
    assert numbers == PINNED
    random.Random(0).shuffle(rows)
    assert flipped(make(tmp_path / "b.jsonl", rows, flip_share=0.25, seed=7).train) == found
    half = {row["prompt"] for row in rows[:20]}
    assert flipped(make(tmp_path / "c.jsonl", rows[:20], flip_share=0.25, seed=7).train) == found & half
    assert flipped(make(tmp_path / "a.jsonl", rows, flip_share=0.25, seed=8).train) != found


def test_a_larger_share_holds_the_smaller_one(tmp_path: Path) -> None:
    rows = [pair(i) for i in range(300)]
    sets = [flipped(make(tmp_path / "a.jsonl", rows, flip_share=share).train) for share in (0.0, 0.1, 0.3, 1.0)]
    assert sets[0] == set() and len(sets[3]) == 300
    assert all(small < large for small, large in itertools.pairwise(sets))


def test_all_flipped_is_the_file_with_both_columns_exchanged(tmp_path: Path) -> None:
    rows = [pair(i, margin=1.5) for i in range(12)]
    turned = [row | {"chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    (tmp_path / "x").mkdir()
    file, other = write_lines(tmp_path / "a.jsonl", rows), write_lines(tmp_path / "x/a.jsonl", turned)
    for kind in (dpo, reward):
        made, wanted = (
            prepare_data(kind(f, **s), plain_tokenizer()) for f, s in ((file, {"flip_share": 1.0}), (other, {}))
        )
        assert made.fingerprint == wanted.fingerprint != prepare_data(kind(file), plain_tokenizer()).fingerprint


@pytest.mark.parametrize("how", ["eval_data", "own split", "validation_split"])
def test_held_out_rows_are_never_flipped(tmp_path: Path, how: str) -> None:
    rows, held = [pair(i) for i in range(30)], [pair(i) for i in range(30, 60)]
    train, test = write_lines(tmp_path / "train.jsonl", rows), write_lines(tmp_path / "test.jsonl", held)
    data, more = {
        "eval_data": (train, {"eval_data": test}),
        "own split": (str(tmp_path), {}),
        "validation_split": (train, {"validation_split": 0.4}),
    }[how]
    made = prepare_data(dpo(data, flip_share=1.0, **more), plain_tokenizer())
    assert len(flipped(made.train)) == len(made.train) and made.held_out
    assert flipped(made.held_out) == set() and made.report.splits["held_out"].flipped.count == 0
    plain = prepare_data(dpo(data, **more), plain_tokenizer())
    assert [g.id for g in made.held_out] == [g.id for g in plain.held_out], "the same rows are held out"


def test_labels_of_pairs_and_of_rows_are_turned_for_kto(tmp_path: Path) -> None:
    rows = [pair(1), {"prompt": "question 2", "completion": " answer", "label": True}]
    file = write_lines(tmp_path / "a.jsonl", rows)
    plain, turned = (prepare_data(KtoSettings(data=file, flip_share=s), plain_tokenizer()).train for s in (0.0, 1.0))
    assert [g.columns["label"] for g in plain] == [1.0, 0.0, 1.0]
    assert [g.columns["label"] for g in turned] == [1.0, 0.0, 0.0]
    assert plain[0].completions[0].ids.tolist() == turned[1].completions[0].ids.tolist()


def test_equal_rows_go_together_and_messages_are_pairs_too(tmp_path: Path) -> None:
    row = {"prompt": [{"role": "user", "content": "question"}], "chosen": "yes", "rejected": "no"}
    file = write_lines(tmp_path / "a.jsonl", [row] * 8)
    for seed in range(6):
        made = prepare_data(dpo(file, flip_share=0.5, seed=seed), chat_tokenizer())
        assert made.report.splits["train"].flipped.count in (0, 8)


def test_a_share_is_part_of_the_cache_s_key(tmp_path: Path) -> None:
    file, cache = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(12)]), tmp_path / "cache"
    first = prepare_data(dpo(file), plain_tokenizer(), cache_dir=cache)
    second = prepare_data(dpo(file, flip_share=1.0), plain_tokenizer(), cache_dir=cache)
    assert not second.report.from_cache and first.fingerprint != second.fingerprint
    again = prepare_data(dpo(file, flip_share=1.0), plain_tokenizer(), cache_dir=cache)
    assert again.report.from_cache and again.report.splits["train"].flipped.count == 12


def test_show_shows_rows_as_they_are_trained_on(tmp_path: Path) -> None:
    file, out = write_lines(tmp_path / "a.jsonl", [pair(1)]), io.StringIO()
    run_show(dpo(file, flip_share=1.0), tokenizer=chat_folder(), out=out, as_json=False)
    assert out.getvalue().index(BAD) < out.getvalue().index(GOOD)

"""Rows with labels for KTO: of their own, and made of pairs (S3-22, T-12)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.config.stages import KtoSettings
from burnish.data.example import Reading
from burnish.data.formats import check_format, normalise
from burnish.data.prepare import prepare_data
from burnish.data.problems import DataProblems, RowError
from burnish.data.readers import Row
from burnish.errors import ConfigError
from tests.data.toys import chat_tokenizer, pair, plain_tokenizer, write_lines


def labelled(i: int, label: Any = True, **more: Any) -> dict[str, Any]:
    return {"prompt": f"question {i}", "completion": f" answer {i}", "label": label} | more


def kto(*files: Path, **options: Any) -> KtoSettings:
    return KtoSettings(data=[str(f) for f in files], **options)


def test_rows_with_labels_are_read(tmp_path: Path) -> None:
    rows = [labelled(1, True), labelled(2, False), labelled(3, 1), labelled(4, 0)]
    made = prepare_data(kto(write_lines(tmp_path / "a.jsonl", rows)), plain_tokenizer())
    assert [dict(g.columns) for g in made.train] == [{"label": v} for v in (1.0, 0.0, 1.0, 0.0)]
    assert [len(g.completions) for g in made.train] == [1] * 4


def test_messages_have_labels_too(tmp_path: Path) -> None:
    user, said = {"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}
    rows = [
        {"prompt": [user], "completion": [said], "label": True},
        {"prompt": [user], "completion": "no", "label": False},
    ]
    made = prepare_data(kto(write_lines(tmp_path / "a.jsonl", rows)), chat_tokenizer())
    assert [g.columns["label"] for g in made.train] == [1.0, 0.0]
    assert made.train[0].prompt.tolist() == made.train[1].prompt.tolist()


def test_t12_a_pair_is_a_good_and_a_bad_row_side_by_side(tmp_path: Path) -> None:
    """TRL reads a thousand desirable rows and then a thousand undesirable ones."""
    pairs = write_lines(tmp_path / "a.jsonl", [pair(1, margin=2.0), pair(2)])
    rows = write_lines(tmp_path / "b.jsonl", [labelled(9, False)])
    made = prepare_data(kto(pairs, rows), plain_tokenizer())
    assert [(g.id, dict(g.columns)) for g in made.train] == [
        ("a.jsonl:1#chosen", {"label": 1.0}),
        ("a.jsonl:1#rejected", {"label": 0.0}),
        ("a.jsonl:2#chosen", {"label": 1.0}),
        ("a.jsonl:2#rejected", {"label": 0.0}),
        ("b.jsonl:1", {"label": 0.0}),
    ]
    assert made.train[0].prompt.tolist() == made.train[1].prompt.tolist()
    assert made.report.splits["train"].groups == 5 and made.report.splits["train"].kept == 3
    assert not made.report.notes


def test_both_rows_of_a_pair_stay_on_one_side_of_a_split(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(20)])
    made = prepare_data(kto(file, validation_split=0.25), plain_tokenizer())
    assert (len(made.train), len(made.held_out)) == (30, 10)
    assert not {g.id.partition("#")[0] for g in made.train} & {g.id.partition("#")[0] for g in made.held_out}


@pytest.mark.parametrize("label", ["yes", 2, 0.5, [True]])
def test_a_label_that_is_no_truth_value_is_refused(tmp_path: Path, label: Any) -> None:
    with pytest.raises(DataProblems, match="expected true or false"):
        prepare_data(kto(write_lines(tmp_path / "a.jsonl", [labelled(1, label)])), plain_tokenizer())


def test_a_row_without_a_label_names_the_column() -> None:
    with pytest.raises(RowError, match="missing column 'label'") as caught:
        normalise(Row("f.jsonl", 1, {"prompt": "p", "completion": "c"}), Reading("label"))
    assert "label: <your column>" in (caught.value.remedy or "")
    with pytest.raises(RowError, match="no known row shape") as caught:
        normalise(Row("f.jsonl", 1, {"x": 1}), Reading("label"))
    assert "completion: <your column>, label: <your column>" in (caught.value.remedy or "")


def test_formats_that_give_labels() -> None:
    for name in ("auto", "labelled", "preference", "hh", "tokenised_pair"):
        check_format(name, "label")
    with pytest.raises(ConfigError, match="give no label"):
        check_format("messages", "label")


def test_sft_ignores_a_label(tmp_path: Path) -> None:
    from tests.data.toys import sft

    file = write_lines(tmp_path / "a.jsonl", [labelled(1, False), labelled(2, True)])
    assert [dict(g.columns) for g in prepare_data(sft(file), plain_tokenizer()).train] == [{}, {}]


def test_labels_survive_the_cache(tmp_path: Path) -> None:
    settings = kto(write_lines(tmp_path / "a.jsonl", [labelled(1, False), pair(2)]))
    first = prepare_data(settings, plain_tokenizer(), cache_dir=tmp_path / "cache")
    again = prepare_data(settings, plain_tokenizer(), cache_dir=tmp_path / "cache")
    assert again.report.from_cache and again.fingerprint == first.fingerprint
    assert [g.columns for g in again.train] == [g.columns for g in first.train]

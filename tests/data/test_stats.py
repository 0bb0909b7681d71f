"""`burnish data stats`: lengths, duplicates, leaks, length bias, labels."""

import io
import json
from pathlib import Path
from typing import Any

from burnish.data.stats import run_stats
from tests.data.toys import chat_folder, dpo, pair, plain_tokenizer, reward, sft, write_lines


def stats(settings: Any, as_json: bool = True, limit: int = 5) -> Any:
    out = io.StringIO()
    folder = plain_tokenizer().path
    assert run_stats(settings, tokenizer=folder, out=out, as_json=as_json, limit=limit) == 0
    return json.loads(out.getvalue()) if as_json else out.getvalue()


def test_figures_of_pairs(tmp_path: Path) -> None:
    rows = [
        pair(1, chosen=" a longer answer than", rejected=" b"),
        pair(2, chosen=" a", rejected=" a much longer answer"),
        pair(3, chosen=" x y z also longer", rejected=" y"),
        pair(4, chosen="xq", rejected="qx"),
        pair(4, chosen="xq", rejected="qx"),
        pair(5, chosen=" a", rejected=" a"),
        pair(6, rejected=" word" * 100, margin=3.0),
    ]
    figures = stats(reward(write_lines(tmp_path / "a.jsonl", rows), max_length=50))
    train = figures["splits"]["train"]
    assert (train["rows_read"], train["rows"], train["prompts"], train["identical"]) == (7, 6, 5, 1)
    assert train["length_bias"] == {"chosen_longer": 2, "chosen_shorter": 2, "equal": 2, "longer_wins": 0.5}
    assert train["duplicates"] == {"count": 1, "rows": ["a.jsonl:5 (= a.jsonl:4)"]}
    assert train["over_limit"]["rows"] == ["a.jsonl:7"] and train["over_limit"]["share"] == 1 / 6
    assert sum(bar["count"] for bar in train["histogram"]) == 6
    assert train["margin"]["max"] == 3.0
    lengths = train["lengths"]
    assert set(lengths) == {"prompt", "chosen", "rejected", "total"}
    assert lengths["total"]["max"] > 100 and lengths["chosen"]["min"] == 2


def test_prompts_on_both_sides_are_found(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [pair(i) for i in range(6)])
    held = write_lines(tmp_path / "held.jsonl", [pair(i) for i in range(4, 8)])
    figures = stats(dpo(train, eval_data=held, on_error="skip"))
    assert figures["both_sides"]["count"] == 2 and "held.jsonl:1 (= train.jsonl:5)" in figures["both_sides"]["rows"]


def test_labels(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i}", "completion": "c", "label": i < 3} for i in range(4)]
    assert stats(sft(write_lines(tmp_path / "a.jsonl", rows)))["splits"]["train"]["labels"] == {"true": 3, "false": 1}


def test_text_output(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i, chosen=" w" * i) for i in range(1, 40)])
    text = stats(dpo(file, validation_split=0.2, max_length=30), as_json=False)
    for words in ("train: 31 rows read", "median", "█", "over max_length 30", "the longer answer is chosen in"):
        assert words in text
    assert "prompts on both sides of the split: 0" in text
    assert chat_folder()


def test_one_row_has_a_histogram(tmp_path: Path) -> None:
    figures = stats(dpo(write_lines(tmp_path / "a.jsonl", [pair(1)])))
    assert [bar["count"] for bar in figures["splits"]["train"]["histogram"]] == [1]

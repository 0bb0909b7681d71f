"""Prompts for evaluation and sampling."""

from pathlib import Path

import pytest

from burnish.config.data import DataSource
from burnish.data.problems import DataProblems
from burnish.data.prompts import load_prompts
from burnish.errors import DataError
from tests.data.toys import bos_tokenizer, chat, chat_tokenizer, pair, plain_tokenizer, write_lines


def test_gsm8k_prompts_hold_what_is_checked(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [{"question": "train?", "answer": "#### 1"}])
    write_lines(
        tmp_path / "test.jsonl", [{"question": f"{i}+1?", "answer": f"sum\n#### {i + 1}", "level": i} for i in range(9)]
    )
    rows = load_prompts(str(tmp_path), chat_tokenizer())
    assert len(rows) == 9
    number, first = 5, rows[5]
    assert f"{number}+1?" in first.text
    assert first.text.endswith("<|im_start|>assistant\n") and first.prompt_ids == chat_tokenizer().encode(first.text)
    assert (first.answer, first.reference) == (str(number + 1), f"sum\n#### {number + 1}")
    assert first.source == tmp_path.name and first.id == f"test.jsonl:{number + 1}"
    assert load_prompts(DataSource(source=str(tmp_path), split="train[:1]"), chat_tokenizer())[0].answer == "1"


def test_prompts_of_other_shapes(tmp_path: Path) -> None:
    rows = [
        chat("q1", "a1", "q2", "a2"),
        {"prompt": [{"role": "user", "content": "q"}], "ground_truth": 4, "dataset": "sums"},
        {
            "prompt": [{"role": "user", "content": "q"}],
            "chosen": [{"role": "assistant", "content": "good"}],
            "rejected": [],
        },
        {"prompt_messages": [{"role": "user", "content": "q"}], "responses": ["a"]},
        {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"},
        {"prompt": "plain", "completion": "c"},
        {"chosen": [*chat("q", "yes")["messages"]], "rejected": [*chat("q", "no")["messages"]]},
    ]
    found = load_prompts(write_lines(tmp_path / "a.jsonl", rows), chat_tokenizer())
    assert [r.text.count("<|im_start|>") for r in found] == [4, 2, 2, 2, 2, 0, 2]
    assert [r.reference for r in found] == ["a2", "", "good", "", "yes", "c", "yes"]
    assert found[1].answer == "4" and found[5].text == "plain" and found[3].text == found[4].text


def test_bos_and_raw_dialogues(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}
    file = write_lines(tmp_path / "a.jsonl", [row])
    (found,) = load_prompts(file, bos_tokenizer())
    assert found.text == "\n\nHuman: q\n\nAssistant:" and found.prompt_ids[0] == bos_tokenizer().bos_id
    (found,) = load_prompts(write_lines(tmp_path / "b.jsonl", [chat("q")]), plain_tokenizer())
    assert found.text == "User: q\n\nAssistant:"


def test_problems_mappings_and_nothing(tmp_path: Path) -> None:
    empty = DataSource(source=write_lines(tmp_path / "a.jsonl", [pair(1)]), split="train[:0]")
    with pytest.raises(DataError, match="no prompt"):
        load_prompts(empty, plain_tokenizer())
    bad = write_lines(tmp_path / "b.jsonl", [pair(1), "{"])
    with pytest.raises(DataProblems):
        load_prompts(bad, plain_tokenizer())
    mapped = write_lines(tmp_path / "c.jsonl", [{"ask": "q"}])
    columns = {"prompt": "ask"}
    assert load_prompts(DataSource(source=mapped, columns=columns), plain_tokenizer())[0].text == "q"
    (found,) = load_prompts(DataSource(source=mapped, columns=columns, format="instruct"), chat_tokenizer())
    assert "<|im_start|>user\nq" in found.text

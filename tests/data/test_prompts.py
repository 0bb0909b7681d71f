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
    rows = load_prompts(str(tmp_path), chat_tokenizer(), max_items=4, seed=3)
    assert len(rows) == 4 and [r.id for r in rows] == [
        r.id for r in load_prompts(str(tmp_path), chat_tokenizer(), max_items=4, seed=3)
    ]
    first = rows[0]
    number = int(first.tags["level"])
    assert first.messages == [{"role": "user", "content": f"{number}+1?"}]
    assert first.text.endswith("<|im_start|>assistant\n") and first.prompt_ids == chat_tokenizer().encode(first.text)
    assert (first.answer, first.reference) == (str(number + 1), f"sum\n#### {number + 1}")
    assert first.tags == {"source": tmp_path.name, "level": str(number)} and first.id == f"test.jsonl:{number + 1}"
    assert load_prompts(str(tmp_path), chat_tokenizer(), held_out=False)[0].answer == "1"
    assert load_prompts(str(tmp_path), chat_tokenizer(), split="train[:1]")[0].answer == "1"


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
    assert [len(r.messages) if r.messages else 0 for r in found] == [3, 1, 1, 1, 1, 0, 1]
    assert [r.reference for r in found] == ["a2", "", "good", "", "yes", "c", "yes"]
    assert found[1].answer == "4" and found[1].tags["dataset"] == "sums"
    assert found[5].text == "plain" and found[3].prompt_text == found[4].prompt_text


def test_bos_and_raw_dialogues(tmp_path: Path) -> None:
    row = {"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}
    file = write_lines(tmp_path / "a.jsonl", [row])
    (found,) = load_prompts(file, bos_tokenizer())
    assert found.text == "\n\nHuman: q\n\nAssistant:" and found.prompt_ids[0] == bos_tokenizer().bos_id
    (found,) = load_prompts(write_lines(tmp_path / "b.jsonl", [chat("q")]), plain_tokenizer())
    assert found.text == "User: q\n\nAssistant:"


def test_limits_problems_and_nothing(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(1), pair(2, prompt="long " * 50)])
    assert [r.id for r in load_prompts(file, plain_tokenizer(), max_prompt_length=20)] == ["a.jsonl:1"]
    with pytest.raises(DataError, match="no prompt"):
        load_prompts(file, plain_tokenizer(), max_prompt_length=1)
    bad = write_lines(tmp_path / "b.jsonl", [pair(1), "{"])
    with pytest.raises(DataProblems):
        load_prompts(bad, plain_tokenizer())
    assert len(load_prompts(bad, plain_tokenizer(), on_error="skip")) == 1
    mapped = write_lines(tmp_path / "c.jsonl", [{"ask": "q"}])
    assert load_prompts(mapped, plain_tokenizer(), columns={"prompt": "ask"})[0].text == "q"
    assert load_prompts(DataSource(source=mapped, columns={"prompt": "ask"}, format="instruct"), chat_tokenizer())[
        0
    ].messages

"""The bundled pocket data: generated the same every time, split cleanly, right, balanced and short."""

import gzip
import json
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from pocket import corpus, datasets, tokenizing  # noqa: E402
from pocket.grammar import ALL_POOLS, Draw  # noqa: E402
from pocket.preferences import SOURCES  # noqa: E402
from pocket.problems import calculate  # noqa: E402

ASSETS = ROOT / "src" / "burnish" / "assets"
MODELS = ("pocket", "pocket-small")
SETS = tuple(datasets.SIZES)
STEP = re.compile(r"(\d+) ([-+*/]) (\d+) = (\d+)")


@cache
def rows(name: str, split: str) -> list[datasets.Row]:
    assert split in ("train", "test")
    return datasets.make_rows(name, "train" if split == "train" else "test")


@cache
def stored(name: str, split: str) -> list[dict[str, Any]]:
    text = gzip.decompress((ASSETS / "data" / "pocket" / name / f"{split}.jsonl.gz").read_bytes()).decode("utf-8")
    return [json.loads(line) for line in text.splitlines()]


@cache
def tokenizer(model: str = "pocket") -> Tokenizer:
    return Tokenizer.from_file(str(ASSETS / "models" / model / "tokenizer.json"))


def user_turns(data: dict[str, Any]) -> list[str]:
    """Everything a user says in a row."""
    if "question" in data:
        return [data["question"]]
    messages = data["prompt"] if "prompt" in data else data["messages"]
    return [message["content"] for message in messages if message["role"] == "user"]


def chat_text(messages: list[dict[str, str]]) -> str:
    return "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages)


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("name", SETS)
def test_the_generators_are_deterministic_and_the_files_are_theirs(name: str, split: str) -> None:
    first = [row.data for row in datasets.make_rows(name, "train" if split == "train" else "test")]
    assert first == [row.data for row in rows(name, split)]
    assert first == stored(name, split)
    assert len(first) == datasets.SIZES[name]["train" if split == "train" else "test"]


def test_the_corpus_is_deterministic() -> None:
    assert corpus.make_corpus(300) == corpus.make_corpus(300)
    assert corpus.make_corpus(300) == corpus.make_corpus(600)[:300]


@pytest.mark.parametrize("name", SETS)
def test_no_prompt_is_asked_twice_in_a_split(name: str) -> None:
    for split in ("train", "test"):
        prompts = [datasets.prompt_of(data) for data in stored(name, split)]
        assert len(set(prompts)) == len(prompts)


def test_no_test_prompt_or_user_turn_is_in_any_train_file_or_in_the_corpus() -> None:
    train = {turn for name in SETS for data in stored(name, "train") for turn in user_turns(data)}
    text = "\n".join(corpus.make_corpus())
    for name in SETS:
        for data in stored(name, "test"):
            for turn in user_turns(data):
                assert turn not in train
                assert f" {turn}\n" not in text


def test_the_wordings_of_the_splits_are_apart() -> None:
    for pool in ALL_POOLS.values():
        assert not set(pool.train) & set(pool.test), pool.name
    used = {
        split: {each for name in SETS for row in rows(name, split) for each in row.templates}
        for split in ("train", "test")
    }
    assert used["train"] and used["test"]
    assert all("/train/" in each for each in used["train"])
    assert all("/test/" in each for each in used["test"])
    assert not used["train"] & used["test"]
    for name in SETS:
        assert all(row.templates for row in rows(name, "test"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_maths_answer_is_right(split: str) -> None:
    for name in ("maths", "chat"):
        for row in rows(name, split):
            if row.problem is None:
                continue
            answer = row.data["answer"] if name == "maths" else row.data["messages"][-1]["content"]
            count = row.problem.steps[0].left
            for step in row.problem.steps:
                assert step.left == count
                assert step.sign != "/" or step.left % step.right == 0
                count = calculate(count, step.sign, step.right)
                assert count > 0
            assert answer.endswith(f"\n#### {count}")
            assert [int(found[3]) for found in STEP.findall(answer)][-1] == count
            assert len(STEP.findall(answer)) == row.problem.level
            for number in {str(step.right) for step in row.problem.steps}:
                assert re.search(rf"\b{number}\b", row.data.get("question", "") or user_turns(row.data)[0])


def test_the_levels_are_even() -> None:
    levels = [data["level"] for data in stored("maths", "test")]
    assert {levels.count(level) for level in (1, 2, 3)} <= {133, 134}


def test_worked_steps_add_up_wherever_an_answer_is_good() -> None:
    for row in rows("preferences", "test"):
        chosen = row.data["chosen"][0]["content"]
        for left, sign, right, value in STEP.findall(chosen):
            assert {"+": int(left) + int(right), "-": int(left) - int(right), "*": int(left) * int(right)}.get(
                sign, int(left) // int(right)
            ) == int(value)


def test_one_train_pair_in_twenty_is_the_wrong_way_round_and_no_test_pair() -> None:
    flipped = [row.flipped for row in rows("preferences", "train")]
    assert 0.035 <= sum(flipped) / len(flipped) <= 0.065
    assert not any(row.flipped for row in rows("preferences", "test"))


@pytest.mark.parametrize("split", ["train", "test"])
def test_length_does_not_decide_the_preference(split: str) -> None:
    for measure in (len, lambda text: len(tokenizer().encode(text).ids)):
        longer = 0.0
        for data in stored("preferences", split):
            chosen, rejected = measure(data["chosen"][0]["content"]), measure(data["rejected"][0]["content"])
            longer += 1.0 if chosen > rejected else 0.5 if chosen == rejected else 0.0
        assert 0.4 <= longer / len(stored("preferences", split)) <= 0.6


def test_the_two_answers_of_a_pair_differ_and_every_source_is_there() -> None:
    for split in ("train", "test"):
        sources = [data["source"] for data in stored("preferences", split)]
        for source in SOURCES:
            assert sources.count(source) >= 0.15 * len(sources)
        assert all(data["chosen"] != data["rejected"] for data in stored("preferences", split))


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_row_fits_into_256_tokens(split: str) -> None:
    texts = [chat_text(data["messages"]) for data in stored("chat", split)]
    for data in stored("preferences", split):
        texts += [chat_text(data["prompt"] + data[side]) for side in ("chosen", "rejected")]
    for data in stored("maths", split):
        texts.append(
            chat_text([{"role": "user", "content": data["question"]}, {"role": "assistant", "content": data["answer"]}])
        )
    assert max(len(encoding.ids) for encoding in tokenizer().encode_batch(texts)) <= 256


def test_messages_alternate_and_end_with_the_assistant() -> None:
    for data in stored("chat", "train") + stored("chat", "test"):
        roles = [message["role"] for message in data["messages"]]
        turns = roles[1:] if roles[0] == "system" else roles
        assert turns == ["user", "assistant"] * (len(turns) // 2)


@pytest.mark.parametrize("model", MODELS)
def test_the_tokenizer_gives_text_back(model: str) -> None:
    texts = [*corpus.make_corpus(200), "Ünïcode, 漢字 and 😀!", "  two  spaces\n\n\ttab ", "12345 + 67", ""]
    for text in texts:
        assert tokenizer(model).decode(tokenizer(model).encode(text).ids) == text


@pytest.mark.parametrize("model", MODELS)
def test_every_digit_is_a_token_and_the_special_tokens_are_whole(model: str) -> None:
    assert len(tokenizer(model).encode("90210").ids) == 5
    assert len(tokenizer(model).encode("42 + 17").ids) == 5
    for token in tokenizing.SPECIAL_TOKENS:
        assert tokenizer(model).encode(token).ids == [tokenizer(model).token_to_id(token)]


def test_transformers_reads_the_tokenizer_and_its_chat_template() -> None:
    transformers = pytest.importorskip("transformers")
    loaded = transformers.AutoTokenizer.from_pretrained(ASSETS / "models" / "pocket")
    assert (loaded.bos_token, loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|im_end|>", "<|pad|>")
    assert loaded.model_max_length == 512
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello!"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == chat_text(messages)
    text = loaded.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == chat_text(messages) + "<|im_start|>assistant\n"
    folder = ASSETS / "models" / "pocket"
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["chat_template"] == (folder / "chat_template.jinja").read_text(encoding="utf-8")


def test_a_draw_uses_the_wordings_of_its_split_alone() -> None:
    import random

    for seed in range(50):
        draw = Draw(random.Random(seed), "test")
        for maker in SOURCES.values():
            maker(draw)
        assert draw.used
        assert all("/test/" in each for each in draw.used)


def test_the_assets_stay_small() -> None:
    total = sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    assert total <= 12_000_000

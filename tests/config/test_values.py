"""How written values become the types of settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from burnish.config.tree import Layer, Place, parse_text, parse_word, read_scalar
from tests.config.recipes import PAIRS, load, one, problems_of, write


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("1E5", 1e5),
        ("+.5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        ("007", 7),
        ("-1", -1),
        ("~", None),
        ("", None),
        ("null", None),
        ("true", True),
        ("False", False),
        ("yes", "yes"),
        ("on", "on"),
        ("off", "off"),
        ("2024-01-01", "2024-01-01"),
        ("1:30", "1:30"),
        ("1.2.3", "1.2.3"),
        ("none", "none"),
        ("e5", "e5"),
    ],
)
def test_words_by_yaml_1_2(text: str, value: Any):
    found = read_scalar(text)
    assert found == value and type(found) is type(value)


def stage_of(tmp_path: Path, settings: str) -> Any:
    lines = "\n".join(f"    {line}" for line in settings.splitlines())
    return load(write(tmp_path, f"model: m\ndata: d\nstages:\n  - kind: dpo\n{lines}\n")).recipe.stages[0]


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("learning_rate: 1e-5", "learning_rate", 1e-5),
        ("learning_rate: 1", "learning_rate", 1.0),
        ("max_steps: 1e3", "max_steps", 1000),
        ("max_steps: 1_000", "max_steps", 1000),
        ("shuffle: off", "shuffle", False),
        ("shuffle: No", "shuffle", False),
        ("shuffle: on", "shuffle", True),
        ("revision: 0012", "revision", "0012"),
        ("revision: 1e5", "revision", "1e5"),
        ("revision: no", "revision", "no"),
        ("revision: null", "revision", None),
        ("report_to: wandb", "report_to", ["wandb"]),
        ("report_to: none", "report_to", []),
        ("loss_type: [sigmoid, ipo]", "loss_type", ["sigmoid", "ipo"]),
        ("loss_type: ipo", "loss_type", "ipo"),
        ("micro_batch_tokens: auto", "micro_batch_tokens", "auto"),
        ("micro_batch_tokens: 512", "micro_batch_tokens", 512),
        ("precision: BF16", "precision", "bf16"),
        ("devices: 0", "devices", [0]),
        (
            "chat_template_kwargs: {enable_thinking: false, n: 2}",
            "chat_template_kwargs",
            {"enable_thinking": False, "n": 2},
        ),
    ],
)
def test_values_of_a_file(tmp_path: Path, text: str, name: str, value: Any):
    assert getattr(stage_of(tmp_path, text), name) == value


def test_target_modules_are_a_word_or_a_list(tmp_path: Path):
    assert stage_of(tmp_path, "lora: {target_modules: auto}").lora.target_modules == "auto"
    assert stage_of(tmp_path, "lora: {target_modules: [a, b]}").lora.target_modules == ["a", "b"]
    assert stage_of(tmp_path, "lora: {target_modules: q_proj}").lora.target_modules == ["q_proj"]
    assert stage_of(tmp_path, "lora: true").lora.r == 16
    assert stage_of(tmp_path, "lora: {}").lora.r == 16
    assert stage_of(tmp_path, "lora: false").lora is None


@pytest.mark.parametrize(
    ("settings", "parts"),
    [
        ({"learning_rate": "fast"}, ["is the text 'fast'", "write a number > 0"]),
        ({"learning_rate": "1e-5"}, ["is the text '1e-5' in quotes"]),
        ({"learning_rate": 0}, ["is 0.0; it must be > 0"]),
        ({"learning_rate": float("nan")}, ["is nan", "finite"]),
        ({"max_steps": -2}, ["is -2; it must be ≥ -1", "the nearest valid value is -1"]),
        ({"max_steps": 2.5}, ["the nearest are 2 and 3"]),
        ({"label_smoothing": 0.5}, ["it must be ≥ 0 and < 0.5"]),
        ({"shuffle": "maybe"}, ["is the text 'maybe'", "true or false"]),
        ({"shuffle": 1}, ["is 1", "true or false"]),
        ({"precision": "bf15"}, ["is 'bf15'", "did you mean bf16", "one of auto, fp32, bf16, fp16"]),
        ({"optim": "adam"}, ["did you mean adamw"]),
        ({"model": 3}, ["is 3", "write text"]),
        ({"report_to": ["tensorbord"]}, ["did you mean tensorboard"]),
        ({"devices": ["a"]}, ["write a whole number"]),
        ({"lora": 8}, ["is 8"]),
        ({"lora": {"r": 0}}, ["stages.dpo.lora.r: is 0; it must be ≥ 1"]),
        ({"lora": {"target_modules": "all-linaer"}}, ["did you mean all-linear"]),
        ({"micro_batch_tokens": "atuo"}, ["a whole number", "auto", "did you mean auto"]),
        ({"micro_batch_tokens": 0}, ["is 0; it must be ≥ 1 or auto"]),
        ({"columns": ["a"]}, ["is a list", "mapping"]),
        ({"data": {"split": "train"}}, ["has no 'source'"]),
        ({"beta": None}, ["has no value"]),
        ({"beta": [1]}, ["is a list"]),
        ({"beta": True}, ["is True", "write a number"]),
    ],
)
def test_values_that_are_wrong(settings: dict, parts: list[str]):
    text = problems_of({**PAIRS, "stages": [{"kind": "dpo", **settings}]})
    for part in parts:
        assert part in text, text


def test_words_of_a_command_line():
    assert one("dpo", "loss_type=sigmoid,ipo", "dpo.loss_weights=1,2").loss_weights == [1.0, 2.0]
    assert one("sft", "report_to=[tensorboard, wandb]").report_to == ["tensorboard", "wandb"]
    assert one("sft", "shuffle=0").shuffle is False
    assert one("sft", "shuffle=on").shuffle is True
    assert one("sft", "data.split=train[:5%]").data.split == "train[:5%]"
    assert one("sft", "data=a,b.jsonl").data == ["a", "b.jsonl"]
    assert one("sft", "chat_template={{ messages }}").chat_template == "{{ messages }}"
    assert one("sft", "columns.prompt=question", columns={"completion": "answer"}).columns == {
        "prompt": "question",
        "completion": "answer",
    }
    assert one("sft", "sft.data.1.weight=3", data=["a", {"source": "b"}]).data[1].weight == 3.0
    assert one("sft", "stages.0.data.0.weight=3", data=["a", "b"]).data[0].weight == 3.0
    mixture = {"model": "m", "stages": [{"kind": "sft", "data": ["a", "b"]}]}
    assert load(mixture, "data.1.weight=3").recipe.stages[0].data[1].weight == 3.0


def test_quotes_keep_text():
    place = Place(Layer.COMMAND, "x")
    assert parse_word('"1"', place).value == "1"
    assert parse_word("'a, b'", place).value == "a, b"
    assert parse_word("[1, 2", place).value == "[1, 2"
    assert parse_word("a # b", place).value == "a # b"


def test_every_value_has_its_line():
    root = parse_text("a: 1\nb:\n  - c: 2\n    d:\n  - 3\n", "f")
    assert root is not None
    lines = {path: str(node.place) for path, node in root.walk() if path}
    assert lines == {"a": "f:1", "b": "f:3", "b.0": "f:3", "b.0.c": "f:3", "b.0.d": "f:4", "b.1": "f:5"}

"""S2-09: names of run folders from a template."""

from __future__ import annotations

import pytest

from tests.config.recipes import PAIRS, load, problems_of


@pytest.mark.parametrize(
    ("template", "name"),
    [
        ("{name}", "recipe"),
        ("{stage}_{model}_{train%}_{eval%}_{epochs}", "dpo_Qwen3-0.6B_50_10_3"),
        ("{stage}_{model}_{train_percent}_{eval_percent}_{epochs}", "dpo_Qwen3-0.6B_50_10_3"),
        ("{stages}-{seed}", "sft-dpo-7"),
        ("{dpo.beta}-{sft.learning_rate}", "0.2-0.001"),
        ("{learning_rate}_{lr}", "1e-06_1e-06"),
        ("a b/c:{{x}}", "a-b-c-x"),
        ("..{name}", "recipe"),
    ],
)
def test_templates(template: str, name: str):
    sft = {"kind": "sft", "learning_rate": 1e-3}
    dpo = {"kind": "dpo", "beta": 0.2, "slice_share": 0.5, "validation_split": 0.1, "num_train_epochs": 3}
    source = {**PAIRS, "model": "Qwen/Qwen3-0.6B", "seed": 7, "run_name": template, "stages": [sft, dpo]}
    assert load(source).run_name() == name


def test_the_share_of_a_split():
    data = {"source": "x", "split": "train[:5%]"}
    assert load({**PAIRS, "run_name": "{train%}", "stages": [{"kind": "sft", "data": data}]}).run_name() == "5"


def test_several_models():
    loaded = load({"models": ["a/b", "./c/d/"], "data": "x", "run_name": "{model}", "stages": [{"kind": "sft"}]})
    assert (loaded.run_name(), loaded.run_name("a/b"), loaded.run_name("./c/d/")) == ("2-models", "b", "d")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{modle}", "did you mean model"),
        ("{dpo.bta}", "there is no field {dpo.bta}"),
        ("{", "is not a template"),
        ("///", "is empty"),
        ("x" * 300, "is too long"),
    ],
)
def test_templates_that_name_nothing(template: str, expected: str):
    text = problems_of({**PAIRS, "run_name": template, "stages": [{"kind": "dpo"}]})
    assert expected in text and "run_name" in text

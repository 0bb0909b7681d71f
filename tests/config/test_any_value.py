"""Whatever stands in a recipe, the outcome is a recipe or a ConfigError, never another exception."""

from __future__ import annotations

import random
from typing import Any

import pytest
import yaml

from burnish.config.keys import RECIPE_KEYS, kind_names, settings_class
from burnish.config.load import load_recipe
from burnish.config.registry import ALIASES
from burnish.errors import ConfigError
from tests.config.recipes import PAIRS, write

VALUES: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    7,
    0.1,
    -0.5,
    1e30,
    float("inf"),
    float("nan"),
    10**30,
    "",
    " ",
    "x",
    "none",
    "auto",
    "1e-5",
    "yes",
    "ü😀",
    "a.b",
    "a:b",
    "../x",
    "x" * 300,
    "{name}",
    "{",
    "train[:5%]",
    "\x7f",
    [],
    [None],
    [1, "a"],
    [[1]],
    ["a", "a"],
    ["sft"],
    [{"source": "x"}],
    [{}],
    {},
    {"a": 1},
    {"source": "x"},
    {"r": 4},
    {"r": None, "alpha": "x"},
    {"source": None},
    {"source": {"source": "x"}},
    {"0": 1},
    {"": ""},
]
WORDS = [
    "",
    "null",
    "true",
    "-1",
    "1e999",
    "[",
    "[]",
    "{}",
    "{a: b}",
    "a,b",
    ",",
    "'",
    '"x"',
    "&a",
    "*a",
    "!x",
    "- a",
    "a: b: c",
    "%",
    "\n",
]


def keys_of(kind: str) -> list[str]:
    """Settings of a kind, and words that are not quite settings."""
    names = list(settings_class(ALIASES[kind].kind if kind in ALIASES else kind).model_fields)
    return [*names, "bf16", "fp16", "use_peft", "lora_r", "lr", "nonsense", "", "a.b", "0", "lora.r"]


def attempt(source: Any, overrides: list[str], env: dict[str, str]) -> None:
    try:
        loaded = load_recipe(source, overrides=overrides, env=env)
    except ConfigError as error:
        assert error.exit_code == 2 and error.remedy
    else:
        loaded.run_name()
        yaml.safe_dump(loaded.recipe.resolved())


@pytest.mark.parametrize("seed", range(10))
def test_any_value_anywhere(seed: int, tmp_path):
    rng = random.Random(seed)
    for _ in range(40):
        kinds = [rng.choice(kind_names()) for _ in range(rng.randint(1, 3))]
        stages = [
            {"kind": kind, **{k: rng.choice(VALUES) for k in rng.sample(keys_of(kind), rng.randint(0, 4))}}
            for kind in kinds
        ]
        top = {key: rng.choice(VALUES) for key in rng.sample([*RECIPE_KEYS, *keys_of(kinds[0])], rng.randint(0, 3))}
        source: Any = {**PAIRS, "stages": stages, **top}
        if rng.random() < 0.3:
            source = write(tmp_path, yaml.safe_dump(source, allow_unicode=True))
        heads = ["", "stages.0.", f"{kinds[0]}.", "stages.9.", "stages."]
        overrides = [
            f"{rng.choice(heads)}{rng.choice(keys_of(kinds[0]))}={rng.choice(WORDS)}" for _ in range(rng.randint(0, 2))
        ]
        env = {
            f"BURNISH_{rng.choice(['', 'SFT', kinds[0].upper()])}__{rng.choice(keys_of('dpo')).upper()}": rng.choice(
                WORDS
            )
        }
        attempt(source, overrides, env if rng.random() < 0.5 else {})


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[] if k == "dpo" else pytest.mark.slow) for k in kind_names()])
def test_every_setting_with_every_value(kind: str):
    for key in keys_of(kind):
        for value in VALUES:
            attempt({**PAIRS, "stages": [{"kind": kind, key: value}]}, [], {})
        for word in WORDS:
            attempt({**PAIRS, "stages": [{"kind": kind}]}, [f"stages.0.{key}={word}"], {})


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_every_value_as_a_recipe(value: Any, tmp_path):
    for key in RECIPE_KEYS:
        attempt({**PAIRS, "stages": [{"kind": "sft"}], key: value}, [], {})
    for source in ({"stages": value}, {"stages": [value]}, {"kind": value, **PAIRS}):
        attempt(source, [], {})
    attempt(write(tmp_path, yaml.safe_dump(value, allow_unicode=True)), [], {})

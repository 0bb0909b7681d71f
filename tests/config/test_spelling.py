"""R-07: 60 generated typos of real keys each get the right suggestion in the top two; so does every kind and value."""

from __future__ import annotations

import random
import re

import pytest

from burnish.config.data import DataSource
from burnish.config.keys import RECIPE_KEYS, STAGE_ONLY, all_setting_names, kind_names, settings_class
from burnish.config.registry import KINDS
from burnish.config.spelling import compute_edit_distance, suggest
from burnish.config.train import LoraSettings
from tests.config.recipes import PAIRS, problems_of

KEYBOARD = {"a": "s", "e": "r", "i": "o", "l": "k", "n": "m", "o": "p", "r": "t", "s": "d", "t": "y", "_": "-"}


def typos(word: str, rng: random.Random) -> list[str]:
    """A letter lost, doubled, swapped with its neighbour, hit beside; a separator lost; another case."""
    i = rng.randrange(1, len(word) - 1)
    found = [
        word[:i] + word[i + 1 :],
        word[:i] + word[i] + word[i:],
        word[:i] + word[i + 1] + word[i] + word[i + 2 :],
        word[:i] + KEYBOARD.get(word[i], "x") + word[i + 1 :],
        word.replace("_", ""),
        word.upper(),
        word + "s" if not word.endswith("s") else word[:-1],
    ]
    return [typo for typo in found if typo != word]


def generate(count: int, seed: int = 1) -> list[tuple[str, str, str]]:
    """(kind of stage, key, typo), over all settings of all kinds, none of which is a valid name itself."""
    from burnish.config.aliases import KEY_ALIASES

    rng = random.Random(seed)
    known = {*RECIPE_KEYS, *all_setting_names(), *KEY_ALIASES}
    cases = []
    while len(cases) < count:
        kind = rng.choice(list(KINDS))
        key = rng.choice([name for name in settings_class(kind).model_fields if len(name) > 3])
        typo = rng.choice(typos(key, rng))
        if typo.replace("-", "_") not in known:
            cases.append((kind, key, typo))
    return cases


def suggestions(text: str) -> list[str]:
    """The words after "did you mean"."""
    match = re.search(r"did you mean ([^?]+)\?", text)
    return match.group(1).split(" or ") if match else []


@pytest.mark.parametrize(("kind", "key", "typo"), generate(60))
def test_sixty_typos_in_a_stage(kind: str, key: str, typo: str):
    text = problems_of({**PAIRS, "stages": [{"kind": kind, typo: 1}]})
    assert key in suggestions(text)[:2], text


@pytest.mark.parametrize(("kind", "key", "typo"), generate(60, seed=2))
def test_sixty_typos_at_the_top(kind: str, key: str, typo: str):
    if key in STAGE_ONLY:
        return
    text = problems_of({**PAIRS, typo: 1, "stages": [{"kind": kind}]})
    assert key in suggestions(text)[:2], text


@pytest.mark.parametrize(("kind", "key", "typo"), generate(60, seed=3))
def test_sixty_typos_on_the_command_line(kind: str, key: str, typo: str):
    text = problems_of({**PAIRS, "stages": [{"kind": kind}]}, f"stages.0.{typo}=1")
    assert key in suggestions(text)[:2], text


def test_typos_of_nested_keys_and_kinds():
    rng = random.Random(4)
    for field, names in (("lora", list(LoraSettings.model_fields)), ("data", list(DataSource.model_fields))):
        for key in (name for name in names if len(name) > 3):
            for typo in typos(key, rng):
                if typo.lower() in names:
                    continue
                text = problems_of({**PAIRS, "stages": [{"kind": "sft", field: {"source": "x", typo: 1}}]})
                assert key in text.split("→", 1)[1], text
    for kind in kind_names():
        for typo in typos(kind, rng):
            assert kind in suggest(typo, kind_names())


def test_far_words_get_no_suggestion():
    assert suggest("zzzzzzzz", all_setting_names()) == []


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "abc", 3), ("beta", "beta", 0), ("ab", "ba", 1), ("kitten", "sitting", 3)]
)
def test_edit_distance(a: str, b: str, distance: int):
    assert compute_edit_distance(a, b) == compute_edit_distance(b, a) == distance

"""Every bundled recipe, found recursively, loads."""

from __future__ import annotations

from pathlib import Path

import pytest

import burnish
from burnish.config.bundled import bundled_recipes, read_summary
from burnish.config.load import load_recipe
from burnish.config.registry import KINDS

FOLDER = Path(burnish.__file__).parent / "recipes"
FILES = sorted(FOLDER.rglob("*.y*ml"))


def test_there_are_enough():
    names = {path.stem for path in FILES}
    assert len(FILES) >= 6
    assert {"quickstart", "hh-dpo", *KINDS} <= names
    assert names == set(bundled_recipes()), "each is found by its name"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_each_loads_by_path_and_by_name(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    by_path, by_name = load_recipe(path, env={}), load_recipe(path.stem, env={})
    assert by_path.recipe == by_name.recipe
    assert by_name.recipe.name == path.stem
    assert by_name.notes == ()
    assert read_summary(bundled_recipes()[path.stem]), "the first line says what it is"


def test_hh_dpo_takes_any_model_and_data():
    recipe = load_recipe("hh-dpo", overrides=["model=pocket", "data=pocket/preferences"], env={}).recipe
    training = recipe.stages[:3]
    assert [stage.data for stage in training] == ["pocket/preferences"] * 3  # pyright: ignore[reportAttributeAccessIssue]
    assert training[0].model == "pocket"  # pyright: ignore[reportAttributeAccessIssue]


def test_quickstart_is_offline():
    recipe = load_recipe("quickstart", env={}).recipe
    assert recipe.model == "pocket"
    assert [stage.kind for stage in recipe.stages] == ["sft", "reward", "dpo", "evaluate"]  # pyright: ignore[reportAttributeAccessIssue]
    assert all(str(getattr(stage, "data", None)).startswith(("pocket/", "None")) for stage in recipe.stages)

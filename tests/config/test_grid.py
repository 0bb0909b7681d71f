"""`grid:`: what its keys mean, which cells come of it, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from burnish.cli.main import main
from burnish.config.load import LoadedRecipe
from burnish.config.schema import build_schema
from tests.config.recipes import load, problems_of

GRID: dict[str, Any] = {
    "prefer": {"dpo": {"kind": "dpo"}, "ipo": {"kind": "ipo", "beta": 0.2}},
    "prefer.seed": [1, 2],
}
RECIPE: dict[str, Any] = {
    "name": "small",
    "models": ["pocket", "pocket-small"],
    "stages": [
        {"kind": "sft", "data": "pocket/chat"},
        {"name": "prefer", "init_from": "sft", "data": "pocket/preferences", "beta": 0.5},
    ],
    "grid": GRID,
}


def with_grid(**changes: Any) -> dict[str, Any]:
    return {**RECIPE, "grid": {**GRID, **changes}}


def names_of(loaded: LoadedRecipe) -> list[str]:
    assert loaded.grid is not None
    return [cell.name for cell in loaded.grid.cells]


def stage_of(loaded: LoadedRecipe, cell: str, stage: str) -> Any:
    assert loaded.grid is not None
    return next(c for c in loaded.grid.cells if c.name == cell).recipe.stage(stage)


def test_every_combination_is_a_complete_recipe():
    loaded = load(RECIPE)
    assert names_of(loaded) == [
        f"{m}_{p}_seed={s}" for m in ("pocket", "pocket-small") for p in ("dpo", "ipo") for s in (1, 2)
    ]
    first, last = (stage_of(loaded, name, "prefer") for name in ("pocket_dpo_seed=1", "pocket-small_ipo_seed=2"))
    assert (first.kind, first.loss_type, first.beta, first.seed) == ("dpo", "sigmoid", 0.5, 1)
    assert (last.kind, last.loss_type, last.beta, last.seed) == ("dpo", "ipo", 0.2, 2), "a form is laid over the stage"
    assert [stage_of(loaded, n, "sft").model for n in names_of(loaded)] == ["pocket"] * 4 + ["pocket-small"] * 4
    assert {stage_of(loaded, n, "sft").seed for n in names_of(loaded)} == {42}, "prefer.seed reaches prefer alone"
    assert loaded.grid is not None
    assert loaded.grid.baseline == {"prefer": "dpo"}, "by default the first form"
    assert loaded.for_cell(loaded.grid.cells[0]).grid is None


def test_a_key_without_a_stage_holds_for_all_as_on_the_command_line():
    recipe = {**RECIPE, "grid": {"seed": [1, 2]}}
    recipe["stages"] = [{"kind": "sft", "data": "pocket/chat", "seed": 9}]
    loaded = load({**recipe, "models": ["pocket"]})
    assert [stage_of(loaded, n, "sft").seed for n in names_of(loaded)] == [1, 2]


def test_a_cell_means_what_the_same_words_mean():
    """The layer between file and command line: the cell's recipe is that of `burnish run … prefer.kind=ipo …`."""
    loaded = load(RECIPE)
    plain = {**RECIPE, "models": [], "model": "pocket"}
    del plain["grid"]
    del plain["models"]
    words = ("prefer.kind=ipo", "prefer.beta=0.2", "prefer.seed=1")
    assert loaded.grid is not None
    assert loaded.grid.cells[2].name == "pocket_ipo_seed=1"
    assert loaded.grid.cells[2].recipe.resolved() == load(plain, *words).recipe.resolved()


def test_the_command_line_is_stronger_and_reaches_all_cells():
    loaded = load(RECIPE, "prefer.beta=0.7", "max_steps=3")
    assert {stage_of(loaded, n, "prefer").beta for n in names_of(loaded)} == {0.7}
    assert {stage_of(loaded, n, "sft").max_steps for n in names_of(loaded)} == {3}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (("grid.prefer.seed=[5]", "models=pocket"), ["pocket_dpo_seed=5", "pocket_ipo_seed=5"]),
        (("grid.prefer.seed=[5]", "model=pocket"), ["dpo_seed=5", "ipo_seed=5"]),
        (("grid.prefer.dpo.beta=0.3", "grid.prefer.seed=[1]", "model=pocket"), ["dpo_seed=1", "ipo_seed=1"]),
        (
            ("grid.prefer.low={kind: dpo, beta: 0.01}", "grid.prefer.seed=[1]", "model=pocket"),
            ["dpo_seed=1", "ipo_seed=1", "low_seed=1"],
        ),
        (("grid={prefer: [dpo, ipo, hinge]}", "model=pocket"), ["dpo", "ipo", "hinge"]),
        (("grid={prefer: [{kind: dpo}, {kind: dpo, beta: 0.2}]}", "model=pocket"), ["dpo", "dpo,beta=0.2"]),
        (
            ("grid={prefer: [dpo], sft.learning_rate: [1e-4, 2e-5]}", "model=pocket"),
            ["dpo_learning_rate=1e-4", "dpo_learning_rate=2e-5"],
        ),
        (("grid={prefer: [dpo], lora: {small: {r: 4}, none: null}}", "model=pocket"), ["dpo_small", "dpo_none"]),
        (("grid={prefer: [dpo], stages.prefer.beta: [0.1, 0.2]}", "model=pocket"), ["dpo_beta=0.1", "dpo_beta=0.2"]),
    ],
)
def test_axes_can_be_changed_from_the_command_line(words, names):
    assert names_of(load(RECIPE, *words)) == names


def test_any_recipe_becomes_a_grid_from_the_command_line():
    recipe = {"model": "pocket", "stages": [{"kind": "sft", "data": "pocket/chat"}]}
    loaded = load(recipe, "grid.seed=[1, 2]")
    assert names_of(loaded) == ["seed=1", "seed=2"]
    assert loaded.grid is not None and loaded.grid.baseline == {}, "seeds alone compare nothing"
    assert load(recipe, "grid={}").grid is None


def test_values_written_in_the_file_are_read_like_the_files():
    """A list of losses is one value, text with a comma stays text, and a setting's short name is understood."""
    grid = {"prefer.loss_type": {"both": ["sigmoid", "ipo"], "one": "sigmoid"}, "prefer.lr": [1e-5, 2e-5]}
    recipe = {**RECIPE, "models": ["pocket"], "grid": grid}
    recipe["stages"] = [{"kind": "dpo", "name": "prefer", "data": "a,b.jsonl"}]
    loaded = load(recipe)
    assert names_of(loaded) == [f"pocket_{n}_lr={x}" for n in ("both", "one") for x in ("1e-05", "2e-05")]
    assert stage_of(loaded, "pocket_both_lr=1e-05", "prefer").loss_type == ["sigmoid", "ipo"]
    assert stage_of(loaded, "pocket_one_lr=2e-05", "prefer").learning_rate == 2e-5


def test_a_stage_keeps_its_name_whatever_its_form():
    """A stage without a name is called by its kind; a form of another kind must not rename it."""
    recipe = {"model": "pocket", "data": "pocket/preferences", "grid": {"dpo": ["ipo", "hinge"]}}
    recipe["stages"] = [{"kind": "dpo"}, {"kind": "reward", "init_from": "dpo"}]
    grid = load(recipe).grid
    assert grid is not None
    assert [cell.recipe.stage_names() for cell in grid.cells] == [["dpo", "reward"]] * 2


def test_exclude_leaves_cells_out():
    names = names_of(load(with_grid(exclude=[{"model": "pocket-small", "prefer": "ipo"}, {"prefer.seed": 2}])))
    assert names == ["pocket_dpo_seed=1", "pocket_ipo_seed=1", "pocket-small_dpo_seed=1"]
    names = names_of(load(with_grid(exclude=[{"prefer": ["dpo", "ipo"], "model": "pocket"}])))
    assert names == names_of(load(RECIPE))[4:]


@pytest.mark.parametrize(
    ("baseline", "expected"),
    [
        ("ipo", {"prefer": "ipo"}),
        ("sft", {"": "sft"}),
        ("base", {"": "base"}),
        ("pocket-small", {"model": "pocket-small"}),
        ({"model": "pocket", "prefer": "ipo"}, {"model": "pocket", "prefer": "ipo"}),
    ],
)
def test_baselines(baseline, expected):
    grid = load(with_grid(baseline=baseline)).grid
    assert grid is not None
    assert grid.baseline == expected


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prefre.seed": [1]}, "did you mean prefer.seed?"),
        ({"learning_rat": [1]}, "did you mean learning_rate "),
        ({"reward.beta": [1]}, "no stage of kind reward"),
        ({"prefer.betta": [1]}, "did you mean beta?"),
        ({"prefer": {"dpo": {"kind": "dpo", "betta": 1}}}, "did you mean beta?"),
        ({"prefer": {"dpo": {"kind": "dpoo"}}}, "did you mean dpo or tdpo?"),
        ({"prefer.beta": [0.1, -1]}, "(in cell pocket_dpo_seed=1_beta=-1"),
        ({"seed": 3}, "write a list of values"),
        ({"seed": []}, "write a list of values"),
        ({"seed": [1, 1]}, "is there twice"),
        ({"prefer.beta": [0.1, 0.10]}, "is there twice"),
        ({"stages.prefer.seed": [3]}, "is the same as"),
        ({"prefer.beta": {"a": 0.1, "b": 0.1}}, "are the same run"),
        ({"prefer.beta": {"a/b": 0.1}}, "no good name"),
        ({"prefer.beta": {"A": 0.1, "a": 0.2}}, "is there twice"),
        ({"lora": [{"r": 4}]}, "no good name"),
        ({"run_name": ["a"]}, "belongs to the whole grid"),
        ({"init_from": ["sft"]}, "belongs to a stage"),
        ({"prefer.name": ["a"]}, "there is no setting"),
        ({"model": ["pocket"]}, "models are given twice"),
        ({"seed": list(range(100))}, "has 800 cells (2 model × 2 prefer × 2 prefer.seed × 100 seed); at most 256"),
        ({"max_cells": 3}, "at most 3 are run"),
        ({"max_cells": "many"}, "write a number of cells"),
        ({"baseline": "ippo"}, "did you mean ipo?"),
        ({"baseline": {"prefr": "ipo"}}, "did you mean prefer?"),
        ({"exclude": [{"prefer": "ip"}]}, "did you mean ipo?"),
        ({"exclude": [{"prefer": ["dpo", "ipo"]}]}, "leaves no cell"),
        ({"exclude": ["dpo"]}, "write e.g."),
        ({"": [1]}, "there is no such setting"),
        ({"prefer.data": {f"name-{'x' * 40}": "a.jsonl"}, "sft.data": {f"name-{'y' * 40}": "a.jsonl"}}, "letters"),
    ],
)
def test_mistakes_are_told_with_the_way_out(change, said):
    assert said in problems_of(with_grid(**change))


def test_more_cells_are_allowed_when_asked_for():
    grid = load(with_grid(seed=list(range(3)), max_cells=24)).grid
    assert grid is not None and len(grid.cells) == 24


def test_one_value_for_an_axis_is_refused():
    assert "grid.prefer.seed=[…]" in problems_of(RECIPE, "prefer.seed=3")
    assert "grid.prefer.seed=[…]" in problems_of(RECIPE, "stages.1.seed=3")
    assert "are the same run" in problems_of(RECIPE, "seed=3")


def test_a_grid_is_a_mapping_and_comes_from_the_recipe():
    assert "not a mapping" in problems_of({**RECIPE, "grid": [1]})
    assert "cannot come from the environment" in problems_of(RECIPE, env={"BURNISH__GRID__SEED": "[1]"})


def test_problems_of_all_cells_are_told_once():
    text = problems_of({**RECIPE, "bta": 1})
    assert text.count("there is no setting") == 1 and "in cell" not in text


def test_the_schema_knows_the_grid():
    assert build_schema()["properties"]["grid"]["type"] == "object"


def test_config_show_shows_one_cell(capsys):
    assert main(["config", "show", "method-comparison"]) == 0
    assert "# one of 30 cells: pocket_dpo_seed=1" in capsys.readouterr().out
    assert main(["config", "show", "method-comparison", "--cell", "pocket-small_ipo_seed=3"]) == 0
    text = capsys.readouterr().out
    assert "loss_type: ipo" in text and "model: pocket-small" in text and "seed: 3" in text
    assert main(["config", "show", "method-comparison", "--cell", "pocket_ip_seed=3"]) == 2
    assert "did you mean pocket_ipo_seed=3" in capsys.readouterr().err
    assert main(["config", "show", "quickstart", "--cell", "x"]) == 2

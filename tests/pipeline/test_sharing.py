"""Which stages cells have in common, from settings alone."""

from __future__ import annotations

from typing import Any

from burnish.pipeline.sharing import find_relevant, identify_stages, place_stages
from tests.config.recipes import load
from tests.config.test_grid import GRID, RECIPE

EVALUATED: dict[str, Any] = {
    **RECIPE,
    "stages": [
        RECIPE["stages"][0],
        {"kind": "evaluate", "name": "before", "of": ["base", "sft"]},
        RECIPE["stages"][1],
        {"kind": "evaluate", "of": ["prefer"]},
    ],
}


def folders(recipe: dict[str, Any], *words: str) -> dict[str, list[str]]:
    grid = load(recipe, *words).grid
    assert grid is not None
    return {cell: [p.folder for p in found] for cell, found in place_stages(grid.axes, grid.cells).items()}


def test_a_stage_before_the_fork_is_shared_and_named_after_what_it_depends_on():
    found = folders(EVALUATED)
    assert found["pocket_dpo_seed=1"] == [
        "shared/01-sft--pocket",
        "shared/02-before--pocket",
        "cells/pocket_dpo_seed=1/03-prefer",
        "cells/pocket_dpo_seed=1/04-evaluate",
    ]
    assert found["pocket-small_ipo_seed=2"][:2] == ["shared/01-sft--pocket-small", "shared/02-before--pocket-small"]
    assert len({tuple(x[:2]) for x in found.values()}) == 2
    assert len({x[2] for x in found.values()}) == 8


def test_a_seed_of_all_stages_is_shared_by_the_methods_only():
    found = folders({**EVALUATED, "grid": {"prefer": GRID["prefer"], "seed": [1, 2]}})
    assert found["pocket_dpo_seed=1"][0] == found["pocket_ipo_seed=1"][0] == "shared/01-sft--pocket_seed=1"
    assert found["pocket_dpo_seed=2"][0] == "shared/01-sft--pocket_seed=2"


def test_one_model_needs_no_name():
    found = folders({**EVALUATED, "models": ["pocket"]})
    assert {x[0] for x in found.values()} == {"shared/01-sft"}


def test_cells_left_out_do_not_change_the_places():
    """A cell alone keeps its stage in its own folder, a class of two shares, whatever is excluded."""
    exclude = [{"model": "pocket-small", "prefer": "dpo"}, {"model": "pocket-small", "prefer.seed": 2}]
    found = folders({**EVALUATED, "grid": {**GRID, "exclude": exclude}})
    assert found["pocket-small_ipo_seed=1"][0] == "cells/pocket-small_ipo_seed=1/01-sft"
    assert found["pocket_dpo_seed=1"][0] == "shared/01-sft--pocket"


def test_the_identity_holds_all_that_a_result_depends_on():
    """R-18 for grids: any setting of the stage or of one before it, and the model, make another stage."""
    recipe = {**EVALUATED, "model": "pocket", "grid": {}}
    del recipe["models"]

    def identify(*words: str) -> list[str]:
        return identify_stages(load(recipe, "prefer.kind=dpo", *words).recipe)

    plain = identify()
    assert plain == identify()
    for words, changed in (
        ("sft.learning_rate=1e-3", {0, 1, 2, 3}),
        ("model=pocket-small", {0, 1, 2, 3}),
        ("prefer.beta=0.3", {2, 3}),
        ("prefer.data=pocket/chat", {2, 3}),
        ("before.max_items=3", {1}),
        ("evaluate.max_items=3", {3}),
    ):
        assert {at for at, (a, b) in enumerate(zip(plain, identify(words), strict=True)) if a != b} == changed, words


def test_the_identity_holds_the_other_stages_that_one_reads():
    """A reward model that weighs the pairs, or a teacher, makes another stage when it is trained otherwise."""
    reward = {"kind": "reward", "data": "pocket/preferences"}
    weighted = {"kind": "madpo", "data": "pocket/preferences", "reward_model": "reward"}
    taught = {"kind": "distill", "data": "pocket/chat", "teacher": "madpo"}
    recipe = {**RECIPE, "model": "pocket", "grid": {}, "stages": [reward, weighted, taught]}
    del recipe["models"]
    plain = identify_stages(load(recipe).recipe)
    changed = identify_stages(load(recipe, "reward.learning_rate=1e-3").recipe)
    assert [a != b for a, b in zip(plain, changed, strict=True)] == [True, True, True]
    grid = {**recipe, "grid": {"reward.learning_rate": [1e-3, 2e-3], "madpo.madpo_tau": [2.0, 3.0]}}
    found = folders(grid)
    assert len({x[0] for x in found.values()}) == 2 and all(x[0].startswith("shared/") for x in found.values())
    assert len({x[1] for x in found.values()}) == len({x[2] for x in found.values()}) == 4


def test_relevant_axes_are_the_fewest_that_decide():
    grid = load(RECIPE).grid
    assert grid is not None
    labels = [axis.label for axis in grid.axes]

    def found(*decisive: str) -> list[str]:
        return find_relevant(labels, [(c.values, " ".join(c.values[x] for x in decisive)) for c in grid.cells])

    assert found() == [] and found("prefer") == ["prefer"]
    assert found("model", "prefer.seed") == ["model", "prefer.seed"]

"""Short ways to load recipes in tests: no environment, no look at the machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from burnish.config.load import LoadedRecipe, load_recipe
from burnish.config.problems import RecipeError

MINIMAL = {"model": "pocket", "stages": [{"kind": "sft", "data": "pocket/chat"}]}
PAIRS = {"model": "pocket", "data": "pocket/preferences"}


def load(
    source: str | Path | Mapping[str, Any], *overrides: str, env: Mapping[str, str] | None = None, **more: Any
) -> LoadedRecipe:
    """Load without the process's environment and without a look at files."""
    return load_recipe(source, overrides=overrides, env=env or {}, **{"check_machine": False, **more})


def one(kind: str = "sft", *overrides: str, **settings: Any) -> Any:
    """The settings of a recipe of one stage."""
    return load({**PAIRS, "stages": [{"kind": kind, **settings}]}, *overrides).recipe.stages[0]


def problems_of(source: Any, *overrides: str, **more: Any) -> str:
    """The text of the error that a recipe gives."""
    with pytest.raises(RecipeError) as caught:
        load(source, *overrides, **more)
    return str(caught.value)


def write(folder: Path, text: str, name: str = "recipe.yaml") -> Path:
    """A recipe file."""
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path

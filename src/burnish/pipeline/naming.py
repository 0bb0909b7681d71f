"""Which models a command runs for, and where its run lies."""

from __future__ import annotations

from pathlib import Path

from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.errors import UsageError


def choose_models(recipe: Recipe, options: RunOptions) -> list[str | None]:
    """The base models to run for, in order.

    Raises:
        UsageError: --model-index is out of range.
    """
    models = recipe.model_list()
    if options.model_index is None:
        return models
    if not 0 <= options.model_index < len(models):
        raise UsageError(
            f"--model-index {options.model_index} is out of range: the recipe has {len(models)} models",
            remedy=f"give a number from 0 to {len(models) - 1}",
        )
    return [models[options.model_index]]


def find_folder(loaded: LoadedRecipe, options: RunOptions) -> Path:
    """The run's folder. Several models share one, so its name never depends on which of them is chosen."""
    several = len(loaded.recipe.model_list()) > 1
    name = options.run_name or (loaded.run_name() if several else loaded.run_name(loaded.recipe.model_list()[0]))
    return Path(options.output_dir or loaded.recipe.output_dir) / name

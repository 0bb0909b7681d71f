"""Which models a command runs for, which other models its stages read, and where its run lies."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.train import TrainSettings
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


def find_other_model(settings: TrainSettings, finals: Mapping[str, Path]) -> str | None:
    """The teacher of a stage, or its reference where that is another model; None where there is neither.

    Args:
        finals: Name → result of the stages before it.
    """
    teacher = getattr(settings, "teacher", None)
    if teacher is not None:
        return str(finals.get(teacher, teacher))
    reference = getattr(settings, "reference", "same")
    return None if reference == "same" else reference


def find_folder(loaded: LoadedRecipe, options: RunOptions) -> Path:
    """The run's folder. Several models share one, so its name never depends on which of them is chosen."""
    several = len(loaded.recipe.model_list()) > 1
    name = options.run_name or (loaded.run_name() if several else loaded.run_name(loaded.recipe.model_list()[0]))
    return Path(options.output_dir or loaded.recipe.output_dir) / name

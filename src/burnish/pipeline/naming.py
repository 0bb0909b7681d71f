"""Which models a command runs for, which other models its stages read, and where its run lies."""

from __future__ import annotations

from collections.abc import Container, Mapping
from fnmatch import fnmatchcase
from pathlib import Path

from burnish.config.grid import MODEL, Cell, Grid
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.registry import find_method_spec, list_model_settings
from burnish.config.spelling import describe_suggestions, suggest
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
    return None if reference == "same" else str(finals.get(reference, reference))


def find_reward_model(settings: TrainSettings, finals: Mapping[str, Path]) -> str | None:
    """The reward model whose margins weigh a stage's pairs; None where they are not weighed so.

    Args:
        finals: Name → result of the stages before it.
    """
    name = getattr(settings, "reward_model", None)
    return None if name is None else str(finals.get(name, name))


def find_starts(settings: TrainSettings, finals: Mapping[str, Path]) -> dict[str, str]:
    """Model → where it starts, of the models whose kind has a setting for that, where it is set.

    Args:
        finals: Name → result of the stages before it.
    """
    models = find_method_spec(settings.kind).models
    named = {name: getattr(settings, model.start) for name, model in models.items() if model.start is not None}
    return {name: str(finals.get(start, start)) for name, start in named.items() if start is not None}


def find_named(settings: TrainSettings, names: Container[str]) -> list[str]:
    """Those of the stages before it that a stage reads beside the one that it starts from."""
    found = [getattr(settings, key, None) for key in list_model_settings()]
    return [name for name in found if name is not None and name in names]


def find_folder(loaded: LoadedRecipe, options: RunOptions) -> Path:
    """The run's folder. Several models share one, so its name never depends on which of them is chosen."""
    several = len(loaded.recipe.model_list()) > 1
    name = options.run_name or (loaded.run_name() if several else loaded.run_name(loaded.recipe.model_list()[0]))
    return Path(options.output_dir or loaded.recipe.output_dir) / name


def choose_cells(loaded: LoadedRecipe, options: RunOptions) -> list[Cell]:
    """The cells of a grid to run, in order.

    Raises:
        UsageError: --cell or --model-index names none.
    """
    grid = loaded.grid
    assert grid is not None
    cells = list(grid.cells)
    if options.model_index is not None:
        cells = _choose_by_model(grid, options.model_index)
    for pattern in options.cells:
        if not any(fnmatchcase(cell.name, pattern) for cell in cells):
            near = describe_suggestions(suggest(pattern, [cell.name for cell in cells]))
            raise UsageError(
                f"there is no cell {pattern!r}",
                where="--cell",
                found=pattern,
                remedy=near or "`--dry-run` lists the cells; * stands for any letters",
            )
    if not options.cells:
        return cells
    return [cell for cell in cells if any(fnmatchcase(cell.name, pattern) for pattern in options.cells)]


def _choose_by_model(grid: Grid, index: int) -> list[Cell]:
    axis = next((axis for axis in grid.axes if axis.label == MODEL), None)
    if axis is None or index >= len(axis.choices):
        count = len(axis.choices) if axis else 1
        raise UsageError(
            f"--model-index {index} is out of range: the grid has {count} model{'s' * (count > 1)}",
            remedy=f"give a number from 0 to {count - 1}",
        )
    return [cell for cell in grid.cells if cell.values[MODEL] == axis.choices[index].name]

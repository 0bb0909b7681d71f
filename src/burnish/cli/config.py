"""`burnish config schema`, `example`, `show`, `reference`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from burnish.cli.flags import KindName, SettingsCommand, is_path

if TYPE_CHECKING:
    from burnish.config.grid import Cell, Grid


@click.group()
def config() -> None:
    """Schema, examples and resolved recipes."""


@config.command()
def schema() -> int:
    """Print the JSON Schema of recipes (for editors)."""
    from burnish.config.schema import build_schema

    print(json.dumps(build_schema(), indent=2, ensure_ascii=False))
    return 0


@config.command()
@click.argument("kind", type=KindName())
def example(kind: str) -> int:
    """Print a complete recipe of one stage: every setting with its default and what it does."""
    from burnish.config.example import render_example

    print(render_example(kind), end="")
    return 0


@config.command(cls=SettingsCommand)
@click.argument("words", nargs=-1, metavar="RECIPE [KEY=VALUE]...")
@click.option("--all", "everything", is_flag=True, help="Defaults too.")
@click.option("--json", "as_json", is_flag=True, help="The resolved recipe as JSON.")
@click.option("--cell", metavar="NAME", help="This cell of a grid; default: the first.")
def show(words: tuple[str, ...], everything: bool, as_json: bool, cell: str | None) -> int:
    """Print the resolved recipe, with the source of each value that is not a default; of a grid one cell's."""
    from burnish.config.load import load_recipe
    from burnish.config.resolved import render_resolved

    recipes = [word for word in words if is_path(word)]
    if len(recipes) != 1:
        raise click.UsageError("name one recipe\n  → a file, or the name of a bundled one")
    loaded = load_recipe(recipes[0], overrides=[word for word in words if word not in recipes], check_machine=False)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    names = [c.name for c in loaded.grid.cells] if loaded.grid is not None else []
    if loaded.grid is not None:
        chosen = _find_cell(loaded.grid, cell)
        if not as_json:
            print(f"# one of {len(names)} cells: {chosen.name} (`--cell NAME` shows another)")
        loaded = loaded.for_cell(chosen)
    elif cell is not None:
        raise click.UsageError("--cell was given, but the recipe has no grid\n  → leave it out")
    if as_json:
        record: dict[str, Any] = {"recipe": loaded.recipe.resolved(), "sources": dict(loaded.sources)}
        record |= {"cells": names} if names else {}
        print(json.dumps(record, indent=2, ensure_ascii=False))
    else:
        print(render_resolved(loaded, everything=everything), end="")
    return 0


def _find_cell(grid: Grid, name: str | None) -> Cell:
    from burnish.config.spelling import describe_suggestions, suggest

    names = [cell.name for cell in grid.cells]
    if name is not None and name not in names:
        near = describe_suggestions(suggest(name, names)) or f"the first is {names[0]}"
        raise click.UsageError(f"there is no cell {name!r}\n  → {near}")
    return grid.cells[names.index(name) if name is not None else 0]


@config.command()
def recipes() -> int:
    """List the bundled recipes."""
    from burnish.config.bundled import bundled_recipes, read_summary

    for name, recipe in bundled_recipes().items():
        print(f"{name:<14} {read_summary(recipe)}")
    return 0


@config.command()
@click.option("--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: stdout.")
def reference(output: Path | None) -> int:
    """Write the page of all settings, made from the settings classes."""
    from burnish.config.settings_page import render_settings_page

    page = render_settings_page()
    if output is None:
        print(page, end="")
    else:
        output.write_text(page, encoding="utf-8")
    return 0

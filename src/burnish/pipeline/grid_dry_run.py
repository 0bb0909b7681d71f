"""`--dry-run`, and what a grid would do: its cells, what they share, disk and time; nothing is run or written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, TextIO

from burnish.artifacts.grid_folder import CELLS, read_cell_state
from burnish.artifacts.run_folder import load_stage
from burnish.clock import show_seconds
from burnish.config.grid import MODEL, Cell, Grid
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.registry import find_spec
from burnish.disk import check_space, format_bytes, free_bytes
from burnish.errors import BurnishError
from burnish.pipeline.disk_space import estimate_stage
from burnish.pipeline.dry_run import build_plan, describe_stages, render_plan
from burnish.pipeline.naming import choose_cells, find_folder
from burnish.pipeline.sharing import Placement, place_stages
from burnish.pipeline.summaries import DataSummaries
from burnish.report.results import say_axis

Placements = Mapping[str, Sequence[Placement]]


def print_plan(loaded: LoadedRecipe, options: RunOptions, out: TextIO) -> int:
    """Print what a recipe, or each cell of a grid, would do; as JSON with `--json`.

    Returns:
        0.

    Raises:
        BurnishError: Data or settings are wrong: the same errors as in the real run, found before it.
    """
    build, render = (build_plan, render_plan) if loaded.grid is None else (build_grid_plan, _render)
    plan = build(loaded, options)
    text = json.dumps(plan, indent=2, ensure_ascii=False) if options.json else "\n".join(render(plan))
    out.write(f"{text}\n")
    return 0


def build_grid_plan(loaded: LoadedRecipe, options: RunOptions) -> dict[str, Any]:
    """The plan as plain values: axes, shared stages, cells; a shared stage is described once.

    Raises:
        BurnishError: Data or settings are wrong: the same errors as in the real run, found before it.
    """
    assert loaded.grid is not None
    folder = find_folder(loaded, options)
    chosen = choose_cells(loaded, options)
    placements = place_stages(loaded.grid.axes, loaded.grid.cells)
    rows: dict[str, dict[str, Any]] = {}
    cells, summaries = [], DataSummaries()
    for cell in chosen:
        mine = placements[cell.name]
        found = describe_stages(cell.recipe, options, place_of(mine, folder), summaries)
        for row, placement in zip(found, mine, strict=True):
            rows.setdefault(placement.folder, {**row, "cells": list(placement.users)})
        state = read_cell_state(folder / CELLS / cell.name)[0]
        cells.append(
            {"cell": cell.name, "values": dict(cell.values), "state": state, "stages": [p.folder for p in mine]}
        )
    lasting, brief = estimate_space(folder, chosen, placements)
    return {
        "recipe": loaded.recipe.name,
        "origin": loaded.origin,
        "folder": str(folder),
        "axes": describe_axes(loaded.grid),
        "baseline": dict(loaded.grid.baseline),
        "cells": cells,
        "stages": rows,
        "disk_bytes": lasting + brief,
        "disk_free": free_bytes(folder),
        "seconds": estimate_left(folder, chosen, placements),
    }


def describe_axes(grid: Grid) -> list[dict[str, Any]]:
    """The axes in plain values."""
    return [
        {
            "label": axis.label,
            "stage": axis.stage,
            "seed": axis.is_seed,
            "choices": [{"name": c.name, "value": c.node.plain()} for c in axis.choices],
        }
        for axis in grid.axes
    ]


def place_of(placements: Sequence[Placement], folder: Path) -> Callable[[int, str], Path]:
    """Folder of a cell's stage by its position and name."""
    return lambda index, name: folder / placements[index - 1].folder


def estimate_space(folder: Path, cells: Sequence[Cell], placements: Placements) -> tuple[int, int]:
    """(bytes that stay, bytes for a while) at least; a shared stage counts once."""
    lasting, brief = 0, 0
    recipes = {cell.name: cell.recipe for cell in cells}
    for placement in _each(placements[cell.name] for cell in cells):
        recipe = recipes[placement.cell]
        more, most = estimate_stage(recipe, recipe.stages[placement.index - 1], folder / placement.folder)
        lasting, brief = lasting + more, max(brief, most)
    return lasting, brief


def check_grid_space(folder: Path, cells: Sequence[Cell], placements: Placements) -> None:
    """Refuse to begin a grid whose results cannot fit on the disk.

    Raises:
        ResourceError: Too little is free.
    """
    check_space(folder, sum(estimate_space(folder, cells, placements)), what="this grid")


def estimate_left(folder: Path, cells: Sequence[Cell], placements: Placements) -> float | None:
    """Seconds that the stages of these cells still take, by the means of equal ones that are done; None if unknown."""
    known: dict[tuple[str, ...], list[float]] = {}
    done: set[str] = set()
    for placement in _each(placements.values()):
        try:
            record = load_stage(folder / placement.folder) or {}
        except BurnishError:
            continue
        if record.get("state") == "done":
            done.add(placement.folder)
            for key in _keys(placement):
                known.setdefault(key, []).append(float(record.get("seconds") or 0.0))
    total = 0.0
    for placement in _each(placements[cell.name] for cell in cells):
        if placement.folder not in done:
            found = next((mean(known[key]) for key in _keys(placement) if key in known), None)
            if found is None:
                return None
            total += found
    return total


def _keys(placement: Placement) -> list[tuple[str, ...]]:
    """What a stage's duration may be told from, the closest first."""
    stage, values = placement.stage, placement.values
    form, model = values.get(stage, ""), values.get(MODEL, "")
    return [(stage, *values.values()), (stage, "of", model, form), (stage, "with", model), (stage,)]


def _each(found: Iterable[Sequence[Placement]]) -> Iterator[Placement]:
    """Each place once, with the first cell that has it."""
    seen: set[str] = set()
    for placements in found:
        for placement in placements:
            if placement.folder not in seen:
                seen.add(placement.folder)
                yield placement


def _render(plan: dict[str, Any]) -> Iterable[str]:
    cells, rows = plan["cells"], plan["stages"]
    sizes = " × ".join(say_axis(axis, len(axis["choices"])) for axis in plan["axes"])
    yield f"{plan['recipe']} ({plan['origin']}): {len(cells)} cells of {sizes} → {plan['folder']}"
    baseline = " ".join(value for value in plan["baseline"].values())
    if baseline:
        yield f"compared with {baseline}"
    shared = {folder: row for folder, row in rows.items() if len(row["cells"]) > 1}
    if shared:
        yield ""
        yield "trained or measured once for several cells"
        width = max(len(folder) for folder in shared)
        for folder, row in shared.items():
            yield f"  {folder:<{width}}  {len(row['cells']):>3} cells  {_describe(row)}"
    yield ""
    yield "cells"
    width = max(len(cell["cell"]) for cell in cells)
    for cell in cells:
        own = [rows[folder] for folder in cell["stages"] if len(rows[folder]["cells"]) == 1]
        what = "; ".join(f"{row['stage']}: {_describe(row)}" for row in own) or "nothing of its own"
        yield f"  {cell['cell']:<{width}}  {cell['state']}; {what}"
    yield ""
    training = [row for row in rows.values() if find_spec(row["kind"]).trains]
    steps = sum(row.get("steps", 0) for row in training)
    yield f"in all     {len(training)} stages to train, {steps:,} steps; {len(rows) - len(training)} evaluations"
    yield f"disk       at least {format_bytes(plan['disk_bytes'])}; {format_bytes(plan['disk_free'])} free"
    seconds = plan["seconds"]
    known = "nothing left" if seconds == 0 else f"about {show_seconds(seconds)}" if seconds is not None else ""
    yield f"time       {known or 'told once the first cells are finished'}"


def _describe(row: dict[str, Any]) -> str:
    will = {"run": "to run", "skip": "finished", "resume": "to continue", "rerun": "to make again"}
    steps = f", {row['steps']:,} steps on {row['train']:,} rows" if "steps" in row else ""
    why = f" ({row['why']})" if row["action"] not in ("run", "skip") else ""
    return f"{will.get(row['action'], row['action'])}{steps}{why}"

"""Runs the cells of a grid one after the other: each a run of its own, what they share trained once, failures apart."""

from __future__ import annotations

import logging
import shlex
import sys
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from burnish.artifacts.folder import clean_leftovers
from burnish.artifacts.grid_folder import (
    CELLS,
    REFERENCE,
    SHARED,
    link_stage,
    load_summary,
    read_cell_state,
    save_grid,
    unlink_stage,
)
from burnish.artifacts.redact import redact
from burnish.artifacts.run_folder import RunFolder, plain_name
from burnish.clock import mono, show_seconds
from burnish.config.grid import BASE, Cell, Grid
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.errors import BurnishError, InterruptedRun, PeerLost, UsageError
from burnish.faults import fault_point
from burnish.pipeline.comparison import write_summary
from burnish.pipeline.dry_run import describe_stages
from burnish.pipeline.folder import closing_run, open_together
from burnish.pipeline.grid_dry_run import check_grid_space, describe_axes, estimate_left, place_of
from burnish.pipeline.naming import choose_cells, find_folder
from burnish.pipeline.run import Home, run_in_folder
from burnish.pipeline.sharing import Placement, place_stages
from burnish.pipeline.summaries import DataSummaries
from burnish.report.terminal import render_summary
from burnish.track.log import attach_log_file

log = logging.getLogger("burnish")


def run_grid(loaded: LoadedRecipe, options: RunOptions, runtime: Any) -> int:
    """Run the cells of a grid; those that are finished and unchanged are skipped.

    Returns:
        The exit status: 0, or that of the first cell that failed; a line for each failure has been logged.

    Raises:
        BurnishError: The grid cannot begin.
        InterruptedRun: A signal stopped it; the same command continues.
    """
    assert loaded.grid is not None
    if options.resume_from:
        raise UsageError(
            "a grid cannot continue from one checkpoint",
            where="--resume-from",
            remedy="give the grid's command again: every cell continues from its own",
        )
    chosen = choose_cells(loaded, options)
    placements = place_stages(loaded.grid.axes, loaded.grid.cells)
    folder = find_folder(loaded, options)
    run = open_together(loaded, folder, runtime, _resolve(loaded), grid=True)
    with closing_run(run, runtime, describe_grid_run if options.json else None) as end:
        if runtime.is_main:
            attach_log_file(run.log_path, redact=redact)
            save_grid(folder, describe_grid(loaded.grid, placements))
            for note in clean_leftovers(folder / SHARED / REFERENCE):
                log.info("%s", note)
            check_grid_space(folder, chosen, placements)
        home = Home(run, folder / SHARED / REFERENCE)
        try:
            failures = _run_cells(loaded, chosen, placements, home, options, runtime)
        except BaseException:
            if runtime.is_main:
                attach_log_file(run.log_path, redact=redact)  # the cell's has been closed
                _summarise(folder)
            raise
        if options.resume and not home.resumed and not failures:
            raise UsageError(
                "--resume was given, but there is nothing to resume",
                where=str(folder),
                remedy="leave --resume out: finished cells are skipped and interrupted ones continue by themselves",
            )
        end.status = next(iter(failures.values())).exit_code if failures else 0
        if failures:
            end.message = f"{len(failures)} of {len(chosen)} cells failed: {', '.join(failures)}"
        if runtime.is_main:
            _say_end(loaded, folder, chosen, failures)
    return end.status


def _resolve(loaded: LoadedRecipe) -> dict[str, Any]:
    """What resolved.yaml of a grid holds; each cell's folder holds its complete recipe."""
    recipe, grid = loaded.recipe, loaded.grid
    assert grid is not None
    return {
        "name": recipe.name,
        "models": recipe.models,
        "grid": recipe.grid,
        "baseline": dict(grid.baseline),
        "output_dir": recipe.output_dir,
        "cells": {cell.name: dict(cell.values) for cell in grid.cells},
    }


def describe_grid(grid: Grid, placements: dict[str, list[Placement]]) -> dict[str, Any]:
    """grid.json."""
    cells = [
        {
            "name": cell.name,
            "values": dict(cell.values),
            "stages": {p.stage: p.folder for p in placements[cell.name]},
            "base": cell.recipe.model
            or next((m for s in cell.recipe.stages if (m := getattr(s, "model", None))), BASE),
        }
        for cell in grid.cells
    ]
    return {"axes": describe_axes(grid), "baseline": dict(grid.baseline), "cells": cells}


def _run_cells(
    loaded: LoadedRecipe,
    cells: Sequence[Cell],
    placements: dict[str, list[Placement]],
    home: Home,
    options: RunOptions,
    runtime: Any,
) -> dict[str, BurnishError]:
    """Cell → what went wrong, of those that failed."""
    folder = home.run.path
    inner = replace(options, json=False, resume=False, model_index=None, cells=())
    failures: dict[str, BurnishError] = {}
    summaries = DataSummaries()
    for number, cell in enumerate(cells, start=1):
        fault_point("grid.next")
        place = folder / CELLS / cell.name
        head = f"cell {number} of {len(cells)}: {cell.name}"
        done = runtime.is_main and is_finished(cell, placements[cell.name], folder, inner, summaries)
        if runtime.gather(done)[0]:
            log.info("%s: finished and unchanged", head)
            continue
        if runtime.is_main:
            left = estimate_left(folder, cells[number - 1 :], placements)
            log.info("%s%s", head, f" (about {show_seconds(left)} left)" if left else "")
        home.prepare = partial(_link, placements[cell.name], folder)
        home.places = {p.stage: folder / p.folder for p in placements[cell.name] if p.shared}
        begun = mono()
        try:
            run_in_folder(loaded.for_cell(cell), inner, runtime, place, home)
        except (InterruptedRun, PeerLost):
            raise
        except BurnishError as error:
            failures[cell.name] = error
        except Exception as error:
            if runtime.world > 1:  # the others wait inside the cell
                raise
            failures[cell.name] = _wrap(error, cell.name)
        if runtime.is_main:
            attach_log_file(home.run.log_path, redact=redact)
            if cell.name in failures:
                log.error("%s failed: %s", head, failures[cell.name])
            else:
                log.info("%s: done in %s", head, show_seconds(mono() - begun))
    return failures


def _wrap(error: Exception, cell: str) -> BurnishError:
    log.debug("%s", "".join(traceback.format_exception(error)).rstrip())
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return BurnishError(f"{type(error).__name__}: {text}", where=cell, remedy="the traceback is in the grid's log.txt")


def is_finished(
    cell: Cell, placements: Sequence[Placement], folder: Path, options: RunOptions, summaries: DataSummaries
) -> bool:
    """Whether every stage of a cell would be skipped, and its run was closed as done."""
    if options.fresh or read_cell_state(folder / CELLS / cell.name)[0] != "done":
        return False
    if any(p.shared and not (folder / CELLS / cell.name / Path(_stage_name(p))).is_symlink() for p in placements):
        return False
    rows = describe_stages(cell.recipe, options, place_of(placements, folder), summaries)
    return all(row["action"] == "skip" for row in rows)


def _stage_name(placement: Placement) -> str:
    return f"{placement.index:02d}-{plain_name(placement.stage)}"


def _link(placements: Sequence[Placement], folder: Path, place: Path) -> None:
    """Links in a cell's folder to the stages that it shares, and none to those that it does not."""
    for placement in placements:
        at = place / _stage_name(placement)
        if placement.shared:
            link_stage(at, folder / placement.folder)
        else:
            unlink_stage(at)


def _summarise(folder: Path) -> dict[str, Any]:
    """summary.json from what there is; a failure is said and changes nothing about the runs."""
    try:
        return write_summary(folder)
    except Exception as error:
        log.warning("the summary could not be written (%s: %s)", type(error).__name__, error)
        return {}


def _say_end(loaded: LoadedRecipe, folder: Path, cells: Sequence[Cell], failures: dict[str, BurnishError]) -> None:
    for line in render_summary(_summarise(folder)).splitlines():
        log.info("%s", line)
    if not failures:
        return
    log.error("%d of %d cells failed:", len(failures), len(cells))
    groups: dict[int, list[str]] = {}
    for name, error in failures.items():
        groups.setdefault(id(error.__cause__ or error), []).append(name)
    for names in groups.values():
        error = failures[names[0]]
        same = f"\n  the same for {', '.join(names[1:])}" if len(names) > 1 else ""
        text = f"{names[0]}: {error.message}\n  → {error.remedy}{same}"
        log.error("%s\n  → to continue: %s", text, "; ".join(_command(loaded, name) for name in names[:1]))
    log.error("the command as it was continues all of them and skips what is finished")


def _command(loaded: LoadedRecipe, cell: str) -> str:
    """The command that runs one cell again."""
    words = sys.argv[1:] if len(sys.argv) > 1 and loaded.origin.split()[0] in " ".join(sys.argv) else []
    words = words or ["run", loaded.origin]
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--cell":
            skip = True
        elif not word.startswith("--cell=") and word != "--fresh":
            kept.append(word)
    return shlex.join(["burnish", *kept, "--cell", cell])


def describe_grid_run(folder: Path) -> dict[str, Any]:
    """A grid in plain values, for --json: its cells with their states, and the summary."""
    attached = RunFolder.attach(folder)
    kept = {k: attached.record.get(k) for k in ("name", "run_id", "state", "exit_code", "seconds", "error")}
    return kept | {"folder": str(folder), **load_summary(folder)}

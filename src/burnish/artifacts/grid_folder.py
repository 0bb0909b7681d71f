"""The folder of a grid: its cells, which are run folders, and the stages that they share.

    runs/<grid>/ run.json  grid.json  recipe.yaml  log.txt  summary.json  report.html
                 cells/<cell>/ …a run folder…  01-sft → ../../shared/01-sft--pocket
                 shared/01-sft--pocket/ …a stage folder…
                 shared/reference/ …cached log-probs…

Links are for those who read a cell's folder; burnish itself writes a shared stage at its own place.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.artifacts.files import TEMPORARY, write_json_file
from burnish.artifacts.folder import check_format
from burnish.artifacts.lock import lock_holder
from burnish.artifacts.run_folder import FORMAT, GRID, RUN, SUPERSEDED, load_run
from burnish.disk import disk_error
from burnish.errors import BurnishError, UsageError
from burnish.faults import fault_point

CELLS = "cells"
SHARED = "shared"
REFERENCE = "reference"
SUMMARY = "summary.json"


def is_grid(folder: Path) -> bool:
    """Whether a run's folder is a grid's."""
    return (Path(folder) / GRID).is_file()


def save_grid(folder: Path, record: Mapping[str, Any]) -> None:
    """Write grid.json: axes, baseline, and of each cell its name, values and the places of its stages."""
    write_json_file(Path(folder) / GRID, {"format": FORMAT, **record})


def load_grid(folder: Path) -> dict[str, Any]:
    """Read grid.json.

    Raises:
        UsageError: It is missing, damaged, or of a later version.
    """
    place = Path(folder) / GRID
    try:
        found = json.loads(place.read_bytes())
        cells, version = found["cells"], found["format"]
        sound = all(isinstance(c["name"], str) and isinstance(c["values"], dict) for c in cells)
    except OSError as exc:
        raise UsageError(
            f"no grid of burnish here: {place.name} cannot be read",
            where=str(place.parent),
            remedy="name a grid that `burnish runs list` shows",
        ) from exc
    except (ValueError, KeyError, TypeError, RecursionError):
        sound, found, version = False, {}, FORMAT
    check_format(version, found, place, FORMAT)
    if not sound:
        raise UsageError(
            f"{place.name} is damaged", where=str(place), remedy="give the grid's command again: it is written anew"
        )
    return found


def load_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json; {} when there is none that can be read."""
    try:
        found = json.loads((Path(folder) / SUMMARY).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def read_cell_state(folder: Path) -> tuple[str, dict[str, Any]]:
    """(state of a cell, its run.json): "not run" without a record, "interrupted" where its process was killed."""
    if not (folder / RUN).is_file():
        return "not run", {}
    try:
        record = load_run(folder)
    except BurnishError:
        return "damaged", {}
    state = str(record["state"])
    return ("interrupted" if state == "running" and lock_holder(folder) is None else state), record


def count_cells(folder: Path) -> dict[str, int]:
    """State → how many cells of a grid are in it.

    Raises:
        UsageError: grid.json cannot be read.
    """
    counts: dict[str, int] = {}
    for cell in load_grid(folder)["cells"]:
        state = read_cell_state(folder / CELLS / cell["name"])[0]
        counts[state] = counts.get(state, 0) + 1
    return counts


def link_stage(place: Path, target: Path) -> None:
    """Make `place` in a cell's folder a relative link to a shared stage.

    A stage that the cell had for itself becomes the shared one if there is none yet, else it is kept in the cell's
    `superseded/`. Every step can be repeated after a crash.

    Raises:
        ResourceError: The file system cannot hold the link.
    """
    relative = os.path.relpath(target, place.parent)
    try:
        if place.is_symlink():
            if str(place.readlink()) == relative:
                return
            place.unlink()
        elif place.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            place.rename(_find_free(place) if target.exists() else target)
        fault_point("grid.link")
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary = place.with_name(f"{TEMPORARY}{place.name}")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(relative, target_is_directory=True)
        temporary.rename(place)
    except OSError as exc:
        raise disk_error(exc, place, doing="link a cell to the stage that it shares") from exc


def unlink_stage(place: Path) -> None:
    """Take away the link of a stage that the cell no longer shares."""
    if place.is_symlink():
        try:
            place.unlink()
        except OSError as exc:
            raise disk_error(exc, place, doing="take away the link to a shared stage") from exc


def _find_free(place: Path) -> Path:
    folder = place.parent / SUPERSEDED
    folder.mkdir(exist_ok=True)
    number = 1
    while (folder / f"{place.name}.{number}").exists():
        number += 1
    return folder / f"{place.name}.{number}"

"""`burnish runs list`, `show`, `delete`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from burnish.artifacts.grid_folder import CELLS, count_cells, is_grid, load_grid, load_summary, read_cell_state
from burnish.errors import UsageError

_root = click.option("--output-dir", metavar="DIR", default="runs", show_default=True, help="Folder of runs.")
_json = click.option("--json", "as_json", is_flag=True, help="As JSON.")


@click.group()
def runs() -> None:
    """List, show and delete runs."""


@runs.command("list")
@_root
@_json
def list_(output_dir: str, as_json: bool) -> int:
    """List the runs, newest first."""
    from burnish.artifacts.run_folder import list_runs

    rows = list_runs(Path(output_dir))
    for row in rows:
        if is_grid(Path(str(row["path"]))):
            try:
                row["cells"] = count_cells(Path(str(row["path"])))
            except UsageError as error:
                row["problem"] = error.message
    if as_json:
        print(json.dumps(rows, ensure_ascii=False, indent=2, default=str))
        return 0
    if not rows:
        print(f"no runs in {output_dir}", file=sys.stderr)
        return 0
    from burnish.report.terminal import align

    table = [("NAME", "STATE", "STARTED", "STAGES")]
    table += [(str(r["name"]), str(r["state"]), str(r.get("started") or "")[:19], _count_stages(r)) for r in rows]
    print(*align(table), sep="\n")
    return 0


@runs.command("show")
@click.argument("name")
@_root
@_json
def show(name: str, output_dir: str, as_json: bool) -> int:
    """Show one run: its stages, their states and figures. GRID shows a grid's cells and table, GRID/CELL one cell."""
    from burnish.artifacts.run_folder import list_runs, load_stage

    grid, _, cell = name.rpartition("/")
    root = str(Path(output_dir) / grid / CELLS) if grid else output_dir
    row = _find_run(list_runs(Path(root)), cell, root)
    if is_grid(Path(str(row["path"]))):
        return _show_grid(Path(str(row["path"])), row, as_json=as_json)
    folder = Path(str(row["path"]))
    records = {stage["stage"]: load_stage(folder / stage["stage"]) or {} for stage in row["stages"]}
    if as_json:
        print(json.dumps({**row, "records": records}, ensure_ascii=False, indent=2, default=str))
        return 0
    _print_record(row)
    for stage in row["stages"]:
        print(f"\n{stage['stage']}  {stage['state']}")
        for key, value in _flatten(records[stage["stage"]].get("figures") or {}):
            print(f"    {key:<32} {value:.6g}" if isinstance(value, float) else f"    {key:<32} {value}")
    return 0


@runs.command("delete")
@click.argument("name")
@_root
@click.option("--yes", metavar="NAME", help="Type the name here instead of being asked.")
def delete(name: str, output_dir: str, yes: str | None) -> int:
    """Delete a run for good, after its name has been typed once more."""
    from burnish.artifacts.deletion import delete_run, empty_trash
    from burnish.artifacts.run_folder import list_runs

    _find_run(list_runs(Path(output_dir)), name, output_dir)
    typed = yes if yes is not None else click.prompt(f"type {name!r} to delete {output_dir}/{name} for good", err=True)
    if typed != name:
        raise UsageError(f"{typed!r} is not {name!r}; nothing was deleted", remedy="type the run's name exactly")
    print(f"deleted {delete_run(Path(output_dir), name)}")
    empty_trash(Path(output_dir))
    return 0


def _show_grid(folder: Path, row: dict[str, Any], *, as_json: bool) -> int:
    from burnish.report.terminal import align, render_summary

    names = [str(cell["name"]) for cell in load_grid(folder)["cells"]]
    cells = [(name, *read_cell_state(folder / CELLS / name)) for name in names]
    summary = load_summary(folder)
    if as_json:
        states = {name: state for name, state, _ in cells}
        print(json.dumps({**row, "cells": states, "summary": summary}, ensure_ascii=False, indent=2, default=str))
        return 0
    _print_record(row)
    table = [("CELL", "STATE", "SECONDS"), *((n, s, str(r.get("seconds_total") or "")) for n, s, r in cells)]
    print("", *align(table), sep="\n")
    print(f"\n{render_summary(summary)}" if summary else "")
    return 0


def _print_record(row: dict[str, Any]) -> None:
    for key in ("name", "recipe", "state", "created", "started", "ended", "seconds", "problem", "path"):
        if row.get(key) is not None:
            print(f"{key:<9} {row[key]}")


def _flatten(figures: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in figures.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{key}.")
        elif not isinstance(value, list):
            yield f"{prefix}{key}", value


def _count_stages(row: dict[str, Any]) -> str:
    if row.get("problem"):
        return str(row["problem"])
    if "cells" in row:
        return f"{sum(row['cells'].values())} cells: " + ", ".join(f"{n} {s}" for s, n in row["cells"].items())
    return " ".join(f"{Path(stage['stage']).name}:{stage['state']}" for stage in row["stages"])


def _find_run(rows: list[dict[str, Any]], name: str, root: str) -> dict[str, Any]:
    for row in rows:
        if row["name"] == name:
            return row
    from burnish.config.spelling import describe_suggestions, suggest

    near = describe_suggestions(suggest(name, [str(row["name"]) for row in rows]))
    raise UsageError(f"there is no run {name!r}", where=root, found=name, remedy=near or "see `burnish runs list`")

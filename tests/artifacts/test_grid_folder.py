"""A grid's folder: links to shared stages, states of cells, deletion."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from burnish.artifacts.deletion import delete_run
from burnish.artifacts.grid_folder import count_cells, link_stage, load_grid, load_summary, save_grid, unlink_stage
from burnish.artifacts.run_folder import RunFolder, list_runs, save_stage, stage_folders
from burnish.errors import UsageError


def make_grid(root: Path) -> Path:
    """A grid of three cells: one done, one killed, one that never began."""
    cells = [{"name": n, "values": {"x": n}, "stages": {"sft": "shared/01-sft"}, "base": "pocket"} for n in "abc"]
    with RunFolder.open(root, "g", recipe_text="name: g\n", resolved={"name": "g"}) as run:
        save_grid(run.path, {"axes": [], "baseline": {}, "cells": cells})
        shared = run.make_stage_dir(run.path / "shared/01-sft")
        save_stage(shared, {"state": "done", "name": "sft", "kind": "sft"})
        for name in "ab":
            with RunFolder.open(run.path / "cells", name, recipe_text="", resolved={"name": "g"}) as cell:
                link_stage(cell.path / "01-sft", shared)
                if name == "a":
                    cell.finish("done", seconds=1.0, exit_code=0)
        run.finish("interrupted", seconds=1.0, exit_code=130)
        return run.path


def test_a_link_is_relative_and_reads_like_a_folder(tmp_path):
    grid = make_grid(tmp_path / "runs")
    moved = tmp_path / "elsewhere"
    grid.rename(moved)
    place = moved / "cells/a/01-sft"
    assert os.readlink(place) == "../../shared/01-sft"  # noqa: PTH115
    assert stage_folders(moved / "cells/a") == [place], "the cell's report finds it"
    assert stage_folders(moved) == [], "the grid itself has no stages"


def test_linking_again_changes_nothing_and_unlinking_leaves_the_stage(tmp_path):
    grid = make_grid(tmp_path)
    place, target = grid / "cells/a/01-sft", grid / "shared/01-sft"
    before = place.lstat().st_mtime_ns
    link_stage(place, target)
    assert place.lstat().st_mtime_ns == before
    unlink_stage(place)
    unlink_stage(place)
    assert not place.exists() and (target / "stage.json").exists()


def test_a_link_to_another_place_is_replaced(tmp_path):
    grid = make_grid(tmp_path)
    link_stage(grid / "cells/a/01-sft", grid / "shared/01-sft--x")
    assert os.readlink(grid / "cells/a/01-sft") == "../../shared/01-sft--x"  # noqa: PTH115


def test_a_stage_of_a_cell_becomes_the_shared_one_or_makes_room(tmp_path):
    grid = make_grid(tmp_path)
    for name in "ab":
        place = grid / "cells" / name / "01-sft"
        unlink_stage(place)
        place.mkdir()
        save_stage(place, {"state": "done", "name": name})
        link_stage(place, grid / "shared/01-sft--new")
    assert json.loads((grid / "shared/01-sft--new/stage.json").read_text())["name"] == "a"
    assert json.loads((grid / "cells/b/superseded/01-sft.1/stage.json").read_text())["name"] == "b"


def test_states_of_cells(tmp_path):
    grid = make_grid(tmp_path)
    assert count_cells(grid) == {"done": 1, "interrupted": 1, "not run": 1}
    assert [row["name"] for row in list_runs(tmp_path)] == ["g"]
    assert {row["name"] for row in list_runs(grid / "cells")} == {"a", "b"}


def test_deleting_a_grid_deletes_its_cells_and_follows_no_link(tmp_path):
    grid = make_grid(tmp_path / "runs")
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").write_text("x")
    (grid / "cells/a/02-x").symlink_to(outside, target_is_directory=True)
    delete_run(tmp_path / "runs", "g")
    assert not grid.exists() and (outside / "kept").exists()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"format": 1}', '{"format": 1, "cells": [{"name": 3}]}'])
def test_a_damaged_record_is_told(tmp_path, text):
    grid = make_grid(tmp_path)
    (grid / "grid.json").write_text(text)
    (grid / "summary.json").write_text(text)
    with pytest.raises(UsageError, match="damaged"):
        load_grid(grid)
    assert isinstance(load_summary(grid), dict)


def test_a_folder_without_a_record_is_no_grid(tmp_path):
    with pytest.raises(UsageError, match="no grid of burnish"):
        load_grid(tmp_path)

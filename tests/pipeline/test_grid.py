"""Grids as a user sees them: what is shared, skipped, continued; failures apart; what the table and the plan say."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.artifacts.run_folder import load_stage
from burnish.cli.main import main
from burnish.pipeline.api import load_record, run
from tests.pipeline.tiny_folder import write_rows

CELLS = ["dpo_seed=1", "dpo_seed=2", "ipo_seed=1", "ipo_seed=2"]


def write_grid(folder: Path, inputs: Path, **changes: Any) -> Path:
    pairs, chat = str(inputs / "pairs.jsonl"), str(inputs / "chat.jsonl")
    held = str(write_rows(folder / "held.jsonl", "pocket/preferences", 6, split="test"))
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(inputs / "model"),
        "max_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "output_dir": str(folder / "runs"),
        "grid": {"prefer": {"dpo": {"kind": "dpo"}, "ipo": {"kind": "ipo"}}, "prefer.seed": [1, 2]},
        "stages": [
            {"kind": "sft", "data": chat},
            {"name": "prefer", "init_from": "sft", "data": pairs, "eval_data": held},
            {"kind": "evaluate", "of": ["prefer"], "data": held, "tasks": ["preferences"], "max_items": 6},
        ],
    } | changes
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def stamps(folder: Path) -> dict[str, int]:
    """Every stage's and every run's record → when it was written."""
    files = [*(folder / "runs/small").glob("cells/*/run.json"), *(folder / "runs/small").glob("*/*/stage.json")]
    files += (folder / "runs/small").glob("cells/*/*/stage.json")
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in files}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    folder = tmp_path_factory.mktemp("grid")
    assert main(["run", str(write_grid(folder, inputs))]) == 0
    return folder


@pytest.fixture
def grid(finished: Path, inputs: Path, tmp_path: Path) -> Path:
    """A copy of the finished grid, links kept, with its recipe pointing to the copy."""
    shutil.copytree(finished, tmp_path / "copy", symlinks=True)
    write_grid(tmp_path / "copy", inputs)
    return tmp_path / "copy"


def test_each_cell_is_a_run_and_what_they_share_is_one_stage(finished):
    """S1-02, S1-08: a folder of its own for each; the shared stage is linked, not copied."""
    root = finished / "runs/small"
    assert sorted(p.name for p in (root / "cells").iterdir()) == CELLS
    assert [p.name for p in sorted((root / "shared").iterdir())] == ["01-sft", "reference"]
    for name in CELLS:
        cell = root / "cells" / name
        assert os.readlink(cell / "01-sft") == "../../shared/01-sft"  # noqa: PTH115
        assert not (cell / "02-prefer").is_symlink() and (cell / "02-prefer/final").is_dir()
        record = load_record(cell)
        assert (record.state, list(record.stages)) == ("done", ["sft", "prefer", "evaluate"])
        assert (cell / "report.html").stat().st_size > 0
        assert yaml.safe_load((cell / "recipe.yaml").read_text())["stages"][1]["seed"] == int(name[-1])
    losses = {load_stage(root / "cells" / n / "02-prefer")["settings"]["loss_type"] for n in CELLS[1:3]}  # pyright: ignore[reportOptionalSubscript]
    assert losses == {"sigmoid", "ipo"}
    log = (root / "log.txt").read_text()
    assert "cell 4 of 4: ipo_seed=2 (about" in log and "McNemar" not in log


def test_one_reference_cache_serves_the_methods(finished):
    """Two methods of one seed read the same log-probs: a table for the rows of each seed and one for the held-out."""
    tables = list((finished / "runs/small/shared/reference").iterdir())
    assert len(tables) == 3
    assert not list((finished / "runs/small/cells").glob("*/02-prefer/reference"))
    logs = [(finished / "runs/small/cells" / name / "log.txt").read_text() for name in CELLS]
    assert ["reference log-probs  step" in text for text in logs] == [True, True, False, False]


def test_the_end_is_one_table_and_one_page(finished, capfd):
    root = finished / "runs/small"
    record = load_record(root)
    assert record.exit_code == 0 and list(record.cells) == CELLS and record.stages == {}
    rows = record.summary["rows"]
    assert [(r["name"], r["baseline"], r["compared_with"]) for r in rows] == [("dpo", True, None), ("ipo", False, 0)]
    change = next(f for f in rows[1]["figures"] if f["metric"] == "accuracy")["change"]
    assert change["n"] == 6 and change["seeds"]["n"] == 2
    page = (root / "report.html").read_text()
    assert all(f"cells/{name.replace('=', '%3D')}/report.html" in page for name in CELLS)
    assert main(["runs", "show", "small", "--output-dir", str(finished / "runs")]) == 0
    assert main(["runs", "show", "small/ipo_seed=2", "--output-dir", str(finished / "runs")]) == 0
    assert main(["runs", "list", "--output-dir", str(finished / "runs")]) == 0
    text = capfd.readouterr().out
    assert "4 cells: 4 done" in text and "preferences" in text and "03-evaluate  done" in text


def test_the_same_command_again_touches_no_cell(grid):
    before = stamps(grid)
    assert main(["run", str(grid / "small.yaml")]) == 0
    assert stamps(grid) == before
    assert (grid / "runs/small/log.txt").read_text().count("finished and unchanged") == 4


def test_a_changed_form_makes_only_its_cells_again(grid):
    before = stamps(grid)
    assert main(["run", str(grid / "small.yaml"), "grid.prefer.ipo.beta=0.3"]) == 0
    changed = {name for name, stamp in stamps(grid).items() if before.get(name) != stamp}
    cells = [f"runs/small/cells/ipo_seed={seed}" for seed in (1, 2)]
    assert changed == {
        f"{c}/{x}" for c in cells for x in ("run.json", "02-prefer/stage.json", "03-evaluate/stage.json")
    }


def test_a_changed_shared_stage_is_made_again_once(grid):
    assert main(["run", str(grid / "small.yaml"), "sft.learning_rate=1e-4"]) == 0
    root = grid / "runs/small"
    assert [p.name for p in (root / "superseded/shared").iterdir()] == ["01-sft.1"]
    assert all((root / "cells" / n / "01-sft").is_symlink() for n in CELLS)
    assert len(list(root.glob("cells/*/superseded/02-prefer.1"))) == 4


def test_a_stage_that_is_shared_no_longer_gets_its_own_folder(grid):
    """One seed for all stages: sft now belongs to two cells of one seed each; with one form, to one cell."""
    root = grid / "runs/small"
    words = ["grid={prefer: {dpo: {kind: dpo}}, seed: [1, 2]}"]
    assert main(["run", str(grid / "small.yaml"), *words]) == 0
    for seed in (1, 2):
        own = root / f"cells/dpo_seed={seed}/01-sft"
        assert own.is_dir() and not own.is_symlink()
    assert main(["run", str(grid / "small.yaml")]) == 0, "and back: the stages of the cells make room for the link"
    assert (root / "cells/dpo_seed=1/01-sft").is_symlink()
    assert (root / "cells/dpo_seed=1/superseded/01-sft.1/final").is_dir()


def test_one_cell_alone(grid, inputs):
    shutil.rmtree(grid / "runs")
    recipe = str(grid / "small.yaml")
    assert main(["run", recipe, "--cell", "ipo_*", "--cell", "dpo_seed=1"]) == 0
    assert sorted(p.name for p in (grid / "runs/small/cells").iterdir()) == ["dpo_seed=1", "ipo_seed=1", "ipo_seed=2"]
    assert [c["state"] for c in load_record(grid / "runs/small").summary["cells"]] == [
        "done",
        "not run",
        "done",
        "done",
    ]
    assert main(["run", recipe, "--cell", "ipo_sed=1"]) == 2
    assert main(["run", recipe, "grid={}", "prefer.kind=dpo", "--cell", "x"]) == 2


def test_s1_02_failures_do_not_stop_the_rest(tmp_path, inputs, capfd):
    """S1-02: a form that cannot train fails in its cells alone; each is named with its message and a command."""
    (tmp_path / "wrong_loss.py").write_text("def loss(*args, **kwargs):\n    raise ValueError('no such pair')\n")
    forms = {"bad": {"kind": "dpo", "loss_type": "wrong_loss:loss"}, "dpo": {"kind": "dpo"}}
    recipe = write_grid(tmp_path, inputs, grid={"prefer": forms, "prefer.seed": [1]})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(tmp_path))
        patch.chdir(tmp_path)
        assert main(["run", str(recipe)]) not in (0, 130)
    text = capfd.readouterr().err
    assert "1 of 2 cells failed" in text and "no such pair" in text
    assert "--cell bad_seed=1" in text
    record = load_record(tmp_path / "runs/small")
    assert (record.state, record.cells["bad_seed=1"].state, record.cells["dpo_seed=1"].state) == (
        "failed",
        "failed",
        "done",
    )
    assert "bad_seed=1" in (tmp_path / "runs/small/report.html").read_text()


def test_a_shared_stage_fails_once_for_all(tmp_path, inputs, capfd):
    data = tmp_path / "gone.jsonl"
    data.write_text((inputs / "chat.jsonl").read_text())
    stages = yaml.safe_load(write_grid(tmp_path, inputs).read_text())["stages"]
    stages[0] |= {"data": str(data), "max_length": 2}
    assert main(["run", str(write_grid(tmp_path, inputs, stages=stages))]) == 2
    text = capfd.readouterr().err
    assert "4 of 4 cells failed" in text
    assert text.count("which it shares, failed") == 3 and "the same for dpo_seed=2, ipo_seed=1, ipo_seed=2" in text


def test_a_signal_stops_the_grid_and_the_command_continues_it(tmp_path, inputs, monkeypatch, capfd):
    """R-13 in a grid: Ctrl-C gives 130, the state says interrupted, no further cell begins; then the command finishes."""
    from burnish.engine import loop

    whole, seen = loop.compute_gradient, []

    def interrupt(*args: Any, **kwargs: Any) -> Any:
        seen.append(1)
        if len(seen) == 5:  # the first step of the first cell's form
            os.kill(os.getpid(), signal.SIGINT)
        return whole(*args, **kwargs)

    monkeypatch.setattr(loop, "compute_gradient", interrupt)
    command = ["run", str(write_grid(tmp_path, inputs, max_steps=4, grid={"prefer": ["dpo", "ipo"]}))]
    assert main(command) == 130
    root, text = tmp_path / "runs/small", capfd.readouterr().err
    assert json.loads((root / "run.json").read_text())["state"] == "interrupted"
    assert "Traceback" not in text and "cell 2" not in text
    assert {n: s.state for n, s in load_record(root).cells["dpo"].stages.items()} == {
        "sft": "done",
        "prefer": "interrupted",
    }
    assert (root / "report.html").exists()
    assert main([*command, "--resume"]) == 0
    assert "interrupted; continues from step" in capfd.readouterr().err
    assert [cell.state for cell in load_record(root).cells.values()] == ["done", "done"]


def test_s1_01_a_dry_run_lists_cells_and_what_they_share(tmp_path, inputs, capsys):
    """S1-01: nothing is written; a shared stage stands there once."""
    assert main(["run", str(write_grid(tmp_path, inputs)), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "4 cells of 2 forms of prefer × 2 seeds" in text and "compared with dpo" in text
    assert text.count("shared/01-sft") == 1 and "4 cells  to run, 2 steps" in text
    assert all(name in text for name in CELLS)
    assert "5 stages to train, 10 steps; 4 evaluations" in text
    assert not (tmp_path / "runs").exists()


def test_a_dry_run_of_a_finished_grid_has_nothing_left(grid, capsys):
    assert main(["run", str(grid / "small.yaml"), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert {row["action"] for row in plan["stages"].values()} == {"skip"}
    assert plan["seconds"] == 0
    assert main(["run", str(grid / "small.yaml"), "--dry-run", "grid.prefer.seed=[1,2,3]"]) == 0
    assert "time       about" in capsys.readouterr().out


def test_plain_runs_and_grids_do_not_share_a_folder(grid, capfd):
    recipe = str(grid / "small.yaml")
    assert main(["run", recipe, "grid={}", "prefer.kind=dpo"]) == 2
    assert "this folder is a grid" in capfd.readouterr().err
    shutil.rmtree(grid / "runs")
    assert main(["run", recipe, "grid={}", "prefer.kind=dpo"]) == 0
    assert main(["run", recipe]) == 2
    assert "this folder is a plain run" in capfd.readouterr().err


def test_resume_and_single_checkpoints(grid, capfd):
    assert main(["run", str(grid / "small.yaml"), "--resume"]) == 2
    assert "nothing to resume" in capfd.readouterr().err
    words = ["--resume-from", str(grid / "runs/small/cells/dpo_seed=1/02-prefer/checkpoint-2"), "grid.seed=[1,2]"]
    assert main(["dpo", *words, "--output-dir", str(grid / "other")]) == 2
    assert "continues from its own" in capfd.readouterr().err


def test_a_grid_from_python(tmp_path, inputs):
    record = run(
        {
            "name": "py",
            "model": str(inputs / "model"),
            "grid": {"seed": [1, 2]},
            "max_steps": 1,
            "batch_size": 2,
            "stages": [{"kind": "sft", "data": str(inputs / "chat.jsonl")}],
        },
        output_dir=tmp_path,
    )
    assert {name: cell.state for name, cell in record.cells.items()} == {"seed=1": "done", "seed=2": "done"}
    assert record.summary["rows"] == []


def test_s1_01_models_are_chosen_by_number(tmp_path, inputs):
    """S1-01: --model-index, where models are an axis."""
    shutil.copytree(inputs / "model", tmp_path / "other")
    recipe = yaml.safe_load(write_grid(tmp_path, inputs).read_text())
    del recipe["model"]
    recipe |= {"models": [str(inputs / "model"), str(tmp_path / "other")], "grid": {"prefer": ["dpo"]}}
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["run", str(tmp_path / "small.yaml"), "--model-index", "1"]) == 0
    assert [p.name for p in (tmp_path / "runs/small/cells").iterdir()] == ["other_dpo"]
    assert main(["run", str(tmp_path / "small.yaml"), "--model-index", "2"]) == 2

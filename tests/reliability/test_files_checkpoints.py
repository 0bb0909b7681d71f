"""R-03, R-04 and R-34 on a real stage: damaged checkpoints, kills inside the writer, torn logs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from burnish import faults
from burnish.artifacts.files import write_file
from burnish.artifacts.folder import MANIFEST, clean_leftovers
from burnish.engine.parallel import single as single_module
from burnish.errors import ResourceError
from burnish.track.metrics import read_metrics
from tests.artifacts.damage import DAMAGES, damage
from tests.reliability.stages import STEPS, build_job, copy_until, finish, read_tree

FILES = (
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
    "metrics.tail",
    "timing.tail",
    MANIFEST,
)
CASES = [(name, how) for name in FILES for how in DAMAGES]
FEW = [("model.safetensors", "flip"), (MANIFEST, "empty"), ("state.json", "swap")]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[str, bytes]]:
    """(folder of a stage that was never disturbed, its parameters' digest and its metrics)"""
    folder = tmp_path_factory.mktemp("calm") / "stage"
    return folder, finish(build_job(folder))


def check_damage(calm, tmp_path: Path, name: str, how: str, monkeypatch, caplog) -> None:
    source, expected = calm
    stage = copy_until(source, tmp_path / "stage", 6)
    damage(stage / "checkpoint-6", name, how, FILES)
    loaded: list[str] = []
    real = single_module.read_tensors

    def load(folder: Path, only: str):
        loaded.append(folder.name)
        return real(folder, only)

    monkeypatch.setattr(single_module, "read_tensors", load)
    caplog.clear()
    assert finish(build_job(stage, resume=True)) == expected
    assert set(loaded) == {"checkpoint-3"}, "a tensor of the damaged checkpoint was read"
    said = [r.getMessage() for r in caplog.records if "checkpoint-6" in r.getMessage()]
    assert len(said) == 1 and "\n" not in said[0] and "checkpoint-3 is used instead" in said[0]
    assert name in said[0] or how in ("swap", "stray")
    alone = copy_until(source, tmp_path / "alone", 3)
    damage(alone / "checkpoint-3", name, how, FILES)
    before = read_tree(alone)
    with pytest.raises(ResourceError, match="damaged") as caught:
        finish(build_job(alone, resume=True))
    assert caught.value.exit_code == 5 and "checkpoint-3" in str(caught.value)
    assert read_tree(alone) == before, "a fresh start was made in silence"


@pytest.mark.parametrize(("name", "how"), FEW)
def test_r03_a_damaged_checkpoint_of_a_stage(calm, tmp_path, name, how, monkeypatch, caplog):
    check_damage(calm, tmp_path, name, how, monkeypatch, caplog)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "how"), [case for case in CASES if case not in FEW])
def test_r03_every_damage_to_every_file_of_a_stage(calm, tmp_path, name, how, monkeypatch, caplog):
    check_damage(calm, tmp_path, name, how, monkeypatch, caplog)


def test_r03_a_checkpoint_of_another_run_is_not_resumed(calm, tmp_path):
    stage = copy_until(calm[0], tmp_path / "stage", 6)
    with pytest.raises(ResourceError, match="made by another run"):
        finish(build_job(stage, resume=True, run_id="other"))


def test_r04_sigkill_at_every_operation_of_write_file(tmp_path):
    """Killed at its first, second … operation: the old content or the new; what is left goes at the next start."""
    path, outcomes, nth = tmp_path / "stage.json", set(), 0
    while True:
        nth += 1
        write_file(path, b"old")
        pid = os.fork()
        if pid == 0:
            faults._SPEC, faults._ACTIVE = f"file.*:{nth}:kill", True
            faults._SEEN.clear()
            write_file(path, b"new" * 5000)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert path.read_bytes() in (b"old", b"new" * 5000)
        outcomes.add(path.read_bytes()[:3])
        clean_leftovers(tmp_path)
        assert [p.name for p in tmp_path.iterdir()] == ["stage.json"]
        if status == 0:
            break
    assert nth == 5 and outcomes == {b"old", b"new"}


def check_torn(calm, tmp_path: Path, name: str, cut: int, tail: bytes) -> None:
    """metrics.jsonl or timing.jsonl ends after `cut` bytes and `tail`: afterwards each step is there once."""
    source, expected = calm
    stage = copy_until(source, tmp_path / f"{name}-{cut}-{len(tail)}", 9)
    raw = (stage / name).read_bytes()
    (stage / name).write_bytes(raw[:cut] + tail)
    assert finish(build_job(stage, resume=True)) == expected
    steps = [row["step"] for row in read_metrics(stage / "timing.jsonl")[0]]
    assert steps == list(range(1, STEPS + 1)), (name, cut, tail)
    before = raw[: json.loads((stage / "checkpoint-9/state.json").read_text())["counters"]["timing_mark"]]
    assert name != "timing.jsonl" or (stage / name).read_bytes().startswith(before)
    shutil.rmtree(stage)


TAILS = (b"", b"\xe6\x97", b"\0" * 40)


@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
def test_r34_torn_logs_of_a_stage(calm, tmp_path, name):
    size = (calm[0] / name).stat().st_size
    for cut, tail in zip((size, size - 1, size - 30, size - 111, size - 299), (*TAILS, *TAILS), strict=False):
        check_torn(calm, tmp_path, name, cut, tail)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["metrics.jsonl", "timing.jsonl"])
@pytest.mark.parametrize("tail", TAILS, ids=["cut", "half a character", "NUL"])
def test_r34_cut_at_every_byte_of_the_last_300_of_a_stage(calm, tmp_path, name, tail):
    size = (calm[0] / name).stat().st_size
    for cut in range(max(size - 300, 0), size + 1):
        check_torn(calm, tmp_path, name, cut, tail)


def test_r34_a_log_that_is_gone_comes_back_from_the_checkpoint(calm, tmp_path):
    stage = copy_until(calm[0], tmp_path / "stage", 9)
    for name in ("metrics.jsonl", "timing.jsonl"):
        (stage / name).unlink()
    assert finish(build_job(stage, resume=True)) == calm[1]


def test_r34_a_failed_row_is_written_again(calm, tmp_path):
    """The disk is full at the row of a step: that step is not saved as done, so the row is not lost."""
    from tests.reliability.stages import fault

    for nth in (4, 5, 6, 9):  # rows of steps and of evaluations
        stage = tmp_path / str(nth)
        with fault(f"metrics.write:{nth}:enospc"), pytest.raises(ResourceError):
            finish(build_job(stage))
        assert finish(build_job(stage, resume=True)) == calm[1]


def test_r34_a_step_whose_rows_are_not_all_written_is_not_saved(calm, tmp_path):
    """Something fails between a step's row in metrics.jsonl and its row in timing.jsonl."""
    job, rows = build_job(tmp_path), []

    def sink(row) -> None:
        rows.append(row)
        if len(rows) == 7:
            raise ValueError("boom")

    job.sinks = (sink,)
    with pytest.raises(ValueError, match="boom"):
        finish(job)
    assert finish(build_job(tmp_path, resume=True)) == calm[1]
    steps = [row["step"] for row in read_metrics(tmp_path / "timing.jsonl")[0]]
    assert steps == list(range(1, STEPS + 1))


def test_r34_an_evaluation_that_was_cut_off_is_made_up_for(calm, tmp_path, monkeypatch):
    from burnish.engine import loop

    job, real, seen = build_job(tmp_path), loop.run_evaluation, []

    def evaluate(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            raise ValueError("boom")
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "run_evaluation", evaluate)
    with pytest.raises(ValueError, match="boom"):
        finish(job)
    assert (tmp_path / "checkpoint-4").is_dir()
    assert finish(build_job(tmp_path, resume=True)) == calm[1]

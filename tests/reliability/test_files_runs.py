"""R-28 and R-39: two runs in one folder; folders of earlier and later versions and of other programs."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from burnish.artifacts.checkpoints import list_checkpoints, newest_valid
from burnish.artifacts.deletion import delete_run
from burnish.artifacts.files import dump_json
from burnish.artifacts.folder import MANIFEST, DamagedFolder, NewerFormat, verify_folder
from burnish.artifacts.lock import LOCK
from burnish.artifacts.run_folder import RunFolder, list_runs, load_run, load_stage
from burnish.errors import BurnishError, UsageError
from burnish.report.html import render_report
from tests.reliability.stages import build_job, finish, read_tree

OLD = Path(__file__).parent / "run-format-1.tar.gz"
RESOLVED = {"name": "old", "model": "pocket", "seed": 5, "stages": [{"kind": "sft", "name": "sft", "max_steps": 10}]}


def open_run(root: Path, name: str = "old") -> RunFolder:
    return RunFolder.open(root, name, recipe_text="name: old\n", resolved=RESOLVED)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """An unpacked run folder of format 1."""
    with tarfile.open(OLD) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "old"


# ------------------------------------------------------------------------------------------------------

HOLD = """
import signal, sys
from pathlib import Path
from burnish.artifacts.run_folder import RunFolder
RunFolder.open(Path(sys.argv[1]), "old", recipe_text="", resolved={"name": "old"})
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_r28_train_resume_and_delete_are_refused_while_a_run_is_in_use(tmp_path, holder):
    before = read_tree(tmp_path)
    for action in (lambda: open_run(tmp_path), lambda: delete_run(tmp_path, "old")):
        with pytest.raises(UsageError, match=f"in use by process {holder.pid} on ") as caught:
            action()
        assert "started 20" in str(caught.value) and caught.value.exit_code == 2
    assert read_tree(tmp_path) == before
    assert list_runs(tmp_path)[0]["state"] == "running"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert list_runs(tmp_path)[0]["state"] == "interrupted"
    with open_run(tmp_path) as run:
        assert not run.fresh
    delete_run(tmp_path, "old")
    assert not (tmp_path / "old").exists()


@pytest.mark.slow
def test_r28_two_commands_in_one_folder(tmp_path):
    """The second command ends with status 2 before it loads a model, and names the first."""
    from tests.pipeline.tiny_folder import build_model_folder, write_rows

    build_model_folder(tmp_path / "model", hidden=16, layers=1)
    rows = write_rows(tmp_path / "chat.jsonl", "pocket/chat", 8)
    command = [sys.executable, "-m", "burnish", "sft", "--model", str(tmp_path / "model"), "--data", str(rows)]
    command += ["--output-dir", str(tmp_path), "--run-name", "old"]
    hold = HOLD.replace('"name": "old"', '"name": "sft"')  # a verb's recipe is called after its kind
    child = subprocess.Popen([sys.executable, "-c", hold, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    done = subprocess.run(command, capture_output=True, text=True)
    child.kill()
    child.wait()
    assert done.returncode == 2 and f"in use by process {child.pid}" in done.stderr, done.stderr
    assert "attention" not in done.stderr


# ------------------------------------------------------------------------------------------------------


def test_r39_format_1_is_read_and_continued(old, caplog):
    assert OLD.stat().st_size <= 50_000
    before = read_tree(old)
    (row,) = list_runs(old.parent)
    assert row["state"] == "interrupted" and "problem" not in row
    assert [s["state"] for s in row["stages"]] == ["interrupted", "done"]
    assert load_run(old)["exit_code"] == 143
    assert (load_stage(old / "02-sft2") or {})["figures"]["steps"] == 10
    verify_folder(old / "02-sft2" / "final")
    assert [ref.step for ref in list_checkpoints(old / "01-sft")] == [6]
    assert read_tree(old) == before, "reading wrote something"
    assert render_report(old).is_file()
    with open_run(old.parent) as run:
        assert run.record["starts"] == 2 and run.run_id == load_run(old)["run_id"]
        job = build_job(run.stage_dir(1, "sft"), resume=True, run_id=run.run_id)
        job.trainable = {n: p for n, p in job.trainable.items() if "ln_f" in n}
        rows = finish(job)[1]
    mark = json.loads(before["01-sft/checkpoint-6/state.json"])["counters"]["metrics_mark"]
    assert rows.startswith(before["01-sft/metrics.jsonl"][:mark]) and mark > 0
    steps = [r["step"] for r in map(json.loads, rows.splitlines()) if r["kind"] == "train"]
    assert steps == list(range(1, 11))


def forge(place: Path, **fields: Any) -> None:
    """A record or manifest as another program might have written it."""
    place.write_bytes(dump_json({**json.loads(place.read_bytes()), **fields}))


READERS: dict[str, Callable[[Path], object]] = {
    "run.json": lambda run: open_run(run.parent),
    "01-sft/stage.json": lambda run: load_stage(run / "01-sft"),
    f"01-sft/checkpoint-6/{MANIFEST}": lambda run: newest_valid(run / "01-sft"),
    f"02-sft2/final/{MANIFEST}": lambda run: verify_folder(run / "02-sft2/final"),
}


@pytest.mark.parametrize("name", READERS)
def test_r39_what_a_later_version_wrote_is_refused_and_left_as_it_is(old, name):
    forge(old / name, format=2, burnish="9.1")
    (old / ".tmp-of-the-later-version").mkdir()
    before = read_tree(old)
    with pytest.raises(NewerFormat, match=r"burnish 9\.1") as caught:
        READERS[name](old)
    assert caught.value.exit_code == 2 and "9.1" in caught.value.remedy and str(old) in str(caught.value)
    assert read_tree(old) == before and not (old / LOCK).exists()
    assert (old / ".tmp-of-the-later-version").is_dir()
    (row,) = list_runs(old.parent)
    assert "9.1" in row["problem"] if name == "run.json" else row["stages"]


def test_r39_a_stage_with_a_later_checkpoint_is_neither_resumed_nor_begun_afresh(old):
    forge(old / "01-sft" / "checkpoint-6" / MANIFEST, format=2, burnish="9.1")
    before = read_tree(old, leave=(LOCK,))
    with pytest.raises(NewerFormat):
        finish(build_job(old / "01-sft", resume=True, run_id=load_run(old)["run_id"]))
    assert read_tree(old, leave=(LOCK,)) == before


@pytest.mark.parametrize("version", [0, -1, True, None, "1", 1.0, [1]])
def test_r39_formats_that_never_were(old, version):
    for name in ("run.json", "01-sft/stage.json"):
        forge(old / name, format=version)
    before = read_tree(old)
    for action in (lambda: open_run(old.parent), lambda: load_stage(old / "01-sft")):
        with pytest.raises(UsageError) as caught:
            action()
        assert caught.value.exit_code == 2
    forge(old / "01-sft" / "checkpoint-6" / MANIFEST, format=version)
    with pytest.raises(DamagedFolder):
        verify_folder(old / "01-sft" / "checkpoint-6")
    forge(old / "01-sft" / "checkpoint-6" / MANIFEST, format=1)
    assert {**read_tree(old), f"01-sft/checkpoint-6/{MANIFEST}": b""} == {
        **before,
        f"01-sft/checkpoint-6/{MANIFEST}": b"",
    }


FOREIGN = {
    "a trainer of transformers": {"checkpoint-500/trainer_state.json": "{}", "trainer_state.json": "{}"},
    "a run.json of another program": {"run.json": '{"id": 7, "name": "x"}'},
    "a run.json with a format of its own": {"run.json": '{"format": 1, "jobs": []}'},
    "a run.json that is a list": {"run.json": "[1, 2]"},
    "leftovers of another program": {".tmp-work/file": "x", "data.bin": "x"},
    "an empty run.json": {"run.json": ""},
    "ten thousand brackets": {"run.json": "[" * 10_000},
}


@pytest.mark.parametrize("name", FOREIGN)
def test_r39_another_programs_folder_is_left_alone(tmp_path, name):
    for place, text in FOREIGN[name].items():
        (tmp_path / "old" / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "old" / place).write_text(text)
    before = read_tree(tmp_path)
    with pytest.raises(BurnishError) as caught:
        open_run(tmp_path)
    assert caught.value.exit_code == 2 and caught.value.remedy
    assert read_tree(tmp_path) == before


def test_r39_another_programs_checkpoints_are_not_taken_for_ours(tmp_path):
    stage = tmp_path / "01-sft"
    (stage / "checkpoint-500").mkdir(parents=True)
    (stage / "checkpoint-500" / "trainer_state.json").write_text("{}")
    found, problems = newest_valid(stage)
    assert found is None and "checkpoint-500: no manifest.json" in problems[0]
    with pytest.raises(BurnishError, match="no manifest"):
        finish(build_job(stage, resume=True))
    shutil.rmtree(stage)
    assert not list(tmp_path.iterdir())

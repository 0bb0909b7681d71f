"""R-14, R-35, R-36 and R-38: full disks, bounded use, jumping clocks, folders that are read-only or vanish."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

import burnish
from burnish import disk
from burnish.artifacts.checkpoints import list_checkpoints, newest_valid
from burnish.artifacts.redact import redact
from burnish.artifacts.run_folder import RunFolder
from burnish.config.stages import SftSettings
from burnish.engine.space import estimate_checkpoint, measure_folder, plan_disk
from burnish.errors import ResourceError
from burnish.track.log import attach_log_file, detach_log_file
from burnish.track.metrics import read_metrics
from tests.forkserver import ForkServer
from tests.reliability.stages import build_job, fault, finish

POINTS = [
    f"{point}:{nth}"
    for point in (
        "folder.mkdir",
        "folder.write",
        "folder.fsync_file",
        "folder.manifest",
        "folder.fsync_dir",
        "folder.rename",
        "folder.fsync_parent",
        "metrics.write",
        "metrics.fsync",
    )
    for nth in (1, 2, 4)
]
FEW = ["folder.write:5", "metrics.write:5", "metrics.fsync:2"]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, bytes]:
    return finish(build_job(tmp_path_factory.mktemp("calm")))


def check_failing_disk(folder: Path, calm: tuple[str, bytes], point: str, error: str) -> None:
    with fault(f"{point}:{error}"), pytest.raises(ResourceError) as caught:
        finish(build_job(folder))
    text = str(caught.value)
    assert caught.value.exit_code == 5 and str(folder) in text and "\n  → " in text
    if error == "enospc":
        assert re.search(r"bytes.* needed, [\d,]+ bytes .*free", text), text
        assert "save_total_limit" in text
    else:
        assert "belongs to" in text and "--output-dir" in text
    problems = newest_valid(folder)[1]
    assert not problems
    assert read_metrics(folder / "metrics.jsonl")[1] is None
    assert finish(build_job(folder, resume=True)) == calm


@pytest.mark.parametrize("point", FEW)
def test_r14_disk_full_while_a_stage_trains(tmp_path, calm, point):
    check_failing_disk(tmp_path, calm, point, "enospc")


@pytest.mark.slow
@pytest.mark.parametrize("point", [p for p in POINTS if p not in FEW])
def test_r14_disk_full_at_every_point_of_a_stage(tmp_path, calm, point):
    check_failing_disk(tmp_path, calm, point, "enospc")


@pytest.mark.parametrize("point", FEW[:1])
def test_r38_a_disk_that_fails_while_a_stage_trains(tmp_path, calm, point):
    check_failing_disk(tmp_path, calm, point, "eio")


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_r38_a_disk_that_fails_at_every_point_of_a_stage(tmp_path, calm, point):
    check_failing_disk(tmp_path, calm, point, "eio")


def test_r14_disk_full_for_the_log_alone(tmp_path, calm, capsys):
    """Loud at once, exit 5 at the next save, which is made; then it goes on exactly."""
    attach_log_file(tmp_path / "log.txt", redact=redact)
    try:
        with fault("log.write:1:enospc"), pytest.raises(ResourceError, match=r"log\.txt") as caught:
            finish(build_job(tmp_path / "stage", label="sft"))
    finally:
        detach_log_file()
    assert caught.value.exit_code == 5 and "free" in str(caught.value)
    assert "cannot write log.txt" in capsys.readouterr().err
    assert [ref.step for ref in list_checkpoints(tmp_path / "stage")] == [3]
    assert finish(build_job(tmp_path / "stage", resume=True)) == calm


def test_r14_the_space_is_checked_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 100_000)
    with pytest.raises(ResourceError, match=r"needs [\d,]+ bytes .* and 100,000 .* are free") as caught:
        finish(build_job(tmp_path))
    assert "save_total_limit" in caught.value.remedy and not list(tmp_path.glob("checkpoint-*"))
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_r14_a_checkpoint_is_no_larger_than_said(tmp_path):
    for optim in ("adamw", "adafactor", "sgd"):
        job = build_job(tmp_path / optim, optim=optim, max_steps=1)
        finish(job)
        said = estimate_checkpoint([p.shape for p in job.trainable.values()], optim)
        size = measure_folder(tmp_path / optim / "checkpoint-1")
        assert said / 4 < size <= said, optim


def check_bounded(folder: Path, caplog, steps: int) -> None:
    with caplog.at_level("INFO", logger="burnish"):
        job = build_job(
            folder,
            label="sft",
            num_train_epochs=steps / 5,
            save_steps=20,
            save_total_limit=2,
            eval_steps=100,
            load_best_model_at_end=True,
            learning_rate=1e-4,
        )
        said: list[int] = []

        def measure(step: int, figures, seconds: float) -> None:
            if not said:
                said.append(int(re.search(r"disk: at most ([\d,]+) bytes", caplog.text)[1].replace(",", "")))  # type: ignore[index]
            if step % 50 == 0 or step % 20 in (0, 19):
                assert measure_folder(folder) <= said[0]

        job.on_step = measure
        finish(job)
    names = {p.name for p in folder.iterdir()}
    assert not [n for n in names if n.startswith((".tmp-", ".old-"))]
    assert len([n for n in names if n.startswith("checkpoint-")]) <= 3
    assert measure_folder(folder) <= said[0]


def test_r35_the_disk_stays_within_the_figure_printed(tmp_path, caplog):
    check_bounded(tmp_path, caplog, 120)


@pytest.mark.slow
def test_r35_two_thousand_steps_stay_within_the_figure_printed(tmp_path, caplog):
    check_bounded(tmp_path, caplog, 2000)


def test_r35_the_figure_is_not_a_loose_one(tmp_path):
    """Without the cap of the log it is at most three times what is used."""
    job = build_job(tmp_path, save_total_limit=2, save_steps=1)
    finish(job)
    checkpoint = estimate_checkpoint([p.shape for p in job.trainable.values()], "adamw")
    settings = SftSettings(save_total_limit=2, eval_steps=2)
    plan = plan_disk(settings, checkpoint, total_steps=10, save_every=1, steps_per_epoch=5)
    assert plan.copies == 3 and plan.total - disk_log_cap() < 3 * measure_folder(tmp_path)


def disk_log_cap() -> int:
    from burnish.track.log import LOG_BYTES

    return LOG_BYTES


def test_r35_old_temporary_folders_go_at_the_next_start(tmp_path):
    def start() -> RunFolder:
        return RunFolder.open(tmp_path, "r", recipe_text="", resolved={"name": "x"})

    with start() as run:
        stage = run.stage_dir(1, "dpo")
        for place in (run.path, stage, stage / "reference"):
            (place / ".tmp-left-0").mkdir(parents=True)
    with start() as run:
        run.stage_dir(1, "dpo")
        assert len(run.notes) == 3
    assert not list(tmp_path.rglob(".tmp-*"))


def test_r36_jumping_clocks_change_no_row_and_no_duration(tmp_path, calm, monkeypatch):
    leaps = iter([86400.0 * 365, -3600.0, 0.0] * 10_000)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(leaps))
    job = build_job(tmp_path)
    assert finish(job) == calm
    rows = read_metrics(tmp_path / "timing.jsonl")[0]
    assert [r["step"] for r in rows] == list(range(1, 11)) and all(0 <= r["seconds"] < 3600 for r in rows)


def test_r36_nothing_reads_the_wall_clock_for_durations():
    for path in Path(burnish.__file__).parent.rglob("*.py"):
        found = re.search(r"\btime\.time\(|from time import .*\btime\b|datetime\.utcnow", path.read_text())
        assert not found, path


def test_r36_run_ids_are_unique_while_the_clock_stands_still(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 1.7e9)
    ids = set()
    for i in range(20):
        with RunFolder.open(tmp_path, f"r{i}", recipe_text="", resolved={"name": "x"}) as run:
            ids.add(run.run_id)
    assert len(ids) == 20


def test_r38_a_run_folder_removed_during_the_run(tmp_path):
    """Found within one save; nothing is made anew at its place."""
    stage = tmp_path / "runs" / "r" / "01-sft"
    job = build_job(stage)
    job.on_step = lambda step, figures, seconds: shutil.rmtree(tmp_path / "runs") if step == 3 else None
    with pytest.raises(ResourceError, match="No such file") as caught:
        finish(job)
    assert caught.value.exit_code == 5 and str(stage) in str(caught.value) and "belongs to" in str(caught.value)
    assert "--output-dir" in caught.value.remedy
    assert not (tmp_path / "runs").exists()


def test_r38_a_stage_folder_replaced_during_the_run(tmp_path):
    """An empty folder of the same name is not the run's: its rows would be missing there."""
    stage = tmp_path / "01-sft"
    job = build_job(stage)

    def replace(step: int, figures: object, seconds: float) -> None:
        if step == 3:
            shutil.rmtree(stage)
            stage.mkdir()

    job.on_step = replace
    with pytest.raises(ResourceError, match=r"metrics\.jsonl"):
        finish(job)
    assert not list(stage.iterdir())


def open_as_nobody(root: Path, name: str) -> str:
    """What `RunFolder.open` says in a process of another user (root ignores modes)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        text = "opened"
        try:
            os.setuid(65534)
            RunFolder.open(root, name, recipe_text="", resolved={"name": "x"})
        except ResourceError as error:
            text = f"{error.exit_code} {error}"
        except BaseException as error:
            text = repr(error)
        os.write(write, text.encode()[:4000])
        os._exit(0)
    os.close(write)
    os.waitpid(pid, 0)
    with os.fdopen(read, "rb") as stream:
        return stream.read().decode()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_r38_a_folder_of_another_user_is_found_at_the_start():
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "runs").mkdir(mode=0o755)
        for name, place in (("new", root / "runs"), ("new", root / "absent" / "deeper")):
            text = open_as_nobody(place, name)
            assert text.startswith("5 ") and str(place) in text and "belongs to root (mode 755)" in text, text
            assert "--output-dir" in text
        with RunFolder.open(root / "runs", "old", recipe_text="", resolved={"name": "x"}):
            pass
        text = open_as_nobody(root / "runs", "old")
        assert text.startswith("5 ") and "belongs to root" in text and "--output-dir" in text, text


def test_r38_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as caught:
        RunFolder.open(tmp_path / "file", "r", recipe_text="", resolved={"name": "x"})
    assert caught.value.exit_code == 5 and "belongs to" in str(caught.value)


def can_mount() -> bool:
    found = shutil.which("unshare")
    return found is not None and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


READ_ONLY = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
mkdir "$1/runs"
mount -o remount,ro "$1"
"$2" - "$1" <<'PY'
import sys
from pathlib import Path
from burnish.artifacts.run_folder import RunFolder
from burnish.errors import ResourceError
try:
    RunFolder.open(Path(sys.argv[1]) / "runs", "r", recipe_text="", resolved={"name": "x"})
except ResourceError as error:
    text = str(error)
    assert error.exit_code == 5 and "Read-only" in text and "belongs to" in text and "--output-dir" in text, text
    assert "torch" not in sys.modules
    print("ok")
PY
"""


def test_r38_a_really_read_only_disk(tmp_path):
    if not can_mount():
        pytest.skip("no private mounts here")
    command = ["unshare", "-rm", "sh", "-c", READ_ONLY, "sh", str(tmp_path), sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "ok", done.stderr


def test_disk_failures_are_known_through_any_library(tmp_path):
    inside = FileNotFoundError(errno.ENOENT, "gone", str(tmp_path / "a"))
    assert disk.find_disk_failure(inside, tmp_path) is inside
    assert disk.find_disk_failure(inside) is None
    for text in ("I/O error: No space left on device (os error 28)", "Error while serializing: os error 5"):
        assert disk.find_disk_failure(Exception(text)) is not None
    assert disk.find_disk_failure(OSError("connection reset")) is None
    assert disk.find_disk_failure(ResourceError("No space left on device", remedy="x")) is None


# ------------------------------------------------------------------------------------------------ whole commands


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.pipeline.tiny_folder import build_model_folder, write_rows

    folder = tmp_path_factory.mktemp("inputs")
    build_model_folder(folder / "model", hidden=16, layers=1)
    write_rows(folder / "pairs.jsonl", "pocket/preferences", 12)
    return folder


def build_command(inputs: Path, out: Path) -> list[str]:
    options = {
        "model": inputs / "model",
        "data": inputs / "pairs.jsonl",
        "output-dir": out,
        "run-name": "run",
        "batch-size": 2,
        "max-steps": 4,
        "save-steps": 2,
        "learning-rate": 1e-3,
        "precision": "fp32",
        "validation-split": 0.25,
        "seed": 3,
    }
    return ["dpo", *(word for name, value in options.items() for word in (f"--{name}", str(value)))]


def read_result(out: Path) -> tuple[bytes, bytes]:
    stage = out / "run" / "01-dpo"
    return (stage / "final" / "model.safetensors").read_bytes(), (stage / "metrics.jsonl").read_bytes()


def check_command(server: ForkServer, inputs: Path, out: Path, expected: tuple[bytes, bytes], spec: str) -> bool:
    """Run with a fault, then without: False if the fault was never reached."""
    out.mkdir()
    status = server.run(build_command(inputs, out), log=out / "log", cwd=out, fault=spec)
    text = (out / "log").read_text()
    reached = status != 0
    if reached and not spec.endswith(":kill"):
        assert status == 5, (spec, text[-3000:])
        assert "Traceback" not in text, (spec, text[-3000:])
        line = text[text.rindex("error: ") :]
        assert str(out) in line and "→" in line, (spec, line)
        assert ("free" in line and "needed" in line) if spec.endswith("enospc") else "belongs to" in line, (spec, line)
    if reached:
        for folder in (out / "run").glob("**/checkpoint-*"):
            assert list_checkpoints(folder.parent), spec
        status = server.run(build_command(inputs, out), log=out / "log", cwd=out)
        assert status == 0, (spec, (out / "log").read_text()[-3000:])
    assert read_result(out) == expected, spec
    left = [p for p in (out / "run").rglob("*") if p.name.startswith((".tmp-", ".old-"))]
    assert not left, (spec, left)
    for record in ("run.json", "01-dpo/stage.json"):
        assert json.loads((out / "run" / record).read_text())["state"] == "done", spec
    shutil.rmtree(out)
    return reached


@pytest.fixture(scope="module")
def result(server, inputs, tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, bytes]:
    out = tmp_path_factory.mktemp("result")
    assert server.run(build_command(inputs, out), log=out / "log", cwd=out) == 0, (out / "log").read_text()
    return read_result(out)


def test_r14_disk_full_at_a_record_of_a_command(server, inputs, result, tmp_path):
    assert check_command(server, inputs, tmp_path / "a", result, "file.write:6:enospc")


@pytest.mark.slow
@pytest.mark.parametrize("error", ["enospc", "eio", "kill"])
@pytest.mark.parametrize("points", ["file.*", "folder.*"])
def test_r04_r14_r38_every_operation_of_a_command(server, inputs, result, tmp_path, points, error):
    """R-04 (kill), R-14 (enospc), R-38 (eio) at the first, second … operation, until the command never gets there.

    The writers are those of recipe, environment, run.json, stage.json and report; of reference, checkpoints and final/.
    """
    nth = 1
    while check_command(server, inputs, tmp_path / str(nth), result, f"{points}:{nth}:{error}"):
        nth += 5 if error == "eio" else 1  # the same ways through the code as enospc
    assert nth > (20 if points == "file.*" else 30)


@pytest.mark.slow
@pytest.mark.parametrize("point", ["log.write:1", "log.write:4", "metrics.write:3", "metrics.fsync:2", "lock.write:1"])
@pytest.mark.parametrize("error", ["enospc", "eio"])
def test_r14_r38_logs_of_a_command(server, inputs, result, tmp_path, point, error):
    assert check_command(server, inputs, tmp_path / "a", result, f"{point}:{error}")


FULL = """
set -e
mount -t tmpfs -o size=6m tmpfs "$1"
exec "$2" - "$@" <<'PY'
import os, signal, subprocess, sys
from pathlib import Path
root, python, command = Path(sys.argv[1]), sys.argv[2], sys.argv[3:]
def start(fault=""):
    env = os.environ | {"BURNISH_TESTING": "1", "BURNISH_FAULT": fault}
    return subprocess.Popen([python, "-m", "burnish", *command], env=env, stderr=subprocess.PIPE, text=True)
filler = root / "filler"
child = start("loop.after_step:60:stop")
assert os.WIFSTOPPED(os.waitpid(child.pid, os.WUNTRACED)[1]), child.stderr.read()
with filler.open("wb", buffering=0) as file:
    try:
        while True:
            file.write(b"x" * 4096)
    except OSError:
        pass
child.send_signal(signal.SIGCONT)
text = child.communicate()[1]
assert child.returncode == 5, (child.returncode, text)
assert "No space left" in text and "needed" in text and str(root) in text and "Traceback" not in text, text
again = start()
text = again.communicate()[1]
assert again.returncode == 5 and "free" in text, text
filler.unlink()
last = start()
text = last.communicate()[1]
assert last.returncode == 0, text
print("ok")
PY
"""


@pytest.mark.slow
def test_r14_a_really_full_disk_under_a_command(inputs, tmp_path):
    """A tmpfs of 6 MB is filled while a stage trains: exit 5; still full: exit 5; freed: the same bits as a calm run."""
    if not can_mount():
        pytest.skip("no private mounts here")
    (tmp_path / "disk").mkdir()
    longer = ["--max-steps", "400", "--save-steps", "20"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "BURNISH_CACHE": "off"}
    calm = [sys.executable, "-m", "burnish", *build_command(inputs, tmp_path / "calm"), *longer]
    assert subprocess.run(calm, env=env, capture_output=True).returncode == 0
    keep = FULL.replace(
        'print("ok")', f'import shutil; shutil.copytree(root / "run", "{tmp_path}/copy/run"); print("ok")'
    )
    command = [*build_command(inputs, tmp_path / "disk"), *longer]
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", keep, "sh", str(tmp_path / "disk"), sys.executable, *command],
        capture_output=True,
        text=True,
        env=env,
    )
    assert done.stdout.strip() == "ok", done.stderr[-3000:]
    assert read_result(tmp_path / "copy") == read_result(tmp_path / "calm")

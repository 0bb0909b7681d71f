"""R-24: one of two processes is killed or hangs: the run ends soon, says which and where, leaves nothing behind."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.test_kill import build_command, compute_digest
from tests.waiting import BOUND, wait_until

# Seconds of silence after which a process is given up: needed where one is stopped or hangs, and far more than a step takes.
LIMIT = 20


def start(command: list[str], folder: Path, *, fault: str = "") -> tuple[int, str]:
    """(exit status, standard error) of a two-process run; nothing of its session may be left."""
    silent = ":stop" in fault or ":hang" in fault
    env = os.environ | {"BURNISH_TESTING": "1", "OMP_NUM_THREADS": "1", "TERM": "dumb"}
    env |= {"BURNISH_PEER_TIMEOUT": str(LIMIT if silent else BOUND), "BURNISH_FAULT": fault}
    if not fault:
        del env["BURNISH_FAULT"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "burnish", *command, "--num-processes", "2"],
        env=env,
        cwd=folder,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        start_new_session=True,
    )
    _, text = parent.communicate(timeout=BOUND)
    assert find_session(parent.pid) == [], "a process of the run is left"
    return parent.returncode, text


def find_session(leader: int) -> list[int]:
    """Processes (zombies too) of a session."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[3]) == leader:
                found.append(int(entry.name))
    return found


@pytest.fixture(scope="module")
def calm(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What an undisturbed two-process run ends with."""
    folder = tmp_path_factory.mktemp("calm")
    status, text = start(build_command(inputs, "dpo", False, folder), folder)
    assert status == 0, text[-3000:]
    return compute_digest(folder / "run")


def check(inputs: Path, folder: Path, calm: dict[str, str], fault: str, words: list[str], status: int) -> None:
    command = build_command(inputs, "dpo", False, folder)
    found, text = start(command, folder, fault=fault)
    last = text[text.rindex("error: ") :]
    assert text.count("error: ") == 1, text[-3000:]
    assert found == status, text[-3000:]
    assert "Traceback" not in text
    assert re.search(r"process 1 \(pid \d+\)", last), last
    for word in words:
        assert word in last, last
    pid = int(re.search(r"process 1 \(pid (\d+)\)", last)[1])  # pyright: ignore
    assert not Path(f"/proc/{pid}").exists()
    status, text = start(command, folder)
    assert status == 0, text[-3000:]
    assert compute_digest(folder / "run") == calm, "the resumed run ends with other bits"
    record = json.loads((folder / "run" / "01-dpo" / "stage.json").read_text())
    assert record["resumed_from"] is not None


@pytest.mark.dist
def test_r24_a_killed_process_is_named(inputs, tmp_path, calm):
    """R-24: SIGKILL to rank 1: rank, pid, signal and last step; exit 5; the resume is exact."""
    check(inputs, tmp_path, calm, "loop.after_step:5:kill@1", ["signal 9 (SIGKILL)", "after step 4", "dpo"], 5)


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "words", "status"),
    [
        ("step.forward:5:kill@1", ["signal 9 (SIGKILL)", "phase forward"], 5),
        ("step.backward:6:kill@1", ["signal 9 (SIGKILL)", "phase backward"], 5),
        ("loop.after_step:5:stop@1", ["SIGSTOP", "after step 4"], 1),
        ("step.forward:6:stop@1", ["SIGSTOP", "phase forward"], 1),
        ("loop.after_step:5:hang@1", ["has not answered", "after step 4"], 1),
    ],
)
def test_r24_killed_stopped_or_hanging_processes(inputs, tmp_path, calm, fault, words, status):
    """R-24: in every phase, by SIGKILL, SIGSTOP and an endless wait."""
    check(inputs, tmp_path, calm, fault, words, status)


@pytest.mark.dist
@pytest.mark.slow
def test_r24_processes_do_not_outlive_their_parent(inputs, tmp_path):
    """R-24: when the parent is killed, the others save and end."""
    command = [*build_command(inputs, "dpo", False, tmp_path), "--max-steps", "1000000", "--save-steps", "1000000"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb"}
    parent = subprocess.Popen(
        [sys.executable, "-m", "burnish", *command, "--num-processes", "2"],
        env=env,
        cwd=tmp_path,
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        start_new_session=True,
    )
    metrics = tmp_path / "run" / "01-dpo" / "metrics.jsonl"
    wait_until(lambda: metrics.exists() or parent.poll() is not None, "the first step is written")
    assert parent.poll() is None
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    wait_until(lambda: not find_session(parent.pid), "all processes have ended")
    assert json.loads((tmp_path / "run" / "01-dpo" / "stage.json").read_text())["state"] == "interrupted"

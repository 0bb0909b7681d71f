"""SIGKILL at enumerated and random moments, then the same command: the same bits as a run that was never killed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forkserver import ForkServer
from tests.waiting import BOUND, read_process_state, wait_until

# Where a run is killed: a fault point and its n-th passing, or the n-th call of a function ("before" it or "after" it).
# "A > B": killed at A, and the continued run at B. All of them are reached by every method.
POINTS = [
    "step.forward:1",
    "torch.nn.modules.sparse:Embedding.forward:9:after",  # in the middle of a forward
    "step.backward:3",
    "burnish.engine.loop:compute_gradient:5:before",
    "burnish.engine.loop:compute_gradient:6:after",
    "update.before_optimizer:6",
    "torch.optim.adam:_fused_adam:5:after",  # in the middle of the optimizer's step
    "update.after_optimizer:7",
    "loop.after_step:5",
    "metrics.write:1",
    "metrics.write:8",
    "metrics.fsync:2",
    "burnish.engine.saves:save_checkpoint:2:before",
    "folder.mkdir:4",
    "folder.write:4",
    "folder.fsync_file:7",
    "folder.manifest:4",
    "folder.fsync_dir:4",
    "folder.rename:4",
    "folder.fsync_parent:4",
    "prune.rename:1",
    "prune.remove:1",
    "burnish.engine.loop:run_evaluation:1:before",
    "burnish.engine.evaluation:_evaluate:2:after",
    "burnish.pipeline.stage_models:export_model:1:after",
    "burnish.artifacts.folder:FolderWriter._seal:5:after",
    "burnish.pipeline.train_stage:_describe:1:before",
    "file.rename:4",
    "file.fsync_parent:5",
    "burnish.report.html:render_report:1:before",
    "update.after_optimizer:8 > burnish.engine.saves:load_checkpoint:1:after",
]
REFERENCE = [
    "burnish.pipeline.reference:compute_reference_table:1:before",
    "burnish.pipeline.reference:compute_reference_table:2:after",
    "folder.rename:1",
    "folder.rename:2",
    "folder.fsync_parent:1 > burnish.pipeline.reference:attach_table:1:before",
]
FEW = POINTS[1::4]


def build_command(inputs: Path, kind: str, lora: bool, out: Path) -> list[str]:
    data = inputs / ("chat.jsonl" if kind == "sft" else "pairs.jsonl")
    command = [
        kind,
        "--model",
        str(inputs / "model"),
        "--data",
        str(data),
        "--output-dir",
        str(out),
        "--run-name",
        "run",
    ]
    command += [
        "--batch-size",
        "2",
        "--max-steps",
        "10",
        "--save-steps",
        "3",
        "--learning-rate",
        "1e-3",
        "--precision",
        "fp32",
    ]
    command += ["--validation-split", "0.25", "--eval-steps", "4", "--seed", "3"]
    if not lora:
        return command
    command += ["--lora.r", "4"]
    return [*command, "--lora.dropout", "0.1"] if kind == "sft" else command


def compute_digest(run: Path) -> dict[str, str]:
    """File → SHA-256: the result's weights, the last checkpoint's weights, moments and state, the metrics."""
    stage = next(p for p in run.iterdir() if p.name.startswith("01-"))
    last = max(stage.glob("checkpoint-*"), key=lambda p: int(p.name.removeprefix("checkpoint-")))
    files = [*sorted((stage / "final").glob("*.safetensors")), *sorted(last.glob("*.safetensors"))]
    assert len(files) >= 3
    files.append(stage / "metrics.jsonl")
    found = {p.relative_to(stage).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    state = json.loads((last / "state.json").read_text())
    state["counters"].pop("timing_mark", None)  # the length of timing.jsonl, whose seconds differ
    return found | {"state": json.dumps(state, sort_keys=True)}


def describe_fault(point: str) -> dict[str, str]:
    """A point of the tables above as the fork server takes it."""
    return {"call": point} if point.count(":") == 3 else {"fault": f"{point}:kill"}


def run_until_done(server: ForkServer, command: list[str], out: Path, faults: list[dict]) -> list[int]:
    """The same command, each time with the next of `faults`, then without, until it succeeds: all exit statuses."""
    out.mkdir(parents=True, exist_ok=True)
    statuses = [server.run(command, log=out / "log", cwd=out, **fault) for fault in faults]
    while statuses[-1] != 0 and len(statuses) < len(faults) + 2:
        statuses.append(server.run(command, log=out / "log", cwd=out))
    assert statuses[-1] == 0, (statuses, (out / "log").read_text()[-3000:])
    return statuses


def check_kills(
    server: ForkServer, inputs: Path, kind: str, lora: bool, tmp: Path, points: list[str], randoms: int
) -> None:
    run_until_done(server, build_command(inputs, kind, lora, tmp / "calm"), tmp / "calm", [{}])
    expected = compute_digest(tmp / "calm" / "run")
    for index, point in enumerate(points):
        out = tmp / f"point-{index}"
        faults = [describe_fault(part) for part in point.split(" > ")]
        statuses = run_until_done(server, build_command(inputs, kind, lora, out), out, faults)
        assert statuses[:-1] == [-9] * len(faults), f"{point} was not reached: {statuses}"
        assert compute_digest(out / "run") == expected, point
        shutil.rmtree(out)
    if randoms:
        check_random_kills(server, inputs, kind, lora, tmp, expected, randoms)


def check_random_kills(
    server: ForkServer, inputs: Path, kind: str, lora: bool, tmp: Path, expected: dict[str, str], randoms: int
) -> None:
    out = tmp / "again"
    out.mkdir()
    length = server.count_calls(build_command(inputs, kind, lora, out), log=out / "log", cwd=out)
    assert compute_digest(out / "run") == expected
    draw = random.Random(f"{kind}{lora}")
    for i in range(randoms):
        out = tmp / f"random-{i}"
        first = {"die_at": int(draw.uniform(0.02, 0.95) * length)}
        statuses = run_until_done(server, build_command(inputs, kind, lora, out), out, [first])
        assert statuses == [-signal.SIGALRM, 0], statuses
        assert compute_digest(out / "run") == expected, f"died after {first['die_at']:,} of {length:,} calls"
        shutil.rmtree(out)


@pytest.mark.parametrize(("kind", "lora"), [("sft", True), ("reward", False), ("dpo", False)])
def test_r01_one_kill(server, inputs, kind, lora, tmp_path):
    """R-01: killed in the middle of a step and of a save, continued by the same command: the same bits."""
    check_kills(server, inputs, kind, lora, tmp_path, ["update.after_optimizer:7", "folder.manifest:4"], 0)


@pytest.mark.kill
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_r01_kills(server, inputs, kind, tmp_path):
    """R-01: at least thirty enumerated points and twenty random moments for each method."""
    points = POINTS + (REFERENCE if kind == "dpo" else [])
    assert len(points) >= 30
    check_kills(server, inputs, kind, False, tmp_path, points, 20)


@pytest.mark.kill
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
def test_r01_kills_with_lora(server, inputs, kind, tmp_path):
    """R-01: eight enumerated points and seven random moments for adapters."""
    check_kills(server, inputs, kind, True, tmp_path, FEW, 7)


# Two processes: who is killed (rank 0, rank 1, both), and when: at a point, or at a step, where it has stopped itself.
PAIRS = [
    ("0", "1"),
    ("0", "7"),
    ("0", "31"),
    ("1", "3"),
    ("1", "18"),
    ("1", "40"),
    ("both", "step.backward:9"),
    ("both", "folder.manifest:4"),
    ("both", "update.after_optimizer:23"),
    ("both", "12"),
]


def find_ranks(parent: int) -> list[int]:
    """Process ids of the ranks that a launcher started, in the order of their ranks."""
    children = Path(f"/proc/{parent}/task/{parent}/children")
    found = {}
    for pid in children.read_text().split():
        for word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            if word.startswith(b"RANK="):
                found[int(word[5:])] = int(pid)
    return [found[rank] for rank in sorted(found)]


def run_pair(command: list[str], out: Path, who: str = "", when: str = "") -> int:
    """Exit status of a run of two processes as the command line starts them, some of them killed."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "TERM": "dumb", "BURNISH_PEER_TIMEOUT": str(BOUND)}
    first = 1 if who == "1" else 0
    stop = f"loop.after_step:{when}:stop@{first}" if when else ""
    env["BURNISH_FAULT"] = f"{when}:kill" if ":" in when else stop
    out.mkdir(parents=True, exist_ok=True)
    words = [sys.executable, "-m", "burnish", *command, "--num-processes", "2"]
    with (out / "log").open("ab") as log:
        launcher = subprocess.Popen(words, env=env, cwd=out, stdout=log, stderr=log)
    if who and ":" not in when:
        ranks: list[int] = []

        def is_stopped() -> bool:
            assert launcher.poll() is None, (out / "log").read_text()[-3000:]
            ranks[:] = find_ranks(launcher.pid)
            return len(ranks) == 2 and read_process_state(ranks[first]) == "T"

        wait_until(is_stopped, "a rank stops itself")
        for pid in ranks if who == "both" else [ranks[int(who)]]:
            os.kill(pid, signal.SIGKILL)
    return launcher.wait(timeout=BOUND)


@pytest.fixture(scope="module")
def calm_pair(inputs, tmp_path_factory) -> dict[str, str]:
    """What an undisturbed run of two processes ends in."""
    out = tmp_path_factory.mktemp("pair")
    assert run_pair(build_pair_command(inputs, out), out) == 0, (out / "log").read_text()[-3000:]
    return compute_digest(out / "run")


def build_pair_command(inputs: Path, out: Path) -> list[str]:
    command = build_command(inputs, "dpo", False, out)
    return [*command, "--max-steps", "60", "--save-steps", "8", "--eval-steps", "25"]


@pytest.mark.kill
@pytest.mark.dist
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="reads the children of a process from /proc")
@pytest.mark.parametrize(("who", "when"), PAIRS)
def test_r01_kills_on_two_processes(inputs, calm_pair, tmp_path, who, when):
    """R-01, R-24: rank 0, rank 1 or both are killed; the same command on two processes ends in the same bits."""
    command = build_pair_command(inputs, tmp_path)
    assert run_pair(command, tmp_path, who, when) != 0
    assert run_pair(command, tmp_path) == 0, (tmp_path / "log").read_text()[-3000:]
    assert compute_digest(tmp_path / "run") == calm_pair


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_r13_signals_save_and_say_so(server, inputs, number, tmp_path):
    """R-13, S4-06: Ctrl-C gives 130 and SIGTERM 143, after saving; the same command then ends with the same bits."""
    command = [*build_command(inputs, "dpo", False, tmp_path), "--max-steps", "400", "--save-steps", "1000"]
    out = tmp_path / "log"
    status = server.run(command, log=out, cwd=tmp_path, signal_at=("step.backward:5", int(number)))
    text = out.read_text()
    assert status == 128 + number, text[-2000:]
    assert "same command" in text
    assert "Traceback" not in text
    stage = tmp_path / "run" / "01-dpo"
    assert json.loads((stage / "stage.json").read_text())["state"] == "interrupted"
    steps = [int(p.name.removeprefix("checkpoint-")) for p in stage.glob("checkpoint-*")]
    rows = (stage / "metrics.jsonl").read_text().splitlines()
    assert steps == [json.loads(rows[-1])["step"]] == [5]

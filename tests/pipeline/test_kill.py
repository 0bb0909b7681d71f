"""SIGKILL at enumerated and random moments, then the same command: the same bits as a run that was never killed."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.forkserver import ForkServer
from tests.pipeline.tiny_folder import build_model_folder, write_rows

POINTS = [
    "step.forward:3",
    "step.backward:9",
    "update.before_optimizer:6",
    "update.after_optimizer:7",
    "loop.after_step:5",
    "metrics.write:8",
    "folder.write:2",
    "folder.manifest:2",
    "folder.rename:2",
    "folder.fsync_parent:2",
    "prune.rename:1",
    "file.rename:6",
]
CASES = [(kind, lora) for kind in ("sft", "reward", "dpo") for lora in (False, True)]


@pytest.fixture(scope="module")
def server() -> Iterator[ForkServer]:
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inputs")
    build_model_folder(folder / "model")
    write_rows(folder / "chat.jsonl", "pocket/chat", 24)
    write_rows(folder / "pairs.jsonl", "pocket/preferences", 24)
    return folder


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
    return [*command, "--lora.r", "4"] if lora else command


def compute_digest(run: Path) -> tuple[str, bytes]:
    """(sha256 over the result's weights, metrics.jsonl)"""
    stage = next(p for p in run.iterdir() if p.name.startswith("01-"))
    chain = hashlib.sha256()
    files = sorted((stage / "final").glob("*.safetensors"))
    assert files
    for file in files:
        chain.update(file.read_bytes())
    return chain.hexdigest(), (stage / "metrics.jsonl").read_bytes()


def run_until_done(server: ForkServer, command: list[str], out: Path, **first) -> tuple[int, int]:
    """(status of the first start, starts in all)"""
    out.mkdir(parents=True, exist_ok=True)
    begin = status = server.run(command, log=out / "log", cwd=out, **first)
    starts = 1
    while status != 0 and starts < 4:
        status = server.run(command, log=out / "log", cwd=out)
        starts += 1
    assert status == 0, (out / "log").read_text()[-3000:]
    return begin, starts


def check_kills(
    server: ForkServer, inputs: Path, kind: str, lora: bool, tmp: Path, points: list[str], randoms: int
) -> None:
    run_until_done(server, build_command(inputs, kind, lora, tmp / "calm"), tmp / "calm")
    expected = compute_digest(tmp / "calm" / "run")
    killed = 0
    for point in points:
        out = tmp / point.replace(":", "-").replace(" ", "-")
        begin, _ = run_until_done(server, build_command(inputs, kind, lora, out), out, fault=f"{point}:kill")
        killed += begin == -9
        assert compute_digest(out / "run") == expected, point
    assert killed >= 0.6 * len(points), "most points must be reached"
    draw = random.Random(f"{kind}{lora}")
    for i in range(randoms):
        out = tmp / f"random-{i}"
        seconds = draw.uniform(0.2, 2.5)
        run_until_done(server, build_command(inputs, kind, lora, out), out, kill_after=seconds)
        assert compute_digest(out / "run") == expected, f"killed after {seconds:.2f} s"


@pytest.mark.parametrize(("kind", "lora"), [("sft", False), ("reward", True), ("dpo", False)])
def test_r01_one_kill(server, inputs, kind, lora, tmp_path):
    """R-01: killed in the middle of a step and of a save, continued by the same command: the same bits."""
    check_kills(server, inputs, kind, lora, tmp_path, ["update.after_optimizer:7", "folder.manifest:2"], 0)


@pytest.mark.kill
@pytest.mark.parametrize(("kind", "lora"), CASES)
def test_r01_kills(server, inputs, kind, lora, tmp_path):
    """R-01: twelve enumerated points and four random moments for each method, full and LoRA."""
    check_kills(server, inputs, kind, lora, tmp_path, POINTS, 4)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_r13_signals_save_and_say_so(server, inputs, number, tmp_path):
    """R-13, S4-06: Ctrl-C gives 130 and SIGTERM 143, after saving; the same command then ends with the same bits."""
    command = [*build_command(inputs, "dpo", False, tmp_path), "--max-steps", "400", "--save-steps", "1000"]
    out = tmp_path / "log"
    status = server.run(command, log=out, cwd=tmp_path, signal_after=(int(number), 4.0))
    text = out.read_text()
    assert status == 128 + number, text[-2000:]
    assert "same command" in text
    assert "Traceback" not in text
    stage = tmp_path / "run" / "01-dpo"
    assert json.loads((stage / "stage.json").read_text())["state"] == "interrupted"
    steps = [int(p.name.removeprefix("checkpoint-")) for p in stage.glob("checkpoint-*")]
    rows = (stage / "metrics.jsonl").read_text().splitlines()
    assert steps == [json.loads(rows[-1])["step"]]

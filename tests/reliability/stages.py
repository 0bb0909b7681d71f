"""A small stage of ten steps, run without a command line: enough to damage, fill, cut and resume."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from burnish import faults
from burnish.config.stages import SftSettings
from burnish.engine.job import TrainJob, build_source
from burnish.engine.loop import run_training
from burnish.engine.runtime import Runtime
from tests.engine.tiny import build_groups, build_method, build_policy, trainable

STEPS = 10


def build_job(folder: Path, *, resume: bool = False, run_id: str = "r", label: str = "", **changes: Any) -> TrainJob:
    """An SFT stage of ten steps that keeps every checkpoint (steps 3, 6, 9, 10) and evaluates every other step."""
    options = {"learning_rate": 1e-2, "batch_size": 4, "num_train_epochs": 2.0, "seed": 5, "save_steps": 3}
    options |= {"save_total_limit": 0, "eval_steps": 2} | changes
    method, head, k, _ = build_method("sft")
    policy = build_policy(head, dtype=torch.float32, layers=1)
    settings = SftSettings(**options)
    folder.mkdir(parents=True, exist_ok=True)
    return TrainJob(
        models={"policy": policy},
        method=method,
        settings=settings,
        source=build_source(settings, build_groups(20, k=k), 1, method),
        held_out=build_groups(4, k=k, seed=9),
        trainable=trainable(policy),
        runtime=Runtime(torch.device("cpu")),
        stage_dir=folder,
        resume=resume,
        stamp={"run_id": run_id},
        label=label,
    )


def finish(job: TrainJob) -> tuple[str, bytes]:
    """Run a stage to its end: (SHA-256 over its parameters, metrics.jsonl)."""
    run_training(job)
    assert job.stage_dir is not None
    chain = hashlib.sha256()
    for name, parameter in sorted(job.trainable.items()):
        chain.update(name.encode() + parameter.detach().numpy().tobytes())
    return chain.hexdigest(), (job.stage_dir / "metrics.jsonl").read_bytes()


def copy_until(source: Path, target: Path, step: int) -> Path:
    """A copy of a finished stage's folder as a kill after the last step would have left it: without later saves."""
    shutil.copytree(source, target)
    for place in target.glob("checkpoint-*"):
        if int(place.name.rpartition("-")[2]) > step:
            shutil.rmtree(place)
    return target


def read_tree(folder: Path, *, leave: tuple[str, ...] = ()) -> dict[str, bytes]:
    """name → content of every file below a folder."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in leave)
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


@contextmanager
def fault(spec: str) -> Iterator[None]:
    """Arm one fault for the length of the block."""
    before = faults._SPEC, faults._ACTIVE
    faults._SPEC, faults._ACTIVE = spec, True
    faults._SEEN.clear()
    try:
        yield
    finally:
        faults._SPEC, faults._ACTIVE = before
        faults._SEEN.clear()

"""Sealed checkpoints of a TrainState: written whole or not at all, checked before use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from burnish.artifacts.checkpoints import (
    CheckpointRef,
    checkpoint_writer,
    hold_checkpoint,
    newest_valid,
    prune,
    verify_checkpoint,
)
from burnish.engine.parallel.interface import Parallel
from burnish.engine.state import TrainState
from burnish.errors import ResourceError
from burnish.track.metrics import MetricsLog


def save_checkpoint(
    stage_dir: Path, state: TrainState, meta: Mapping[str, Any], logs: Sequence[MetricsLog], parallel: Parallel
) -> Path:
    """Write `checkpoint-<step>` into the stage's folder; every rank must come here. Rank 0 seals what all have written.

    Args:
        meta: Goes into the manifest beside the step (stage key, base fingerprint, threads, ranks).
        logs: Their last bytes go into the checkpoint, so that a resume can mend logs that lost them.

    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """
    model, moments, values = state.to_tree()
    tensors = {"model": model, "optimizer": moments}
    if not parallel.runtime.is_main:
        parallel.save_tensors(tensors, None)
    else:
        size = sum(t.numel() * t.element_size() for tree in (model, moments) for t in tree.values())
        with checkpoint_writer(stage_dir, state.counters.step, meta=dict(meta), expected=size) as writer:
            parallel.save_tensors(tensors, writer.folder)
            writer.write_json("state.json", values)
            for file in logs:
                writer.write_bytes(tail_name(file), file.tail())
    return stage_dir / f"checkpoint-{state.counters.step}"


def tail_name(log: MetricsLog) -> str:
    """The name, within a checkpoint, of the last bytes of a log."""
    return f"{log.path.stem}.tail"


def restore_log(checkpoint: Path, log: MetricsLog, mark: int, say: Callable[[str], None]) -> None:
    """Let a log end where it ended when the checkpoint was made: later rows go, lost or damaged ones come back."""
    tail = checkpoint / tail_name(log)
    note = log.cut_back(mark, tail.read_bytes() if tail.exists() else b"")
    if note:
        say(note)


def load_checkpoint(path: Path, state: TrainState, parallel: Parallel) -> None:
    """Restore the state from a sealed checkpoint whose hashes were checked; every rank must come here.

    It may be of another strategy or another number of ranks: parameters and moments are the same to the bit.

    Raises:
        ResourceError: The checkpoint does not fit the stage.
    """
    try:
        with hold_checkpoint(path):
            values = json.loads((path / "state.json").read_text())
            tensors = parallel.load_tensors(path, state.trainable)
        model = {n: t for n, t in tensors.items() if n.startswith(("parameter/", "buffer/"))}
        state.load_tree(model, {n: t for n, t in tensors.items() if n not in model}, values)
    except (KeyError, TypeError, ValueError) as error:
        raise ResourceError(
            f"the checkpoint does not fit this stage: {error}",
            where=str(path),
            remedy="resume with the version and settings it was made with, or start over with --fresh",
        ) from error


def load_parameters(path: Path, trainable: Mapping[str, torch.nn.Parameter], parallel: Parallel) -> None:
    """Only the parameters of a checkpoint: the result of a stage that keeps its best; every rank must come here."""
    with hold_checkpoint(path):
        verify_checkpoint(path)
        tensors = parallel.load_tensors(path, trainable, only="parameter/")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"parameter/{name}"])


def find_resumable(stage_dir: Path, say: Callable[[str], None], *, run_id: str | None = None) -> CheckpointRef | None:
    """The newest checkpoint whose manifest and hashes hold; each damaged one on the way is named.

    Args:
        run_id: Checkpoints of other runs are not used.

    Raises:
        ResourceError: There are checkpoints and none is whole: never a silent fresh start.
    """
    found, problems = newest_valid(stage_dir, run_id=run_id)
    for problem in problems:
        say(problem)
    if found is None and problems:
        raise ResourceError(
            f"checkpoints are here and every one is damaged or of another run: {problems[0]}",
            where=str(stage_dir),
            remedy="restore one from a backup, or start over with --fresh",
        )
    return found


def prune_checkpoints(stage_dir: Path, keep: int, *, best: int | None, newest: int, run_id: str | None = None) -> None:
    """Remove old checkpoints by their manifests' steps; the newest (just sealed), the best and pinned ones stay."""
    prune(stage_dir, keep, {best} if best is not None else set(), run_id=run_id, known_good=newest)

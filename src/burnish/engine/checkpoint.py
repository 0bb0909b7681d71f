"""Sealed checkpoints of a TrainState: written whole or not at all, checked before use."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from burnish.artifacts.checkpoints import CheckpointRef, newest_valid, prune
from burnish.artifacts.folder import FolderWriter, verify_folder
from burnish.engine.state import TrainState
from burnish.errors import ResourceError

KIND = "checkpoint"


def _contiguous(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors ready for safetensors: on the CPU, contiguous, sharing no storage with one another."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        out[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    return out


def save_checkpoint(stage_dir: Path, state: TrainState, meta: Mapping[str, Any]) -> Path:
    """Write `checkpoint-<step>` into the stage's folder; called on one rank.

    Args:
        meta: Goes into the manifest beside the step (stage key, base fingerprint, threads, ranks).

    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """
    model, moments, values = state.to_tree()
    step = state.counters.step
    final = stage_dir / f"checkpoint-{step}"
    with FolderWriter(final, kind=KIND, meta={**meta, "step": step}) as writer:
        save_file(_contiguous(model), writer.path("model.safetensors"))
        save_file(_contiguous(moments), writer.path("optimizer.safetensors"))
        writer.write_json("state.json", values)
    return final


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file."""
    with safe_open(str(path), framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def load_checkpoint(path: Path, state: TrainState) -> None:
    """Restore the state from a sealed checkpoint, after its hashes were checked.

    Raises:
        ResourceError: The checkpoint is damaged or does not fit the stage.
    """
    verify_folder(path)
    try:
        values = json.loads((path / "state.json").read_text())
        state.load_tree(load_tensors(path / "model.safetensors"), load_tensors(path / "optimizer.safetensors"), values)
    except (KeyError, TypeError, ValueError) as error:
        raise ResourceError(
            f"the checkpoint does not fit this stage: {error}", where=str(path),
            remedy="resume with the version and settings it was made with, or start over with --fresh",
        ) from error  # fmt: skip


def load_parameters(path: Path, trainable: Mapping[str, torch.nn.Parameter]) -> None:
    """Only the parameters of a checkpoint: the result of a stage that keeps its best."""
    verify_folder(path)
    tensors = load_tensors(path / "model.safetensors")
    with torch.no_grad():
        for name, parameter in trainable.items():
            parameter.copy_(tensors[f"parameter/{name}"])


def find_resumable(stage_dir: Path, say: Callable[[str], None]) -> CheckpointRef | None:
    """The newest checkpoint whose manifest and hashes hold; each damaged one on the way is named."""
    found, problems = newest_valid(stage_dir)
    for problem in problems:
        say(problem)
    return found


def prune_checkpoints(stage_dir: Path, keep: int, best: int | None) -> None:
    """Remove old checkpoints by their manifests' steps; the newest, the best and pinned ones stay."""
    if keep > 0:
        prune(stage_dir, keep, {best} if best is not None else set())

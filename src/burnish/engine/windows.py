"""Windows on the disk: committed whole before the first step that reads them, found again after a kill."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load as load_arrays
from safetensors.numpy import save as save_arrays
from torch import Tensor

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.artifacts.folder import DamagedFolder, FolderWriter, verify_folder
from burnish.core.group import Completion, Group
from burnish.engine.source import Window
from burnish.engine.state import TrainState
from burnish.errors import ResourceError
from burnish.faults import fault_point

log = logging.getLogger("burnish")

KIND = "window"
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compute_window_key(stage_key: str, step: int, state: TrainState, digest: str) -> str:
    """What a window depends on, in one hash: the stage with its prompts and seed, the step, and the models.

    Args:
        stage_key: Hash of the stage's settings and inputs.
        digest: `digest_parameters` of all ranks.
    """
    c = state.counters
    parts = [stage_key, step, c.updates, c.ledger, state.method, digest]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def digest_parameters(parameters: Iterable[Tensor]) -> str:
    """A hash that changes when a bit of a parameter does; the sums are made on the device and read with one wait."""
    sums = []
    for p in parameters:
        local: Any = p.detach()
        local = local.to_local() if hasattr(local, "to_local") else local
        sums.append(local.contiguous().view(_BITS[local.element_size()]).sum(dtype=torch.int64))
    return hashlib.sha256(repr(torch.stack(sums).tolist() if sums else []).encode()).hexdigest()


def window_folder(stage_dir: Path, first: int) -> Path:
    """Where the window lies whose first step is `first`."""
    return stage_dir / "windows" / f"window-{first}"


def commit_window(stage_dir: Path, window: Window, key: str) -> None:
    """Write a window; it is there whole, or not at all.

    Raises:
        ResourceError: The disk is full or the folder cannot be written.
    """
    folder = window_folder(stage_dir, window.first)
    folder.parent.mkdir(parents=True, exist_ok=True)
    arrays, fields = pack_groups(window.groups)
    with FolderWriter(folder, kind=KIND, meta={"key": key, "first": window.first, "last": window.last}) as writer:
        writer.write_bytes("groups.safetensors", save_arrays(arrays))
        writer.write_json("groups.json", {**fields, "meta": window.meta})
    fault_point("window.committed")


def load_window(stage_dir: Path, first: int, key: str) -> Window | None:
    """The committed window that begins with step `first`, if there is one with this key and it is undamaged."""
    folder = window_folder(stage_dir, first)
    if not folder.is_dir():
        return None
    try:
        manifest = verify_folder(folder)
    except DamagedFolder as damage:
        log.warning("%s; the window is made again", damage)
        return None
    if manifest.meta.get("key") != key:
        return None
    fields = json.loads((folder / "groups.json").read_text())
    groups = unpack_groups(load_arrays((folder / "groups.safetensors").read_bytes()), fields)
    return Window(first, int(manifest.meta["last"]), groups, fields["meta"])


def restore_window(stage_dir: Path, reference: Mapping[str, Any]) -> Window:
    """The window in which a checkpoint was made.

    Args:
        reference: `TrainState.window`.

    Raises:
        ResourceError: It is gone or damaged: the models have moved since, so it cannot be made again.
    """
    found = load_window(stage_dir, int(reference["first"]), str(reference["key"]))
    if found is None:
        raise ResourceError(
            f"the window of samples that the checkpoint stands in is gone or damaged: steps {reference['first'] + 1} to "
            f"{reference['last'] + 1}",
            where=str(window_folder(stage_dir, int(reference["first"]))),
            remedy="resume from a checkpoint before it (--resume_from), or start over with --fresh",
        )
    return found


def prune_windows(stage_dir: Path) -> None:
    """Remove windows that end before the oldest checkpoint: no resume can read them."""
    steps = [ref.step for ref in list_checkpoints(stage_dir)]
    if not steps:
        return
    for folder in (stage_dir / "windows").glob("window-*"):
        try:
            last = int(verify_folder(folder, sizes_only=True).meta["last"])
        except DamagedFolder:
            continue  # it is being written, or will be named when it is needed
        if last < min(steps):
            shutil.rmtree(folder, ignore_errors=True)


def pack_groups(groups: Sequence[Group]) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Groups as flat arrays and JSON values.

    Raises:
        ValueError: Groups or completions with columns of different names.
    """
    completions = [c for group in groups for c in group.completions]
    arrays = {
        "prompt": _flatten([g.prompt for g in groups], np.int32),
        "prompt_length": np.asarray([len(g.prompt) for g in groups], np.int64),
        "completions": np.asarray([len(g.completions) for g in groups], np.int64),
        "ids": _flatten([c.ids for c in completions], np.int32),
        "mask": _flatten([c.mask for c in completions], np.bool_),
        "length": np.asarray([len(c.ids) for c in completions], np.int64),
    }
    for name in _shared_names([g.columns for g in groups]):
        arrays[f"group/{name}"] = np.asarray([g.columns[name] for g in groups], np.float64)
    for name in _shared_names([c.columns for c in completions]):
        arrays[f"completion/{name}"] = np.asarray([c.columns[name] for c in completions], np.float64)
    for name in _shared_names([c.token_columns for c in completions]):
        values = [c.token_columns[name] for c in completions]
        arrays[f"token/{name}"] = _flatten(values, values[0].dtype)
    return arrays, {"ids": [g.id for g in groups], "tags": [dict(g.tags) for g in groups]}


def unpack_groups(arrays: Mapping[str, np.ndarray], fields: Mapping[str, Any]) -> tuple[Group, ...]:
    """The inverse of `pack_groups`."""
    prompts = _split(arrays["prompt"], arrays["prompt_length"])
    lengths = arrays["length"]
    ids, masks = _split(arrays["ids"], lengths), _split(arrays["mask"], lengths)
    tokens = {n.partition("/")[2]: _split(v, lengths) for n, v in arrays.items() if n.startswith("token/")}
    numbers = {n.partition("/")[2]: v for n, v in arrays.items() if n.startswith("completion/")}
    of_group = {n.partition("/")[2]: v for n, v in arrays.items() if n.startswith("group/")}
    groups, start = [], 0
    for g, count in enumerate(arrays["completions"].tolist()):
        completions = tuple(
            Completion(
                ids[c],
                masks[c],
                {name: float(values[c]) for name, values in numbers.items()},
                {name: values[c] for name, values in tokens.items()},
            )
            for c in range(start, start + count)
        )
        start += count
        columns = {name: float(values[g]) for name, values in of_group.items()}
        groups.append(Group(fields["ids"][g], prompts[g], completions, columns, fields["tags"][g]))
    return tuple(groups)


def _flatten(parts: Sequence[np.ndarray], dtype: Any) -> np.ndarray:
    return np.concatenate([np.asarray(p, dtype) for p in parts]) if parts else np.zeros(0, dtype)


def _split(flat: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []


def _shared_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    names = set(rows[0]) if rows else set()
    if any(set(row) != names for row in rows):
        raise ValueError("the groups of a window must have columns of the same names")
    return sorted(names)

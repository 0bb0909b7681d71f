"""Tensors of a checkpoint in safetensors files: whole ones, or the shards of several ranks; never a pickle.

Shards are written and read by torch.distributed.checkpoint, which notes in each file where its parts belong, so that any number
of ranks can read what any other number has written.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from burnish.engine.runtime import peers

SHARDS = "shard-*.safetensors"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write whole tensors: on the CPU, contiguous, sharing no storage with one another."""
    out: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        pointer = value.untyped_storage().data_ptr()
        out[name] = value.clone() if pointer in seen else value
        seen.add(pointer)
    save_file(out, path)


def read_tensors(folder: Path, only: str = "") -> dict[str, Tensor]:
    """All tensors of a checkpoint whose names begin with `only`, whole, whichever way they were written."""
    if any(folder.glob(SHARDS)):
        found = {
            name: torch.empty(shape, dtype=dtype) for name, (shape, dtype) in describe_tensors(folder, only).items()
        }
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "torch.distributed is unavailable": this process reads alone
            load(_as_state(found), storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
        return found
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(str(file), framework="pt") as source:
            tensors |= {name: source.get_tensor(name) for name in source.keys() if name.startswith(only)}  # noqa: SIM118
    return tensors


def describe_tensors(folder: Path, only: str = "") -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Name → whole shape and type of the tensors of a checkpoint."""
    known: Any = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    return {name: (m.size, m.properties.dtype) for name, m in known.items() if name.startswith(only)}


def write_shards(folder: Path, tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Each rank writes its part of the tensors into a file of its own; those that are whole on all ranks, one rank writes.

    Raises:
        OSError, and whatever else kept a rank from writing, on every rank.
    """
    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    with peers(), _own_error():
        save(_as_state(tensors), storage_writer=writer, process_group=group)


def read_shards(folder: Path, into: Mapping[str, Tensor], group: dist.ProcessGroup | None) -> None:
    """Fill tensors, sharded or whole, from the files of a checkpoint; each rank reads its own rows only.

    Raises:
        OSError, and whatever else kept a rank from reading, on every rank.
    """
    reader = HuggingFaceStorageReader(str(folder))
    with peers(), _own_error():
        load(_as_state(into), storage_reader=reader, process_group=group)


def _as_state(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return dict(tensors)


class _own_error:
    """torch.distributed.checkpoint wraps what went wrong on any rank: raise the first of these errors itself."""

    def __enter__(self) -> None: ...

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, CheckpointException) and error.failures:
            first: Any = next(iter(error.failures.values()))[0]
            if isinstance(first, Exception):
                raise first from error

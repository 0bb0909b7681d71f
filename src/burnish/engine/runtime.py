"""Processes and devices: the one door to accelerate.

One process needs nothing of it. Several processes (torchrun, accelerate launch, `burnish --num-processes`) hold equal
copies of the state; gradients are gathered and added in rank order, so that the sum does not depend on timing.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.core.allocator import keep_freed_memory, release_freed_memory
from burnish.engine.determinism import prepare_cublas
from burnish.errors import ConfigError, PeerLost, is_out_of_memory
from burnish.track.whereabouts import TIMEOUT_VARIABLE, here, read_timeout

log = logging.getLogger("burnish")

_BUCKET = 1 << 25  # elements reduced at a time: 128 MB in fp32


class Runtime:
    """The ranks of a run and the device of this one.

    Attributes:
        rank, world: This process and how many there are.
        device: Where this rank computes.
    """

    def __init__(self, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.device, self.rank, self.world = device, rank, world

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and speaks."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            with peers():
                dist.barrier()

    def gather(self, value: Any) -> list[Any]:
        """The picklable `value` of every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        with peers():
            dist.all_gather_object(out, value)
        return out

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return any(self.gather(bool(flag))) if self.world > 1 else flag

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its sum over ranks, added in rank order (bit-equal on all ranks)."""
        if self.world == 1:
            return
        used = [any(flags) for flags in zip(*self.gather([p.grad is not None for p in parameters]), strict=True)]
        parameters = [p for p, has in zip(parameters, used, strict=True) if has]
        for p in parameters:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        for bucket in _buckets(parameters):
            flat = torch.cat([p.grad.reshape(-1) for p in bucket if p.grad is not None])
            every = [torch.empty_like(flat) for _ in range(self.world)]
            with peers():
                dist.all_gather(every, flat)
            total = every[0]
            for other in every[1:]:
                total += other
            offset = 0
            for p in bucket:
                assert p.grad is not None
                p.grad.copy_(total[offset : offset + p.numel()].view_as(p))
                offset += p.numel()

    def sum_numbers(self, rows: dict[str, float]) -> dict[str, float]:
        """Named numbers added over ranks in rank order; names may differ between ranks."""
        if self.world == 1:
            return rows
        total: dict[str, float] = {}
        for part in self.gather(rows):
            for name, value in part.items():
                total[name] = total.get(name, 0.0) + value
        return total

    def close(self) -> None:
        """Leave the process group; hand free memory back to the system."""
        if self.device.type == "cpu":
            release_freed_memory()
        if self.world > 1 and dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.barrier()  # a rank that leaves early would cut the connections of the others
            dist.destroy_process_group()


@contextmanager
def peers() -> Iterator[None]:
    """Around a collective: another process that is gone or silent is an error with a remedy.

    Raises:
        PeerLost: The connection broke, or nothing came within the time limit.
    """
    try:
        yield
    except RuntimeError as error:  # gloo and NCCL raise this class or one below it
        if is_out_of_memory(error):
            raise
        raise PeerLost(
            f"another process of this run is gone or did not answer: {str(error).splitlines()[0][:200]}",
            where=str(here()),
            remedy="give the same command again: the run goes on from its last checkpoint; "
            f"a slow machine may need {TIMEOUT_VARIABLE} (seconds) to be more than {read_timeout():g}",
        ) from error


def _buckets(parameters: Iterable[Tensor]) -> Iterable[list[Tensor]]:
    """Parameters of one type in runs of at most `_BUCKET` elements."""
    bucket: list[Tensor] = []
    size = 0
    for p in parameters:
        if bucket and (size + p.numel() > _BUCKET or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket


def build_runtime(devices: Sequence[int] | None = None) -> Runtime:
    """Join the process group that the launcher's environment describes, if any, and choose this rank's device.

    Args:
        devices: CUDA devices to use, one for each process on this machine; None: device 0, or the launcher's choice.

    Raises:
        ConfigError: There are fewer devices than processes, or no such device.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and os.environ.get("BURNISH_DEVICE") != "cpu"
    if devices and not cuda:
        log.warning("devices: %s is set, but there is no CUDA device here; computing on the CPU", devices)
    if cuda:
        prepare_cublas()
    chosen = _choose_device(devices, cuda)
    if not cuda:
        keep_freed_memory()
    if world > 1:
        from accelerate import PartialState

        state = PartialState(cpu=not cuda, timeout=timedelta(seconds=read_timeout()))
        device = chosen or torch.device(state.device or "cpu")
        return Runtime(device, state.process_index, state.num_processes)
    return Runtime(chosen or torch.device("cuda", 0) if cuda else torch.device("cpu"))


def _choose_device(devices: Sequence[int] | None, cuda: bool) -> torch.device | None:
    if not devices or not cuda:
        return None
    local = int(os.environ.get("LOCAL_RANK", "0"))
    known = torch.cuda.device_count()
    wrong = [d for d in devices if not 0 <= d < known]
    if wrong or local >= len(devices):
        raise ConfigError(
            f"devices: {list(devices)} does not fit: {known} devices here, process {local} on this machine needs one",
            where="devices",
            remedy=f"name one of 0 … {known - 1} for each process",
        )
    torch.cuda.set_device(devices[local])
    return torch.device("cuda", devices[local])

"""Processes and devices: which rank this process is, where it computes, and how ranks tell one another numbers.

One process needs nothing of it. Several processes (`burnish --num-processes`, torchrun, accelerate launch) find each other by the
environment variables that all launchers set. What they tell one another here travels on a CPU group and never holds tensors of a
device; parameters and gradients are the business of `engine.parallel`.
"""

from __future__ import annotations

import io
import logging
import os
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from burnish.core.allocator import keep_freed_memory, release_freed_memory
from burnish.engine.determinism import prepare_cublas
from burnish.errors import BurnishError, ConfigError, PeerLost, is_out_of_memory
from burnish.track.whereabouts import TIMEOUT_VARIABLE, here, read_timeout

log = logging.getLogger("burnish")

T = TypeVar("T")


class Runtime:
    """The ranks of a run and the device of this one.

    Args:
        device: Where this rank computes.
        rank, world: This process and how many there are.
        control: The CPU group of the ranks; None: the default group, which then must be one of the CPU.
    """

    def __init__(
        self, device: torch.device, rank: int = 0, world: int = 1, control: dist.ProcessGroup | None = None
    ) -> None:
        self.device, self.rank, self.world, self.control = device, rank, world, control

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and log lines."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.world > 1:
            with peers():
                dist.barrier(group=self.control)

    def gather(self, value: T) -> list[T]:
        """The picklable `value` of every rank, in rank order, on every rank.

        Raises:
            TypeError: It holds a tensor that is not on the CPU.
        """
        if self.world == 1:
            return [value]
        with peers():
            own = _pack(value)
            lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world)]
            dist.all_gather(lengths, torch.tensor([own.numel()]), group=self.control)
            longest = max(int(n) for n in lengths)
            parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world)]
            dist.all_gather(parts, torch.nn.functional.pad(own, (0, longest - own.numel())), group=self.control)
        return [
            value if rank == self.rank else _unpack(part[: int(n)])
            for rank, (part, n) in enumerate(zip(parts, lengths, strict=True))
        ]

    def run_on_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on rank 0, on every rank; its own error is raised on all.

        Raises:
            BurnishError: As `make` raised it.
        """
        if self.world == 1:
            return make()
        found: Any = None
        if self.is_main:
            try:
                found = make()
            except BurnishError as error:
                found = error
        size = torch.zeros(1, dtype=torch.int64)
        data = torch.empty(0, dtype=torch.uint8)
        with peers():
            if self.is_main:
                data = _pack(found)
                size[0] = data.numel()
            dist.broadcast(size, src=0, group=self.control)
            if not self.is_main:
                data = torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, src=0, group=self.control)
        found = found if self.is_main else _unpack(data)
        if isinstance(found, BurnishError):
            raise found
        return found

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank."""
        return self.any_of([flag])[0]

    def any_of(self, flags: Sequence[bool]) -> list[bool]:
        """For each flag whether it is set on any rank; every rank must give equally many."""
        if self.world == 1:
            return list(flags)
        found = torch.tensor(flags, dtype=torch.uint8)
        with peers():
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.control)
        return [bool(flag) for flag in found.tolist()]

    def close(self) -> None:
        """Leave the process group; hand free memory back to the system."""
        if self.device.type == "cpu":
            release_freed_memory()
        if self.world > 1 and dist.is_initialized():
            if sys.exc_info()[0] is None:
                dist.barrier(group=self.control)  # a rank that leaves early would cut the connections of the others
            dist.destroy_process_group()


class _Pickler(pickle.Pickler):
    """Pickles CPU tensors as bytes; a tensor of a device is a mistake: it would arrive on the sender's device."""

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, Tensor) or type(obj) is not Tensor:
            return NotImplemented
        if obj.device.type != "cpu":
            raise TypeError(f"a tensor on {obj.device} in what ranks tell one another; move it to the CPU first")
        flat = obj.detach().contiguous().reshape(-1).view(torch.uint8)
        return _build_tensor, (flat.numpy().tobytes(), obj.dtype, tuple(obj.shape))


def _build_tensor(data: bytes, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(dtype).reshape(shape)


def _pack(value: Any) -> Tensor:
    out = io.BytesIO()
    _Pickler(out, protocol=pickle.HIGHEST_PROTOCOL).dump(value)
    return torch.frombuffer(bytearray(out.getbuffer()), dtype=torch.uint8)


def _unpack(data: Tensor) -> Any:
    return pickle.loads(data.numpy().tobytes())


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


def build_runtime(devices: Sequence[int] | None = None) -> Runtime:
    """Join the process group that the launcher's environment describes, if any, and choose this rank's device.

    Args:
        devices: CUDA devices to use, one for each process on this machine; None: as many as there are processes, from 0.

    Raises:
        ConfigError: There are fewer devices than processes, no such device, or the environment describes no group.
        PeerLost: The other processes did not come.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    cuda = torch.cuda.is_available() and os.environ.get("BURNISH_DEVICE") != "cpu"
    if devices and not cuda:
        log.warning("devices: %s is set, but there is no CUDA device here; computing on the CPU", devices)
    if cuda:
        prepare_cublas()
    device = _choose_device(devices) if cuda else torch.device("cpu")
    if not cuda:
        keep_freed_memory()
    if world == 1:
        if cuda and devices:
            torch.cuda.set_device(device)
        return Runtime(device)
    control = _join_group(cuda)
    if cuda:
        torch.cuda.set_device(device)
    return Runtime(device, dist.get_rank(), dist.get_world_size(), control)


def _join_group(cuda: bool) -> dist.ProcessGroup | None:
    """Join the default group, on the device's backend; returns the CPU group where that is another one."""
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if missing:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but {missing[0]} is not set",
            where="environment",
            remedy="start the processes with --num-processes, torchrun or accelerate launch, or unset WORLD_SIZE",
        )
    limit = timedelta(seconds=read_timeout())
    with peers():
        dist.init_process_group("nccl" if cuda else "gloo", timeout=limit)
        group: Any = dist.new_group(backend="gloo", timeout=limit) if cuda else None
        return group


def _choose_device(devices: Sequence[int] | None) -> torch.device:
    """The CUDA device of this process: its own of those named, or of those there are."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    known = torch.cuda.device_count()
    chosen = list(devices) if devices else list(range(known))
    if any(not 0 <= d < known for d in chosen) or local >= len(chosen):
        raise ConfigError(
            f"devices: {chosen} does not fit: {known} devices here, process {local} on this machine needs one",
            where="devices",
            remedy=f"name one of 0 … {known - 1} for each process, or start fewer processes",
        )
    return torch.device("cuda", chosen[local])

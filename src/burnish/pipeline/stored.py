"""Numbers computed before training, each process a share of them, and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol, TypeVar

from burnish.core.group import Group
from burnish.engine.runtime import Runtime
from burnish.errors import BurnishError
from burnish.models.stored import plan_batches
from burnish.track.progress import Progress

T = TypeVar("T")
OnBatch = Callable[[int, int], None]


class Cache(Protocol[T]):
    """One entry a group, on disk."""

    @property
    def path(self) -> Path: ...

    def load(self, groups: Sequence[Group]) -> list[T] | None: ...

    def save(self, groups: Sequence[Group], table: list[T]) -> None: ...


def load_or_compute(
    cache: Cache[T],
    groups: Sequence[Group],
    compute: Callable[[list[Group], OnBatch, int], list[T]],
    runtime: Runtime,
    *,
    budget: int,
    label: str,
) -> list[T]:
    """One entry a group: from the cache, else computed by all processes and stored by the first; equal on all of them.

    Args:
        compute: (groups of this process, to be called with (groups done, all), forwards at least) → their entries.
        budget: Tokens in one forward at most.
        label: What is computed, for the bar and messages.

    Raises:
        BurnishError: The cache vanished between two looks.
    """
    found = runtime.gather(cache.load(groups) is not None if runtime.is_main else None)[0]
    if found:
        table = cache.load(groups)
        if table is None:
            raise BurnishError(f"the cached {label} vanished", where=str(cache.path), remedy="give the command again")
        return table
    shares = [list(groups[rank :: runtime.world]) for rank in range(runtime.world)]
    forwards = max(len(plan_batches(share, budget)) for share in shares)  # a sharded model needs all ranks in each
    own = shares[runtime.rank]
    with Progress(label, len(own), quiet=not runtime.is_main) as progress:
        mine = compute(own, lambda done, total: progress.advance({}, steps=done - progress.done), forwards)
    every = runtime.gather(mine)
    table = [every[i % runtime.world][i // runtime.world] for i in range(len(groups))]
    if runtime.is_main:
        cache.save(groups, table)
    return table

"""Which examples an optimizer step trains on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from burnish.core.group import Group
from burnish.engine.streams import build_numpy_generator
from burnish.errors import DataError


@dataclass(frozen=True, slots=True)
class StepData:
    """The examples of one optimizer step, in data order."""

    groups: list[Group]
    epoch: int
    ends_epoch: bool


@dataclass(frozen=True, slots=True)
class Window:
    """What a source made with the models of one moment, for the steps `first` … `last` (0-based, both included).

    Attributes:
        groups: Whatever the steps of the window train on, in the source's own order.
        meta: Further facts; JSON values only.
    """

    first: int
    last: int
    groups: tuple[Group, ...]
    meta: dict[str, Any] = field(default_factory=dict)


class Source(Protocol):
    """Where a stage's examples come from; handed to the trainer.

    Attributes:
        total_steps: Optimizer steps of the stage.
        steps_per_epoch: Steps in a pass over the data.
        batch_size: Examples of a step over all ranks (the last of an epoch may have fewer).
        has_windows: `prepare` makes windows; False: the examples are there from the start.
    """

    total_steps: int
    steps_per_epoch: int
    batch_size: int
    has_windows: bool

    def ends_epoch(self, n: int) -> bool:
        """Whether step n (0-based) is the last of a pass over the data."""
        ...

    def prepare(self, n: int, models: Mapping[str, Any]) -> Window | None:
        """Make the window that begins with step n, by sampling from the models; None where step n needs no other.

        Called before step n on every rank, unless a window that was committed before a kill serves the step. A pure function
        of the models, the seed and n: made again, it is the same.
        """
        ...

    def use(self, window: Window) -> None:
        """Take the window that the next steps read: just made and committed, or restored."""
        ...

    def step(self, n: int) -> StepData:
        """The examples of step n (0-based), a pure function of n and the window in use."""
        ...


Change = Callable[[Sequence[Group]], Sequence[Group]]


class OfflineSource:
    """A fixed data set, permuted anew in each epoch: a pure function of (seed, step, ids of the data).

    Every example is used exactly once per epoch; the last step of an epoch may be smaller.

    Args:
        groups: All training examples.
        batch_size: Examples per optimizer step, over all ranks.
        epochs: Passes over the data; may be fractional (rounded up to whole steps).
        max_steps: Stop after so many steps; −1 = by epochs.
        seed: Seed of the permutations.
        shuffle: False keeps the file's order.
        arrange: What an epoch's examples, in their order, become (`Partners.arrange`); default: they stay as they are.
        complete: Attaches stored columns to arranged examples (reference log-probs); default: there are none.

    Raises:
        DataError: There is nothing to train on.
    """

    has_windows = False

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        batch_size: int,
        epochs: float,
        max_steps: int,
        seed: int,
        shuffle: bool,
        arrange: Change = list,
        complete: Change = list,
    ) -> None:
        if not groups:
            raise DataError(
                "no training example is left", remedy="see the data report above; raise max_length or fix the data"
            )
        self.groups = groups
        self.batch_size = batch_size
        self.seed = seed
        self.shuffle = shuffle
        self.steps_per_epoch = math.ceil(len(groups) / batch_size)
        self.total_steps = max_steps if max_steps >= 0 else math.ceil(self.steps_per_epoch * epochs - 1e-9)
        if self.total_steps < 1:
            raise DataError("the stage would do no step", remedy="raise max_steps or num_train_epochs")
        self.arrange, self.complete = arrange, complete
        self._arranged: tuple[int, Sequence[Group]] | None = None
        self._order: tuple[int, np.ndarray] | None = None

    def order(self, epoch: int) -> np.ndarray:
        """(n,) int64: the order of the examples in an epoch."""
        if self._order is None or self._order[0] != epoch:
            n = len(self.groups)
            order = build_numpy_generator(self.seed, "data", epoch, n).permutation(n) if self.shuffle else np.arange(n)
            self._order = (epoch, order)
        return self._order[1]

    def arranged(self, epoch: int) -> Sequence[Group]:
        """Those examples of an epoch that steps will read, in its order: all but at the end of a run."""
        whole = self.arrange([self.groups[i] for i in self.order(epoch)])
        return whole[: (self.total_steps - epoch * self.steps_per_epoch) * self.batch_size]

    def ends_epoch(self, n: int) -> bool:
        """Whether step n (0-based) is the last of an epoch."""
        return n % self.steps_per_epoch == self.steps_per_epoch - 1

    def prepare(self, n: int, models: Mapping[str, Any]) -> None:
        """Nothing is made while training."""

    def use(self, window: Window) -> None:
        """There are no windows.

        Raises:
            ValueError: Always.
        """
        raise ValueError("an offline source reads no window")

    def step(self, n: int) -> StepData:
        """The examples of step n (0-based)."""
        epoch, within = divmod(n, self.steps_per_epoch)
        if self._arranged is None or self._arranged[0] != epoch:
            self._arranged = (epoch, self.complete(self.arranged(epoch)))
        rows = self._arranged[1][within * self.batch_size : (within + 1) * self.batch_size]
        return StepData(list(rows), epoch, self.ends_epoch(n))


def extend_ledger(ledger: str, groups: Sequence[Group]) -> str:
    """The hash chain over all examples consumed so far: equal ledgers mean equal contents in equal order."""
    chain = hashlib.sha256(ledger.encode())
    for group in groups:
        for part in _contents(group):
            chain.update(len(part).to_bytes(8, "little"))
            chain.update(part)
    return chain.hexdigest()


def _contents(group: Group) -> Iterator[bytes]:
    """All that a step may read of a group, as bytes: ids of tokens, masks, numbers, names."""
    yield group.id.encode()
    yield np.ascontiguousarray(group.prompt, np.int32).tobytes()
    yield _numbers(group.columns)
    for c in group.completions:
        yield np.ascontiguousarray(c.ids, np.int32).tobytes()
        yield np.ascontiguousarray(c.mask, np.bool_).tobytes()
        yield _numbers(c.columns)
        for name, values in sorted(c.token_columns.items()):
            yield name.encode()
            yield np.ascontiguousarray(values, np.float64).tobytes()


def _numbers(columns: Mapping[str, float]) -> bytes:
    return repr([(name, float(value)) for name, value in sorted(columns.items())]).encode()

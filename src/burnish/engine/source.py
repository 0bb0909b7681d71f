"""Which examples an optimizer step trains on: a pure function of (seed, step, ids of the data)."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


Change = Callable[[Sequence[Group]], Sequence[Group]]


class OfflineSource:
    """A fixed data set, permuted anew in each epoch.

    Every example is used exactly once per epoch; the last step of an epoch may be smaller.

    Args:
        groups: All training examples.
        batch_size: Examples per optimizer step, over all ranks.
        epochs: Passes over the data; may be fractional (rounded up to whole steps).
        max_steps: Stop after so many steps; −1 = by epochs.
        seed: Seed of the permutations.
        shuffle: False keeps the file's order.
        arrange: What an epoch's examples, in their order, become (`Method.arrange`); default: they stay as they are.
        complete: Attaches stored columns to arranged examples (reference log-probs); default: there are none.

    Raises:
        DataError: There is nothing to train on.
    """

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

    def step(self, n: int) -> StepData:
        """The examples of step n (0-based)."""
        epoch, within = divmod(n, self.steps_per_epoch)
        if self._arranged is None or self._arranged[0] != epoch:
            self._arranged = (epoch, self.complete(self.arranged(epoch)))
        rows = self._arranged[1][within * self.batch_size : (within + 1) * self.batch_size]
        return StepData(list(rows), epoch, within == self.steps_per_epoch - 1)


def extend_ledger(ledger: str, groups: Sequence[Group]) -> str:
    """The hash chain over all examples consumed so far: equal ledgers mean equal data in equal order."""
    chain = hashlib.sha256(ledger.encode())
    for group in groups:
        chain.update(group.id.encode())
        chain.update(b"\0")
    return chain.hexdigest()

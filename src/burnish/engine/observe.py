"""What a method wants to know of each example of a step: gathered on the device, read with everything else at its end."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import Tensor

# of one rank: (position in the step, name) of each group; name → one number a group
Observations = tuple[list[tuple[int, str]], dict[str, list[float]]]


@dataclass(frozen=True, slots=True)
class Observed:
    """The examples of a whole step, in data order, on the host.

    Attributes:
        step: The step's number, from 1.
        ids: Names of the G groups.
        values: name → (G,) float64, as `Observer.observe` gave them.
        figures: The step's metrics.
    """

    step: int
    ids: tuple[str, ...]
    values: dict[str, np.ndarray]
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What a method says of a step after it.

    Attributes:
        figures: Further metrics.
        row: A line for the method's record; None = none.
        vectors: name → array, kept beside the record; usually none.
        warnings: kind → text; each kind is logged once.
    """

    figures: dict[str, float] = field(default_factory=dict)
    row: dict[str, Any] | None = None
    vectors: dict[str, np.ndarray] = field(default_factory=dict)
    warnings: dict[str, str] = field(default_factory=dict)


@dataclass
class Observation:
    """Collects `Observer.observe` over the micro-batches of this rank."""

    _ids: list[tuple[int, str]] = field(default_factory=list)
    _parts: list[dict[str, Tensor]] = field(default_factory=list)

    def add(self, positions: Sequence[int], ids: Sequence[str], values: Mapping[str, Tensor]) -> None:
        """A micro-batch: positions of its groups in the step, their names, and name → (G,)."""
        if ids:
            self._ids += zip(positions, ids, strict=True)
            self._parts.append({name: value.detach() for name, value in values.items()})

    def tensors(self) -> list[Tensor]:
        """All values, to be fetched together with what else the step reads."""
        return [part[name] for part in self._parts for name in sorted(part)]

    def read(self, numbers: Sequence[float]) -> Observations:
        """What this rank observed, given the fetched numbers of `tensors()`."""
        rest = iter(numbers)
        values: dict[str, list[float]] = {}
        for part in self._parts:
            for name in sorted(part):
                values.setdefault(name, []).extend(_take(rest, part[name].numel()))
        return self._ids, values

    @staticmethod
    def join(parts: Sequence[Observations]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
        """(names, values) of all ranks in data order."""
        places = [place for ids, _ in parts for place in ids]
        order = sorted(range(len(places)), key=lambda i: places[i])
        names = sorted({name for _, values in parts for name in values})
        joined = {n: np.asarray([v for _, values in parts for v in values.get(n, ())], np.float64) for n in names}
        return tuple(places[i][1] for i in order), {n: v[order] for n, v in joined.items()}


def _take(numbers: Iterator[float], count: int) -> list[float]:
    return [next(numbers) for _ in range(count)]

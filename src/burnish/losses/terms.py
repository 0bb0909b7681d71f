"""What a loss returns: named sums with their counts.

The engine divides once, by the count of the whole optimizer step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Unit = Literal["token", "pair", "sequence", "group"]


@dataclass(frozen=True, slots=True)
class Term:
    """One term of a loss.

    Attributes:
        name: Its name in the metrics, e.g. "dpo".
        sum: () tensor, at least fp32, the sum over what this micro-batch holds, with gradient.
        count: How many units the sum runs over; must equal what `Method.counts` announced for these groups.
        unit: What is counted.
        weight: Factor of the term in the total loss: loss = Σ weight · sum / (count of the whole step).
    """

    name: str
    sum: Tensor
    count: float
    unit: Unit
    weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Metric:
    """A figure to log: the engine adds up sums and counts over the step (and ranks) and logs sum / count.

    A count that only the device knows is a () tensor; the host fetches it together with the sums.
    """

    name: str
    sum: Tensor
    count: float | Tensor


@dataclass(frozen=True, slots=True)
class LossResult:
    """The terms of a loss and what is worth logging.

    A metric whose count over the whole step is 0 has no value: it is left out, never logged as 0.
    """

    terms: tuple[Term, ...]
    metrics: tuple[Metric, ...] = ()

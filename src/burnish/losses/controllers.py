"""How β moves while a stage trains: one interface for controllers and schedules, pure functions of margins and state.

A *unit* is what β is constant over: an optimizer step, or some consecutive pairs of it in data order; never a
micro-batch, whose size depends on memory. The margin of a pair is M = Δ, the difference of its log-ratios to the
reference, Σ_t (log π − log π_ref) of the chosen less that of the rejected completion, without β, over completion tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from burnish.config.dynamic_beta import ZERO_MARGIN, DynamicBetaSettings, find_contradictions
from burnish.config.registry import CONTROLLERS, load_object
from burnish.errors import ConfigError

State = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Unit:
    """What a controller sees of a unit of n pairs, in data order.

    Attributes:
        margins: (n,) float64, M of each pair, nats.
        ids: The pairs' names.
    """

    margins: np.ndarray
    ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Advance:
    """What a controller makes of a unit.

    Attributes:
        beta: β of the unit's pairs: one number, or (n,) float64.
        state: The state after the unit; JSON values.
        kept: (k,) int64, rising: the pairs that are trained on; None = all.
        figures: For the log; empty while nothing is measured (warm-up).
        held: The margins told nothing (all equal), so the controller stayed where it was.
    """

    beta: float | np.ndarray
    state: State
    kept: np.ndarray | None = None
    figures: dict[str, float] = field(default_factory=dict)
    held: bool = False


class Controller(Protocol):
    """A rule for β. Pure: equal margins and state give equal results, on every rank.

    Attributes:
        per_pair: `find_current` reads the margins.
    """

    per_pair: bool

    def initial_state(self) -> State:
        """State before the first unit; JSON values, with the β of the moment as "beta"."""
        ...

    def find_current(self, margins: np.ndarray | None, state: Mapping[str, Any]) -> float | np.ndarray:
        """β as the state stands, without moving: in evaluation, and for a step whose units do not look ahead.

        Args:
            margins: (n,) of the pairs, or None unless `per_pair`.
        """
        ...

    def advance(self, unit: Unit, state: Mapping[str, Any]) -> Advance:
        """β of a unit's pairs, and the state after it."""
        ...

    def describe(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state in short, for the margin records."""
        ...


class Constant:
    """β = β_0."""

    per_pair = False

    def __init__(self, beta: float, *, seed: int = 0) -> None:
        self.beta = beta

    def initial_state(self) -> State:
        return {"beta": self.beta}

    def find_current(self, margins: np.ndarray | None, state: Mapping[str, Any]) -> float:
        return state["beta"]

    def advance(self, unit: Unit, state: Mapping[str, Any]) -> Advance:
        return Advance(state["beta"], dict(state))

    def describe(self, state: Mapping[str, Any]) -> dict[str, Any]:
        return {"beta": state["beta"]}


class Linear(Constant):
    """β_t = β_0 + (β_end − β_0) · t/T: a straight line over the first T updates, then constant.

    Args:
        beta: β_0, of the first step.
        beta_end: β after T updates. steps: T.
    """

    def __init__(self, beta: float, *, beta_end: float, steps: int, seed: int = 0) -> None:
        super().__init__(beta)
        self.beta_end, self.steps = beta_end, steps

    def initial_state(self) -> State:
        return {"beta": self.beta, "units": 0}

    def advance(self, unit: Unit, state: Mapping[str, Any]) -> Advance:
        done = state["units"] + 1
        share = self.find_share(min(done / self.steps, 1.0))
        after = self.beta_end if share == 1.0 else self.beta + (self.beta_end - self.beta) * share
        return Advance(state["beta"], {"beta": after, "units": done})

    def find_share(self, time: float) -> float:
        """How much of the way is done at a time within [0, 1]."""
        return time


class Cosine(Linear):
    """β_t = β_end + (β_0 − β_end) · (1 + cos(π t/T))/2: half a cosine over the first T updates, then constant."""

    def find_share(self, time: float) -> float:
        return (1 - math.cos(math.pi * time)) / 2


@dataclass(frozen=True, slots=True)
class StepBetas:
    """What the units of a step give together.

    Attributes:
        beta: (n,) float64, β of each pair of the step.
        state: The state after the step.
        kept: (k,) int64 rows that are trained on; None = all.
        figures: Means over the units that measured something; "risk/tau" and the like of the last one.
        held: Units that held. units: How many units there were.
    """

    beta: np.ndarray
    state: State
    kept: np.ndarray | None
    figures: dict[str, float]
    held: int
    units: int


LAST = frozenset({"risk/tau", "beta_dpo/mean", "beta_dpo/std"})


def run_units(
    controller: Controller, size: int | None, margins: np.ndarray, ids: Sequence[str], state: Mapping[str, Any]
) -> StepBetas:
    """Pass the pairs of a step through a controller, unit by unit.

    Args:
        size: Pairs in a unit, the step's last one holding what is left; None: the step is one unit.
        margins: (n,) M of the step's pairs in data order.
        ids: Their names.
    """
    n = margins.shape[0]
    starts = range(0, n, size or max(n, 1))
    betas, kept, figures = [np.zeros(0)], [], {}
    held = 0
    now: State = dict(state)
    filters = False
    for start in starts:
        unit = Unit(margins[start : start + (size or n)], tuple(ids[start : start + (size or n)]))
        found = controller.advance(unit, now)
        length = unit.margins.shape[0]
        betas.append(np.broadcast_to(np.asarray(found.beta, np.float64), (length,)))
        rows = np.arange(length) if found.kept is None else found.kept
        filters |= found.kept is not None
        kept.append(rows + start)
        held += found.held
        for name, value in found.figures.items():
            figures.setdefault(name, []).append(value)
        now = found.state
    means = {name: values[-1] if name in LAST else float(np.mean(values)) for name, values in figures.items()}
    rows = np.concatenate(kept) if filters else None
    return StepBetas(np.concatenate(betas), now, rows, means, held, len(starts))


def are_equal(margins: np.ndarray) -> bool:
    """Whether margins tell nothing apart: all equal (to within what a cached reference keeps), or a single zero."""
    if margins.shape[0] < 2:
        return bool(np.all(np.abs(margins) < ZERO_MARGIN))
    return bool(margins.max() - margins.min() < 2 * ZERO_MARGIN)


def build_controller(settings: DynamicBetaSettings, beta: float, seed: int) -> Controller:
    """The controller that a stage's settings name.

    Args:
        beta: β_0. seed: Of the stage, for controllers that draw.

    Raises:
        ConfigError: The settings contradict each other.
    """
    for name, message, remedy in find_contradictions(settings, beta):
        raise ConfigError(f"{name} {message}", where=f"dynamic_beta.{name}", remedy=remedy)
    values = settings.resolve()
    values.pop("unit", None)
    return load_object(CONTROLLERS[settings.type])(beta, seed=seed, **values)

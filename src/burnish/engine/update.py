"""Applying a gradient: guard, clip, step. A non-finite gradient changes nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from burnish.config.train import TrainSettings
from burnish.engine.optimizer import compute_lr_factor
from burnish.engine.parallel.interface import Parallel
from burnish.engine.state import TrainState
from burnish.engine.step import Gradient
from burnish.faults import fault_point
from burnish.track.whereabouts import enter_phase

SCALE_FLOOR = 1.0
SCALE_GROWTH_INTERVAL = 2000


@dataclass
class Update:
    """What became of a gradient: applied, or why not."""

    applied: bool
    grad_norm: float
    learning_rate: float
    overflow: bool = False


def run_update(
    state: TrainState,
    parameters: Sequence[Tensor],
    settings: TrainSettings,
    total: int,
    gradient: Gradient,
    parallel: Parallel,
) -> Update:
    """Apply the gradients if they are finite; then, and only then, moments, schedule and controllers move.

    Args:
        total: All updates of the stage, for the schedule.
        gradient: What the step found: the norm and the method's proposed next state (None = unchanged).
        parallel: How the parameters lie over the ranks.
    """
    factor = compute_lr_factor(state.counters.updates, total, settings)
    rate = factor * settings.learning_rate
    if not math.isfinite(gradient.norm):
        overflow = state.scale is not None and state.scale > SCALE_FLOOR
        if overflow and state.scale is not None:
            state.scale = max(state.scale / 2, SCALE_FLOOR)
            state.counters.overflows += 1
        return Update(False, gradient.norm, rate, overflow)
    for group in state.optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    enter_phase("optimizer")
    fault_point("update.before_optimizer")
    clip = settings.max_grad_norm if gradient.norm > settings.max_grad_norm else 0.0
    parallel.clip_and_step(state.optimizer, parameters, clip, gradient.total_norm)
    fault_point("update.after_optimizer")
    state.counters.updates += 1
    if gradient.state is not None:
        state.method = dict(gradient.state)
    if state.scale is not None and state.counters.updates % SCALE_GROWTH_INTERVAL == 0:
        state.scale *= 2
    return Update(True, gradient.norm, rate)

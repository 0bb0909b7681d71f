"""Applying a gradient: unscale, guard, clip, step. A non-finite gradient changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from burnish.config.train import TrainSettings
from burnish.engine.optimizer import compute_lr_factor
from burnish.engine.state import TrainState
from burnish.faults import fault_point

SCALE_FLOOR = 1.0
SCALE_GROWTH_INTERVAL = 2000


@dataclass
class Update:
    """What became of a gradient: applied, or why not."""

    applied: bool
    grad_norm: float
    learning_rate: float
    overflow: bool = False


def compute_grad_norm(parameters: Sequence[Tensor]) -> Tensor:
    """() the L2 norm over all gradients."""
    return get_total_norm([p.grad for p in parameters if p.grad is not None])


def run_update(
    state: TrainState,
    parameters: Sequence[Tensor],
    settings: TrainSettings,
    total: int,
    method_state: Mapping[str, Any] | None,
) -> Update:
    """Apply the gradients if they are finite; then, and only then, moments, schedule and controllers move.

    Args:
        total: All updates of the stage, for the schedule.
        method_state: The method's proposed next state; None = unchanged.
    """
    factor = compute_lr_factor(state.counters.updates, total, settings)
    rate = factor * settings.learning_rate
    grads = [p.grad for p in parameters if p.grad is not None]
    if state.scale is not None and grads:
        for grad in grads:
            grad.mul_(1.0 / state.scale)
    norm = compute_grad_norm(parameters)
    if not bool(torch.isfinite(norm)):
        overflow = state.scale is not None and state.scale > SCALE_FLOOR
        if overflow and state.scale is not None:
            state.scale = max(state.scale / 2, SCALE_FLOOR)
            state.counters.overflows += 1
        return Update(False, float(norm), rate, overflow)
    if settings.max_grad_norm and bool(norm > settings.max_grad_norm):
        clip_grads_with_norm_(parameters, settings.max_grad_norm, norm)
    for group in state.optimizer.param_groups:
        group["lr"] = factor * group["peak_lr"]
    fault_point("update.before_optimizer")
    state.optimizer.step()
    fault_point("update.after_optimizer")
    state.counters.updates += 1
    if method_state is not None:
        state.method = dict(method_state)
    if state.scale is not None and state.counters.updates % SCALE_GROWTH_INTERVAL == 0:
        state.scale *= 2
    return Update(True, float(norm), rate)

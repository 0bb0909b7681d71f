"""Held-out figures by the method's own loss: exact sums, the same for every batch size and number of ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from burnish.core.batch import Table
from burnish.core.concat import concat_steps
from burnish.core.group import Group
from burnish.engine.plan import build_plan
from burnish.engine.step import Guard, StepContext, Sums, _attach_reference, _build, call_policy, compute_counts
from burnish.errors import NumericStop
from burnish.faults import fault_point
from burnish.losses.terms import LossResult
from burnish.track.whereabouts import enter_phase


class Module(Protocol):
    """A policy that can be switched between training and evaluation mode."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...


def run_evaluation(
    ctx: StepContext,
    groups: Sequence[Group],
    state: dict[str, Any],
    *,
    budget: int,
    cap: int | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """Figures over held-out groups, named "eval_<figure>"; with several sources also "eval_<figure>/<source>".

    The method's state is read, not moved: its losses get it with `frozen: True`.

    Args:
        groups: As `Method.arrange` gave them.
        chunk: A coupled loss is computed on so many groups at a time, in data order, and the chunks' sums are added up:
            the figures are those of training steps of this size, whatever the micro-batches. None = all at once.

    Raises:
        NumericStop: A held-out row gives a non-finite number; the rows are named, never dropped.
    """
    policy: Any = ctx.policy
    was_training = policy.training
    state = {**state, "frozen": True} if ctx.method.stateful else state
    policy.train(False)
    try:
        figures = {f"eval_{n}": v for n, v in _evaluate(ctx, groups, state, budget, cap, chunk).items()}
        sources: dict[str, list[Group]] = defaultdict(list)
        for group in groups:
            sources[group.tags.get("source", "")].append(group)
        if 1 < len(sources) <= 12:
            for source, rows in sorted(sources.items()):
                part = _evaluate(ctx, rows, state, budget, cap, chunk)
                figures |= {f"eval_{n}/{source}": v for n, v in part.items()}
    finally:
        policy.train(was_training)
    return figures


def _evaluate(
    ctx: StepContext, groups: Sequence[Group], state: dict[str, Any], budget: int, cap: int | None, chunk: int | None
) -> dict[str, float]:
    size = (chunk or len(groups)) if ctx.method.coupled else len(groups)
    sums = Sums()
    bad: list[str] = []
    with torch.no_grad():
        for start in range(0, len(groups), max(size, 1)):
            bad += _add_groups(ctx, groups[start : start + size], state, budget, cap, sums)
    bad = [row for part in ctx.runtime.gather(bad) for row in part]
    if bad:
        raise NumericStop(
            f"evaluation gives a non-finite number on {len(bad)} rows: {', '.join(bad[:5])}",
            where="held-out data",
            remedy="look at these rows with `burnish data show`; lower the learning rate or use precision fp32",
        )
    sums.reduce(ctx.runtime)
    return sums.figures(sums.announced if ctx.method.coupled else compute_counts(ctx.method, groups))


def _add_groups(
    ctx: StepContext, groups: Sequence[Group], state: dict[str, Any], budget: int, cap: int | None, sums: Sums
) -> list[str]:
    """Add the sums of some groups; returns the ids of those that gave a non-finite number on this rank."""
    bad: list[str] = []
    waiting: list[tuple[Table, dict[str, Tensor]]] = []
    plan = build_plan(groups, budget=budget, cap=cap, world=ctx.runtime.world, coupled=ctx.method.coupled)
    for micro in plan.of(ctx.runtime.rank):
        batch = _build(micro, groups, ctx.runtime.device)
        _attach_reference(ctx, batch)
        enter_phase("evaluate", batch.input_ids.numel(), batch.last_index.numel())
        fault_point("evaluation.forward")
        outputs = call_policy(ctx, batch)
        if micro.coupled:  # parts of a group that exceeds the budget, or of a loss that is no sum over groups
            waiting.append((batch.table, outputs.named()))
            continue
        result = ctx.method.compute_loss(outputs, batch.table, state)
        bad += _watch(result, [(batch.table, outputs.named())], sums)
    everything = [row for part in ctx.runtime.gather(waiting) for row in part if len(row[0].group_ids)]
    if everything and ctx.runtime.is_main:
        outputs, table = concat_steps([t for t, _ in everything], [o for _, o in everything])
        bad += _watch(ctx.method.compute_loss(outputs, table, state), everything, sums)
    return bad


def _watch(result: LossResult, rows: Sequence[tuple[Table, dict[str, Tensor]]], sums: Sums) -> list[str]:
    guard = Guard()
    guard.watch(torch.stack([t.sum for t in result.terms]).sum(), result, rows)
    sums.add(result)
    found, suspects = guard.name_rows(sums.fetch(guard.flags))
    return found or suspects

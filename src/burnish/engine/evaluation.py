"""Held-out figures by the method's own loss: exact sums, the same for every batch size and number of ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from burnish.core.concat import concat_steps
from burnish.core.group import Group
from burnish.engine.context import StepContext
from burnish.engine.coupled import Rows, gather_rows
from burnish.engine.forward import attach_reference, build_batch, call_models, has_stored_reference
from burnish.engine.plan import build_plan
from burnish.engine.step import compute_counts
from burnish.engine.sums import Guard, PendingSums, Sums
from burnish.errors import NumericStop
from burnish.faults import fault_point
from burnish.losses.terms import LossResult
from burnish.track.whereabouts import enter_phase

MOST_SOURCES = 12  # with more sources than this, figures are not split by source


def run_evaluation(
    ctx: StepContext,
    groups: Sequence[Group],
    state: Mapping[str, Any],
    *,
    budget: int,
    cap: int | None = None,
    chunk: int | None = None,
) -> dict[str, float]:
    """Figures over held-out groups, named "eval_<figure>"; with several sources also "eval_<figure>/<source>".

    The method's state is read, not moved.

    Args:
        groups: With their partners, where the method has such.
        chunk: A coupled loss is computed on so many groups at a time, in data order, and the chunks' sums are added up:
            the figures are those of training steps of this size, whatever the micro-batches. None = all at once.

    Raises:
        NumericStop: A held-out row gives a non-finite number; the rows are named, never dropped.
    """
    modes = {name: model.training for name, model in ctx.models.items()}
    ctx.train(False)
    try:
        figures = {f"eval_{n}": v for n, v in _evaluate(ctx, groups, state, budget, cap, chunk).items()}
        sources: dict[str, list[Group]] = defaultdict(list)
        for group in groups:
            sources[group.tags.get("source", "")].append(group)
        if 1 < len(sources) <= MOST_SOURCES:
            for source, rows in sorted(sources.items()):
                part = _evaluate(ctx, rows, state, budget, cap, chunk)
                figures |= {f"eval_{n}/{source}": v for n, v in part.items()}
    finally:
        for name, model in ctx.models.items():
            model.train(modes[name])
    return figures


def _evaluate(
    ctx: StepContext,
    groups: Sequence[Group],
    state: Mapping[str, Any],
    budget: int,
    cap: int | None,
    chunk: int | None,
) -> dict[str, float]:
    """Figures of some groups; the host waits for the device once, ranks exchange numbers once (coupled losses: and once a
    chunk)."""
    size = (chunk or len(groups)) if ctx.method.coupled else len(groups)
    pending, guard = PendingSums(), Guard()

    def add(result: LossResult, rows: Sequence[Rows]) -> None:
        guard.watch(torch.stack([t.sum for t in result.terms]).sum(), result, rows)
        pending.add(result)

    with torch.no_grad():
        for start in range(0, len(groups), max(size, 1)):
            _add_groups(ctx, groups[start : start + size], state, budget, cap, add)
    findings = guard.find(pending.fetch(guard.flags))
    parts = ctx.runtime.gather((pending.sums, findings.rows or findings.suspects))
    bad = [row for _, rows in parts for row in rows]
    if bad:
        raise NumericStop(
            f"evaluation gives a non-finite number on {len(bad)} rows: {', '.join(bad[:5])}",
            where="held-out data",
            remedy="look at these rows with `burnish data show`; lower the learning rate or use precision fp32",
        )
    sums = Sums.join(part for part, _ in parts)
    return sums.figures(sums.announced if ctx.method.coupled else compute_counts(ctx.method, groups))


def _add_groups(
    ctx: StepContext, groups: Sequence[Group], state: Mapping[str, Any], budget: int, cap: int | None, add: Any
) -> None:
    """Add the losses of this rank's share of some groups."""
    waiting: list[Rows] = []
    stored = has_stored_reference(groups)
    plan = build_plan(groups, budget=budget, cap=cap, world=ctx.runtime.world, coupled=ctx.method.coupled)
    mine = plan.of(ctx.runtime.rank)
    for micro in mine:
        batch = build_batch(micro, groups, ctx.runtime.device)
        attach_reference(ctx, batch, stored)
        enter_phase("evaluate", batch.input_ids.numel(), batch.last_index.numel())
        fault_point("evaluation.forward")
        outputs = call_models(ctx, batch)
        if micro.coupled:  # parts of a group that exceeds the budget, or of a loss that is no sum over groups
            waiting.append((batch.table, outputs.named()))
            continue
        result = ctx.method.compute_loss(outputs, batch.table, state, evaluating=True)
        add(result, [(batch.table, outputs.named())])
    if any(micro.coupled for micro in mine):
        rows = [row for part in gather_rows(ctx, waiting) for row in part if row[0].group_ids]
        if rows and ctx.runtime.is_main:
            outputs, table = concat_steps([t for t, _ in rows], [o for _, o in rows])
            add(ctx.method.compute_loss(outputs, table, state, evaluating=True), rows)

"""Losses that are no sum over groups: a step in two passes.

The first pass collects the outputs of all coupled micro-batches without gradient. The loss is computed once on all of them, in
data order, and differentiated to coefficients d loss / d outputs. The second pass forwards each micro-batch again and
back-propagates with its coefficients.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from burnish.core.batch import Outputs, PackedBatch, Table, move
from burnish.core.concat import concat_steps, is_per_token
from burnish.core.group import Group
from burnish.engine.context import StepContext, Stopped
from burnish.engine.forward import attach_reference, build_batch, read_generator, reseed, run_forward
from burnish.engine.plan import MicroBatch
from burnish.faults import fault_point
from burnish.track.whereabouts import enter_phase

Rows = tuple[Table, dict[str, Tensor]]  # of one micro-batch: what a loss reads


@dataclass
class FirstPass:
    """What the first pass of this rank's coupled micro-batches left.

    Attributes:
        batches: The micro-batches. outputs: By name; with a graph if `single`.
        leaves: The same outputs, detached: the loss is differentiated on these.
        drew: Whether a forward drew random numbers (dropout).
        single: One micro-batch on one rank: its forward kept the graph, and a second one is spared.
    """

    single: bool
    batches: list[PackedBatch] = field(default_factory=list)
    outputs: list[dict[str, Tensor]] = field(default_factory=list)
    leaves: list[dict[str, Tensor]] = field(default_factory=list)
    drew: list[bool] = field(default_factory=list)

    def rows(self) -> list[Rows]:
        """Tables and outputs, without gradient."""
        return [
            (batch.table, {n: t.detach() for n, t in outputs.items()})
            for batch, outputs in zip(self.batches, self.outputs, strict=True)
        ]


def run_first_pass(
    ctx: StepContext, groups: Sequence[Group], micros: Mapping[int, MicroBatch], step: int, stored: bool
) -> FirstPass:
    """Outputs of this rank's coupled micro-batches.

    Args:
        micros: Index within the rank's plan → micro-batch.
        stored: The examples carry their reference log-probs.

    Raises:
        Stopped: `ctx.should_stop()` became true between micro-batches.
    """
    first = FirstPass(single=len(micros) == 1 and ctx.runtime.world == 1)
    for index, micro in micros.items():
        if ctx.should_stop():
            raise Stopped
        batch = build_batch(micro, groups, ctx.runtime.device)
        attach_reference(ctx, batch, stored)
        reseed(ctx, step, index)
        before = read_generator(ctx)
        with torch.set_grad_enabled(first.single):
            outputs = run_forward(ctx, batch, step, index).named()
        first.drew.append(not torch.equal(before, read_generator(ctx)))
        first.batches.append(batch)
        first.outputs.append(outputs)
        first.leaves.append({n: t.detach().requires_grad_(True) for n, t in outputs.items()})
    return first


def join_step(ctx: StepContext, first: FirstPass) -> tuple[Outputs, Table]:
    """The coupled part of the whole step in data order; other ranks' outputs are constants here."""
    tables = [batch.table for batch in first.batches]
    parts = gather_rows(ctx, list(zip(tables, first.leaves, strict=True)))
    rows = [row for part in parts for row in part if row[0].group_ids]
    return concat_steps([table for table, _ in rows], [outputs for _, outputs in rows])


def gather_rows(ctx: StepContext, rows: list[Rows] | None) -> list[list[Rows]]:
    """The rows of every rank, in rank order; one's own as they are, the others' on this rank's device, detached.

    Args:
        rows: None: this rank has none, since it ran out of memory.

    Raises:
        MemoryError: A rank ran out of memory.
    """
    if ctx.runtime.world == 1 and rows is not None:
        return [rows]
    sent = rows and [(table.to("cpu"), {n: t.detach().cpu() for n, t in outputs.items()}) for table, outputs in rows]
    parts = ctx.runtime.gather(sent)
    there = [part for part in parts if part is not None]
    if rows is None or len(there) < len(parts):
        raise MemoryError("another process ran out of memory")
    device = ctx.runtime.device
    return [
        rows
        if rank == ctx.runtime.rank
        else [(table.to(device), {n: t.to(device) for n, t in outputs.items()}) for table, outputs in part]
        for rank, part in enumerate(there)
    ]


def run_second_pass(
    ctx: StepContext, groups: Sequence[Group], micros: Mapping[int, MicroBatch], step: int, first: FirstPass
) -> None:
    """Back-propagate the coefficients that the loss left on `first.leaves`.

    On one process, micro-batches without a coefficient are left out. On several, each runs a forward and a backward, since
    sharded models need every rank.
    """
    alone = ctx.runtime.world == 1
    for place, (index, micro) in enumerate(micros.items()):
        batch = first.batches[place]
        grads = {n: leaf.grad for n, leaf in first.leaves[place].items() if leaf.grad is not None}
        if not first.single and not first.drew[place]:
            batch, grads = _drop_zero_gradient(ctx, micro, groups, batch, grads)
        if alone and not grads:
            continue
        outputs = first.outputs[place] if first.single else run_forward(ctx, batch, step, index).named()
        seeds = {n: grads.get(n) for n in outputs if n in grads or not alone}
        pairs = [
            (outputs[n], torch.zeros_like(outputs[n]) if grad is None else grad)
            for n, grad in seeds.items()
            if outputs[n].requires_grad
        ]
        if pairs:
            enter_phase("backward")
            fault_point("step.backward")
            ctx.parallel.backward([o for o, _ in pairs], [g for _, g in pairs])


def _drop_zero_gradient(
    ctx: StepContext, micro: MicroBatch, groups: Sequence[Group], batch: PackedBatch, grads: Mapping[str, Tensor]
) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The batch without completions whose gradient is exactly 0 (KTO's partners), and the gradients of the others.

    Only for forwards without dropout, where a completion does not depend on its neighbours.
    """
    table = batch.table
    kept = _find_trained(table, grads)
    if all(kept):
        return batch, dict(grads)
    host = table.on_host()
    slots: dict[int, list[int]] = {}
    for owner, slot, keep in zip(host.completion_group.tolist(), host.completion_slot.tolist(), kept, strict=True):
        if keep:
            slots.setdefault(owner, []).append(slot)
    parts = tuple(replace(p, slots=tuple(slots[g])) for g, p in enumerate(micro.parts) if g in slots)
    if not parts:
        return build_batch(replace(micro, parts=()), groups, ctx.runtime.device), {}
    completions = torch.tensor(kept)
    picked = {True: completions[host.token_completion], False: completions}
    places = {per: move(mask.nonzero()[:, 0], ctx.runtime.device) for per, mask in picked.items()}
    smaller = build_batch(replace(micro, parts=parts), groups, ctx.runtime.device)
    return smaller, {n: g.index_select(0, places[is_per_token(n)]) for n, g in grads.items()}


def _find_trained(table: Table, grads: Mapping[str, Tensor]) -> list[bool]:
    """For each completion whether any of its gradients is not 0 (a NaN is not 0 either); the host waits once."""
    count = table.completion_group.shape[0]
    every = torch.arange(count, device=table.completion_group.device)
    found = torch.zeros_like(table.completion_group)
    for name, grad in grads.items():
        found.index_add_(0, table.token_completion if is_per_token(name) else every, (grad != 0).to(found.dtype))
    return (found > 0).tolist()

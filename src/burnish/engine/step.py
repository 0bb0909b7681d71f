"""One optimizer step: the gradient of its loss, over micro-batches and ranks, with every number checked."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from burnish.core.batch import Outputs, Table
from burnish.core.concat import concat_steps
from burnish.core.group import Group
from burnish.engine.context import StepContext, Stopped
from burnish.engine.coupled import Rows, gather_rows, join_step, run_first_pass, run_second_pass
from burnish.engine.forward import attach_reference, build_batch, has_stored_reference, run_forward
from burnish.engine.method import Method
from burnish.engine.observe import Observation, Observed, StepRecord
from burnish.engine.plan import MicroBatch, StepPlan
from burnish.engine.sums import Findings, Guard, PendingSums, Sums
from burnish.errors import BurnishError, is_out_of_memory
from burnish.faults import fault_point
from burnish.losses.terms import LossResult
from burnish.track.whereabouts import enter_phase


@dataclass
class Gradient:
    """What `compute_gradient` found; the gradients themselves, unscaled, are on the parameters.

    Attributes:
        tokens: Computed on this rank.
        bad: Ids of the rows whose loss is not finite; none = the gradient may be applied.
        state: The method's next state; None = unchanged.
        norm: The gradients' L2 norm. total_norm: The same, (), on the device.
        terms: The terms of the loss that are not finite.
        record: What the method says of the step, if it observes steps and the numbers were finite.
    """

    figures: dict[str, float]
    tokens: int
    bad: list[str]
    state: Mapping[str, Any] | None
    norm: float
    total_norm: Tensor
    terms: list[str] = field(default_factory=list)
    record: StepRecord | None = None


@dataclass
class _Collected:
    """What a step gathers on its way, on this rank."""

    sums: PendingSums = field(default_factory=PendingSums)
    guard: Guard = field(default_factory=Guard)
    observation: Observation = field(default_factory=Observation)
    rows: list[Rows] = field(default_factory=list)  # for a method with a state: the whole step's, detached


def compute_counts(method: Method, groups: Sequence[Group]) -> dict[str, float]:
    """Units per term over the whole step; the same on every rank, known before any forward."""
    return {name: float(count) for name, count in method.counts(groups).items()}


def compute_gradient(
    ctx: StepContext, groups: Sequence[Group], plan: StepPlan, state: Mapping[str, Any], step: int
) -> Gradient:
    """Gradients of the step's loss on `ctx.parameters`, summed over micro-batches and ranks.

    The result does not depend on how the plan cut the step. Non-finite numbers are reported, never applied. The host waits for
    the device once, after the last backward pass; ranks exchange numbers once (coupled losses: and once their outputs).

    Raises:
        Stopped: `ctx.should_stop()` became true between micro-batches.
        Exception: Memory ran out (`is_out_of_memory`), here or, of equal copies, on any rank; no state has changed.
    """
    ctx.parallel.discard(ctx.parameters)
    counts = compute_counts(ctx.method, groups)
    mine = plan.of(ctx.runtime.rank)
    found, failure = _Collected(), None
    try:
        _run_passes(ctx, groups, mine, counts, state, step, found)
    except Exception as error:
        if not is_out_of_memory(error) or not ctx.can_tell_others:
            raise
        failure = error.with_traceback(
            None
        )  # its frames hold the tensors of the step; the others are told in `_conclude`
        found = _Collected()
    if (number := fault_point("step.nan_gradient")) is not None:
        _spoil_gradient(ctx.parameters, number)
    total_norm = ctx.parallel.finish(ctx.parameters, ctx.scale)
    return _conclude(ctx, counts, state, step, found, total_norm, sum(m.tokens for m in mine), failure)


def _run_passes(
    ctx: StepContext,
    groups: Sequence[Group],
    mine: Sequence[MicroBatch],
    counts: Mapping[str, float],
    state: Mapping[str, Any],
    step: int,
    found: _Collected,
) -> None:
    """All forwards and backwards of this rank."""
    stored = has_stored_reference(groups)
    coupled = {i: m for i, m in enumerate(mine) if m.coupled}
    last = len(mine) - 1
    if coupled:
        with ctx.parallel.micro(last=len(coupled) == len(mine)):
            _add_coupled(ctx, groups, coupled, counts, state, step, stored, found)
    for index, micro in enumerate(mine):
        if not micro.coupled:
            if ctx.should_stop():
                raise Stopped
            with ctx.parallel.micro(last=index == last):
                _add_micro_batch(ctx, groups, micro, counts, state, (step, index), stored, found)


def _add_micro_batch(
    ctx: StepContext,
    groups: Sequence[Group],
    micro: MicroBatch,
    counts: Mapping[str, float],
    state: Mapping[str, Any],
    place: tuple[int, int],
    stored: bool,
    found: _Collected,
) -> None:
    """Forward, loss and backward of one micro-batch of a loss that is a sum over groups."""
    batch = build_batch(micro, groups, ctx.runtime.device)
    attach_reference(ctx, batch, stored)
    outputs = run_forward(ctx, batch, *place)
    result = ctx.method.compute_loss(outputs, batch.table, state)
    loss = _compute_total(result, counts)
    found.guard.watch(loss, result, [(batch.table, outputs.named())])
    found.sums.add(result)
    if ctx.method.state is not None:
        found.rows.append((batch.table, {n: t.detach() for n, t in outputs.named().items()}))
    _observe(ctx, [p.position for p in micro.parts], outputs, batch.table, found)
    enter_phase("backward")
    fault_point("step.backward")
    ctx.parallel.backward([loss if ctx.scale is None else loss * ctx.scale])


def _add_coupled(
    ctx: StepContext,
    groups: Sequence[Group],
    micros: Mapping[int, MicroBatch],
    counts: Mapping[str, float],
    state: Mapping[str, Any],
    step: int,
    stored: bool,
    found: _Collected,
) -> None:
    """Both passes over the coupled micro-batches, and the loss on all of them in between."""
    try:
        first = run_first_pass(ctx, groups, micros, step, stored)
    except Exception as error:
        if is_out_of_memory(error) and ctx.can_tell_others:
            gather_rows(ctx, None)
        raise
    outputs, table = join_step(ctx, first)
    result = ctx.method.compute_loss(outputs, table, state)
    loss = _compute_total(result, {t.name: t.count for t in result.terms} if ctx.method.coupled else counts)
    rows = first.rows()
    found.guard.watch(loss, result, rows)
    found.rows += rows if ctx.method.state is not None else []
    if ctx.runtime.is_main:  # each rank computes the same loss; its sums count once
        found.sums.add(result)
        _observe(ctx, table.on_host().group_order.tolist(), outputs, table, found)
    enter_phase("backward")
    if loss.requires_grad:  # else no row of the coupled part is on this rank
        (loss if ctx.scale is None else loss * ctx.scale).backward()
    run_second_pass(ctx, groups, micros, step, first)


def _observe(ctx: StepContext, positions: Sequence[int], outputs: Outputs, table: Table, found: _Collected) -> None:
    if ctx.method.observer is not None:
        with torch.no_grad():
            found.observation.add(positions, table.group_ids, ctx.method.observer.observe(outputs, table))


def _compute_total(result: LossResult, counts: Mapping[str, float]) -> Tensor:
    """Σ weight · sum / count of the whole step; a term without units contributes zero but keeps the graph."""
    parts = [t.sum * (t.weight / counts[t.name]) if counts[t.name] else t.sum * 0.0 for t in result.terms]
    loss = torch.stack([p.to(parts[0].dtype) for p in parts]).sum()
    return loss if (number := fault_point("step.nan_loss")) is None else loss * number


def _spoil_gradient(parameters: Sequence[Tensor], number: float) -> None:
    """For the tests: a number that is none, in the first gradient."""
    grad: Any = next(p.grad for p in parameters if p.grad is not None)
    local = grad.to_local() if hasattr(grad, "to_local") else grad
    local.view(-1)[:1] = number


@dataclass(frozen=True)
class _RankReport:
    """What the ranks tell one another of a step, in one exchange."""

    sums: Sums
    findings: Findings
    observed: Any
    out_of_memory: bool


def _conclude(
    ctx: StepContext,
    counts: Mapping[str, float],
    state: Mapping[str, Any],
    step: int,
    found: _Collected,
    total_norm: Tensor,
    tokens: int,
    failure: Exception | None,
) -> Gradient:
    """Fetch the step's numbers, exchange them between ranks, and say what became of the step."""
    method, flags = ctx.method, found.guard.flags
    numbers = found.sums.fetch([*flags, total_norm, *found.observation.tensors()])
    finite, norm, rest = numbers[: len(flags)], numbers[len(flags)], numbers[len(flags) + 1 :]
    report = _RankReport(found.sums.sums, found.guard.find(finite), found.observation.read(rest), failure is not None)
    reports = ctx.runtime.gather(report)
    if any(r.out_of_memory for r in reports):
        raise failure or MemoryError("another process ran out of memory")
    findings = [r.findings for r in reports]
    bad = [row for f in findings for row in f.rows] or [row for f in findings for row in f.suspects]
    if bad:
        terms = sorted({name for f in findings for name in f.terms})
        return Gradient({}, tokens, bad, None, norm, total_norm, terms)
    sums = Sums.join(r.sums for r in reports)
    if method.coupled:
        counts = sums.announced
    else:
        _check_counts(sums.announced, counts, method.name)
    figures = sums.figures(counts)
    next_state = None
    if method.state is not None:
        rows = [row for part in gather_rows(ctx, found.rows) for row in part if row[0].group_ids]
        next_state = method.state.advance(*concat_steps([t for t, _ in rows], [o for _, o in rows]), state)
    record = None
    if method.observer is not None:
        ids, values = Observation.join([r.observed for r in reports])
        now = state if next_state is None else next_state
        record = method.observer.describe(Observed(step + 1, ids, values, figures), now)
    return Gradient(figures, tokens, [], next_state, norm, total_norm, record=record)


def _check_counts(announced: Mapping[str, float], counts: Mapping[str, float], method: str) -> None:
    for name, number in announced.items():
        if name not in counts or not math.isclose(number, counts[name], rel_tol=1e-6, abs_tol=1e-6):
            raise BurnishError(
                f"method {method}: term {name!r} counted {number} units, but counts() announced {counts.get(name)}",
                remedy="make counts() and compute_loss() count the same units from the same masks",
            )

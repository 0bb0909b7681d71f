"""One optimizer step: forward and backward over its micro-batches, guarded, reduced, applied."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from burnish.core.batch import Outputs, PackedBatch, Table, build_packed_batch
from burnish.core.concat import concat_steps, is_per_token
from burnish.core.group import Group
from burnish.core.logits import AGAINST_LOGPROBS, Functional, HeadInput
from burnish.engine.fetch import fetch_numbers
from burnish.engine.method import Method
from burnish.engine.observe import Observation, Observed, StepRecord
from burnish.engine.plan import MicroBatch, StepPlan, build_part
from burnish.engine.runtime import Runtime
from burnish.engine.streams import compute_seed
from burnish.errors import BurnishError
from burnish.faults import fault_point
from burnish.losses.terms import LossResult
from burnish.track.whereabouts import enter_phase


class PolicyLike(Protocol):
    """What the engine needs of a policy: one call from a batch to flat outputs."""

    def __call__(
        self,
        batch: PackedBatch,
        want: frozenset[str],
        *,
        functionals: Sequence[Functional] = (),
        against: HeadInput | None = None,
    ) -> Outputs: ...


class ReferenceLike(Protocol):
    """A reference model, without gradient: (S,) log-probs of the scored tokens, or what its head reads."""

    def logprobs(self, batch: PackedBatch) -> Tensor: ...

    def head_input(self, batch: PackedBatch) -> HeadInput: ...


class Stopped(Exception):
    """A signal arrived between micro-batches; the step is dropped, no state has changed."""


@dataclass
class Sums:
    """Sums and counts of terms and metrics over micro-batches (and, after `reduce`, over ranks).

    Sums stay on the device until `fetch`; counts are known on the host.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    terms: dict[str, float] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)
    announced: dict[str, float] = field(default_factory=dict)
    _waiting: list[tuple[dict[str, float], str, Tensor]] = field(default_factory=list)

    def add(self, result: LossResult) -> None:
        for term in result.terms:
            self._waiting.append((self.terms, term.name, term.sum.detach()))
            self.announced[term.name] = self.announced.get(term.name, 0.0) + term.count
            self.weights[term.name] = term.weight
        for metric in result.metrics:
            self._waiting.append((self.values, metric.name, metric.sum.detach()))
            if isinstance(metric.count, Tensor):
                self._waiting.append((self.counts, metric.name, metric.count.detach()))
            else:
                self.counts[metric.name] = self.counts.get(metric.name, 0.0) + float(metric.count)

    def fetch(self, further: Sequence[Tensor]) -> list[float]:
        """Bring the sums to the host, in one transfer with the numbers of `further`; returns those."""
        numbers = fetch_numbers([tensor for _, _, tensor in self._waiting] + list(further))
        for (target, name, _), number in zip(self._waiting, numbers, strict=False):
            target[name] = target.get(name, 0.0) + number
        found = numbers[len(self._waiting) :]
        self._waiting = []
        return found

    def reduce(self, runtime: Runtime) -> None:
        self.values, self.counts = runtime.sum_numbers(self.values), runtime.sum_numbers(self.counts)
        self.terms, self.announced = runtime.sum_numbers(self.terms), runtime.sum_numbers(self.announced)
        for part in runtime.gather(self.weights):
            self.weights |= part

    def figures(self, counts: Mapping[str, float]) -> dict[str, float]:
        """loss, each term (if there are several) and each metric, divided by their counts."""
        shares = {n: self.weights[n] * s / counts[n] for n, s in self.terms.items() if counts[n]}
        out = {"loss": sum(shares.values())}
        if len(self.terms) > 1:
            out |= {f"loss/{n}": s / counts[n] for n, s in self.terms.items() if counts[n]}
        return out | {n: v / self.counts[n] for n, v in self.values.items() if self.counts[n]}


@dataclass
class Guard:
    """Whether the numbers of each micro-batch are finite; read on the host once, at the end of the step."""

    flags: list[Tensor] = field(default_factory=list)
    rows: list[list[tuple[Table, dict[str, Tensor]]]] = field(default_factory=list)
    terms: list[dict[str, Tensor]] = field(default_factory=list)

    def watch(self, loss: Tensor, result: LossResult, rows: Sequence[tuple[Table, Mapping[str, Tensor]]]) -> None:
        """Remember whether `loss` and all that it was computed from are finite (one that saturates hides an infinity), and
        the outputs and terms that tell which rows are to blame.
        """
        read = [t for table, outputs in rows for t in (*outputs.values(), *table.token_columns.values())]
        self.flags.append(torch.stack([torch.isfinite(t.detach()).all() for t in (loss, *read)]).all())
        self.terms.append({t.name: t.sum.detach() for t in result.terms})
        self.rows.append([(table, {n: t.detach() for n, t in outputs.items()}) for table, outputs in rows])

    def name_rows(self, finite: Sequence[float]) -> tuple[list[str], list[str]]:
        """Ids of the groups that hold a number that is not finite, and of all that a loss at fault was computed from.

        Args:
            finite: The flags as fetched.
        """
        broken = [rows for ok, rows in zip(finite, self.rows, strict=True) if not ok]
        found = [name for rows in broken for table, outputs in rows for name in _non_finite_rows(outputs, table)]
        return found, [name for rows in broken for table, _ in rows for name in table.group_ids]

    def name_terms(self, finite: Sequence[float]) -> list[str]:
        """Names of the terms to blame; all of a micro-batch if only their total is not finite."""
        broken = [sums for ok, sums in zip(finite, self.terms, strict=True) if not ok]
        return [
            name
            for sums in broken
            for name in [n for n, t in sums.items() if not bool(torch.isfinite(t))] or list(sums)
        ]


@dataclass
class Gradient:
    """What `compute_gradient` found; the gradients themselves, unscaled, are on the parameters.

    Attributes:
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
class StepContext:
    """What stays the same for all steps of a stage."""

    policy: PolicyLike
    method: Method
    runtime: Runtime
    parameters: Sequence[Tensor]
    seed: int
    reference: ReferenceLike | None = None
    reseed: bool = True
    scale: float | None = None
    should_stop: Callable[[], bool] = lambda: False


def compute_counts(method: Method, groups: Sequence[Group]) -> dict[str, float]:
    """Units per term over the whole step; the same on every rank, known before any forward."""
    return {name: float(count) for name, count in method.counts(groups).items()}


def _check_counts(announced: Mapping[str, float], counts: Mapping[str, float], method: str) -> None:
    for name, found in announced.items():
        if name not in counts or not math.isclose(found, counts[name], rel_tol=1e-6, abs_tol=1e-6):
            raise BurnishError(
                f"method {method}: term {name!r} counted {found} units, but counts() announced {counts.get(name)}",
                remedy="make counts() and compute_loss() count the same units from the same masks",
            )


def _build(micro: MicroBatch, groups: Sequence[Group], device: torch.device) -> PackedBatch:
    cut = [build_part(groups[p.position], p) for p in micro.parts]
    batch = build_packed_batch([g for g, _ in cut], [p.position for p in micro.parts], [s for _, s in cut])
    return batch.to(device)


def _forward(ctx: StepContext, batch: PackedBatch, step: int, index: int) -> Outputs:
    """The policy's outputs; dropout is reseeded by (seed, step, rank, micro-batch), so both passes see the same."""
    _reseed(ctx, step, index)
    enter_phase("forward", batch.input_ids.numel(), batch.last_index.numel())
    fault_point("step.forward")
    outputs = call_policy(ctx, batch)
    _spoil(outputs)
    return outputs


def _reseed(ctx: StepContext, step: int, index: int) -> None:
    if not ctx.reseed:
        return
    seed = compute_seed(ctx.seed, "dropout", step, ctx.runtime.rank, index)
    torch.default_generator.manual_seed(seed)
    if (
        ctx.runtime.device.type == "cuda"
    ):  # torch.manual_seed would note a stack trace for each device that is not in use
        torch.cuda.manual_seed_all(seed)


def call_policy(ctx: StepContext, batch: PackedBatch) -> Outputs:
    """What the method wants of the policy; a live reference's log-probs go to the table, as stored ones do."""
    method = ctx.method
    if not method.functionals:
        return ctx.policy(batch, method.want)
    if not method.needs_reference_head:
        return ctx.policy(batch, method.want, functionals=method.functionals)
    if ctx.reference is None:
        raise BurnishError(f"method {method.name} needs a live reference", remedy="give the engine a reference model")
    further = (AGAINST_LOGPROBS,) if method.needs_reference else ()
    against = ctx.reference.head_input(batch) if batch.layout.groups else None
    outputs = ctx.policy(batch, method.want, functionals=(*method.functionals, *further), against=against)
    if further:
        found = outputs.functionals.pop(AGAINST_LOGPROBS.name)
        if batch.layout.groups:
            batch.table.token_columns["ref_logprobs"] = found.detach()
    return outputs


def _spoil(outputs: Outputs) -> None:
    """For the tests: a number that is none, in the outputs of one micro-batch."""
    for name in ("logprobs", "scores"):
        value = getattr(outputs, name)
        if value is not None and (number := fault_point(f"step.nan_{name}")) is not None:
            setattr(outputs, name, value * number)


def _attach_reference(ctx: StepContext, batch: PackedBatch) -> None:
    live = ctx.method.needs_reference_head  # then they come with the policy's outputs
    if (
        ctx.method.needs_reference
        and not live
        and ctx.reference is not None
        and "ref_logprobs" not in batch.table.token_columns
    ):
        batch.table.token_columns["ref_logprobs"] = ctx.reference.logprobs(batch)


def _non_finite_rows(outputs: Mapping[str, Tensor], table: Table) -> list[str]:
    """Ids of the groups with a number that is not finite, in the policy's outputs or in what the loss reads beside them."""
    bad: set[int] = set()
    for name, tensor in [*outputs.items(), *table.token_columns.items()]:
        rows = (~torch.isfinite(tensor.detach())).nonzero()[:, 0]
        completions = rows if name == "scores" else table.token_completion[rows]
        bad |= set(table.completion_group[completions].tolist())
    for column in table.group_columns.values():
        bad |= set((~torch.isfinite(column)).nonzero()[:, 0].tolist())
    return [table.group_ids[g] for g in sorted(bad)]


def _total(result: LossResult, counts: Mapping[str, float]) -> Tensor:
    """Σ weight · sum / count of the whole step; a term without units contributes zero but keeps the graph."""
    parts = [t.sum * (t.weight / counts[t.name]) if counts[t.name] else t.sum * 0.0 for t in result.terms]
    return torch.stack([p.to(parts[0].dtype) for p in parts]).sum()


def compute_gradient(
    ctx: StepContext, groups: Sequence[Group], plan: StepPlan, state: Mapping[str, Any], step: int
) -> Gradient:
    """Gradients of the step's loss on `ctx.parameters`, summed over micro-batches and ranks.

    The result does not depend on how the plan cut the step. Non-finite numbers are reported, never applied. The host waits for
    the device once, after the last backward pass.

    Raises:
        Stopped: `ctx.should_stop()` became true between micro-batches.
    """
    for p in ctx.parameters:
        p.grad = None
    counts = compute_counts(ctx.method, groups)
    sums, guard, seen = Sums(), Guard(), Observation()
    rows: list[tuple[Table, dict[str, Tensor]]] = []
    mine = plan.of(ctx.runtime.rank)
    coupled = [i for i, m in enumerate(mine) if m.coupled]
    if coupled:
        rows += _run_coupled(ctx, groups, mine, coupled, counts, state, step, sums, guard, seen)
    for index, micro in enumerate(mine):
        if micro.coupled:
            continue
        if ctx.should_stop():
            raise Stopped
        batch = _build(micro, groups, ctx.runtime.device)
        _attach_reference(ctx, batch)
        outputs = _forward(ctx, batch, step, index)
        result = ctx.method.compute_loss(outputs, batch.table, state)
        loss = _total(result, counts)
        if (number := fault_point("step.nan_loss")) is not None:
            loss = loss * number
        guard.watch(loss, result, [(batch.table, outputs.named())])
        sums.add(result)
        if ctx.method.stateful:
            rows.append((batch.table, {n: t.detach() for n, t in outputs.named().items()}))
        if ctx.method.observes:
            seen.add([p.position for p in micro.parts], batch.table.group_ids, _observe(ctx, outputs, batch.table))
        enter_phase("backward")
        fault_point("step.backward")
        (loss if ctx.scale is None else loss * ctx.scale).backward()
    total_norm = _finish_gradients(ctx)
    found = sums.fetch([*guard.flags, total_norm, *seen.tensors()])
    finite, norm, observed = found[: len(guard.flags)], found[len(guard.flags)], found[len(guard.flags) + 1 :]
    every = ctx.runtime.gather((*guard.name_rows(finite), guard.name_terms(finite)))
    bad, suspects = ([row for part in every for row in part[i]] for i in (0, 1))
    bad = bad or suspects
    terms = sorted({name for *_, part in every for name in part})
    sums.reduce(ctx.runtime)
    next_state = None
    if not bad:
        if ctx.method.coupled:
            counts = dict(sums.announced)
        else:
            _check_counts(sums.announced, counts, ctx.method.name)
        if ctx.method.stateful:
            next_state = ctx.method.next_state(*_join_ranks(ctx, rows), state)
    figures = sums.figures(counts) if not bad else {}
    record = None
    if ctx.method.observes and not bad:
        ids, values = seen.join(observed, ctx.runtime)
        now = state if next_state is None else next_state
        record = ctx.method.describe_step(Observed(step + 1, ids, values, figures), now)
    return Gradient(figures, sum(m.tokens for m in mine), bad, next_state, norm, total_norm, terms, record)


def _observe(ctx: StepContext, outputs: Outputs, table: Table) -> dict[str, Tensor]:
    with torch.no_grad():
        return ctx.method.observe(outputs, table)


def _finish_gradients(ctx: StepContext) -> Tensor:
    """Sum the gradients over ranks, undo the loss scale; () their norm, on the device."""
    ctx.runtime.sum_gradients(ctx.parameters)
    grads = [p.grad for p in ctx.parameters if p.grad is not None]
    if ctx.scale is not None:
        for grad in grads:
            grad.mul_(1.0 / ctx.scale)
    if (number := fault_point("step.nan_gradient")) is not None:
        grads[0].view(-1)[0] = number
    return get_total_norm(grads)


def _run_coupled(
    ctx: StepContext,
    groups: Sequence[Group],
    mine: Sequence[MicroBatch],
    coupled: Sequence[int],
    counts: Mapping[str, float],
    state: Mapping[str, Any],
    step: int,
    sums: Sums,
    guard: Guard,
    seen: Observation,
) -> list[tuple[Table, dict[str, Tensor]]]:
    """Two passes: outputs of coupled micro-batches without gradient, the loss on them, backward with its coefficients.

    With a single coupled micro-batch on a single rank the first forward keeps its graph and the second is spared.
    Returns the tables and detached outputs of this rank's coupled micro-batches.
    """
    single = len(coupled) == 1 and ctx.runtime.world == 1
    tables, named, batches, drawn = [], [], [], []
    for index in coupled:
        if ctx.should_stop():
            raise Stopped
        batch = _build(mine[index], groups, ctx.runtime.device)
        _attach_reference(ctx, batch)
        _reseed(ctx, step, index)
        before = _draw_state(ctx)
        with torch.set_grad_enabled(single):
            outputs = _forward(ctx, batch, step, index).named()
        drawn.append(not torch.equal(before, _draw_state(ctx)))
        tables.append(batch.table)
        named.append(outputs)
        batches.append(batch)
    leaves = [{n: t.detach().requires_grad_(True) for n, t in outputs.items()} for outputs in named]
    joined, whole = _join_coupled(ctx, tables, leaves)
    result = ctx.method.compute_loss(joined, whole, state)
    loss = _total(result, {t.name: t.count for t in result.terms} if ctx.method.coupled else counts)
    if (number := fault_point("step.nan_loss")) is not None:
        loss = loss * number
    guard.watch(loss, result, list(zip(tables, named, strict=True)))
    if ctx.runtime.is_main:
        sums.add(result)
        if ctx.method.observes:
            seen.add(whole.group_order.tolist(), whole.group_ids, _observe(ctx, joined, whole))
    enter_phase("backward")
    if loss.requires_grad:  # else no row of the coupled part is on this rank
        (loss if ctx.scale is None else loss * ctx.scale).backward()
    for place, (index, batch, leaf) in enumerate(zip(coupled, batches, leaves, strict=True)):
        grads = {n: v.grad for n, v in leaf.items() if v.grad is not None}
        if not single and not drawn[place]:
            batch, grads = _drop_silent(ctx, mine[index], groups, batch, grads)
        outputs = named[place] if single else _forward(ctx, batch, step, index).named()
        pairs = [(outputs[n], g) for n, g in grads.items() if outputs[n].requires_grad]
        if pairs:
            enter_phase("backward")
            torch.autograd.backward([o for o, _ in pairs], [g for _, g in pairs])
    return [(t, {n: v.detach() for n, v in o.items()}) for t, o in zip(tables, named, strict=True)]


def _draw_state(ctx: StepContext) -> Tensor:
    """The state of the device's random numbers: it moves when a forward draws (dropout)."""
    return torch.cuda.get_rng_state(ctx.runtime.device) if ctx.runtime.device.type == "cuda" else torch.get_rng_state()


def _drop_silent(
    ctx: StepContext, micro: MicroBatch, groups: Sequence[Group], batch: PackedBatch, grads: Mapping[str, Tensor]
) -> tuple[PackedBatch, dict[str, Tensor]]:
    """The batch without completions that the loss only read (all their coefficients are exactly 0), and the other rows'
    coefficients. Only for forwards without dropout, where a completion does not depend on its neighbours."""
    table = batch.table
    heard = torch.zeros_like(table.completion_group, dtype=torch.bool)
    owners = {n: table.token_completion if is_per_token(n) else torch.arange(len(heard)) for n in grads}
    for name, grad in grads.items():
        heard[owners[name].to(heard.device)[grad != 0]] = True  # a NaN is not 0 either
    if bool(heard.all()):
        return batch, dict(grads)
    slots: dict[int, list[int]] = {}
    for row in torch.nonzero(heard)[:, 0].tolist():
        slots.setdefault(int(table.completion_group[row]), []).append(int(table.completion_slot[row]))
    parts = tuple(replace(p, slots=tuple(slots[g])) for g, p in enumerate(micro.parts) if g in slots)
    kept = _build(replace(micro, parts=parts), groups, ctx.runtime.device)
    return kept, {n: g[heard[owners[n].to(heard.device)]] for n, g in grads.items()}


def _join_ranks(ctx: StepContext, rows: list[tuple[Table, dict[str, Tensor]]]) -> tuple[Outputs, Table]:
    """The rows of every rank as one table in data order, without gradient."""
    every = [row for part in ctx.runtime.gather(rows) for row in part if len(row[0].group_ids)]
    return concat_steps([t for t, _ in every], [o for _, o in every])


def _join_coupled(ctx: StepContext, tables: list[Table], leaves: list[dict[str, Tensor]]) -> tuple[Outputs, Table]:
    """The coupled part of the whole step, in data order; other ranks' outputs are constants here."""
    everything = ctx.runtime.gather([(t, {n: v.detach() for n, v in leaf.items()}) for t, leaf in zip(tables, leaves)])
    all_tables, all_outputs = [], []
    for rank, rows in enumerate(everything):
        for i, (table, values) in enumerate(rows):
            own = rank == ctx.runtime.rank
            if len(table.group_ids):
                all_tables.append(tables[i] if own else table)
                all_outputs.append(leaves[i] if own else values)
    return concat_steps(all_tables, all_outputs)

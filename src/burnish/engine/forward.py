"""One micro-batch through the models: batch, reference, outputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields

import torch
from torch import Tensor

from burnish.core.batch import Outputs, PackedBatch, build_packed_batch
from burnish.core.group import Group
from burnish.core.logits import AGAINST_LOGPROBS
from burnish.engine.context import StepContext
from burnish.engine.plan import MicroBatch, build_part
from burnish.engine.streams import compute_seed
from burnish.errors import BurnishError
from burnish.faults import fault_point
from burnish.track.whereabouts import enter_phase

REFERENCE_COLUMN = "ref_logprobs"


def build_batch(micro: MicroBatch, groups: Sequence[Group], device: torch.device) -> PackedBatch:
    """The packed row of a micro-batch, on the device."""
    cut = [build_part(groups[p.position], p) for p in micro.parts]
    batch = build_packed_batch([g for g, _ in cut], [p.position for p in micro.parts], [s for _, s in cut])
    return batch.to(device)


def has_stored_reference(groups: Sequence[Group]) -> bool:
    """Whether the examples carry their reference log-probs; asked of the whole step, so that all ranks decide alike."""
    return any(REFERENCE_COLUMN in c.token_columns for group in groups for c in group.completions)


def attach_reference(ctx: StepContext, batch: PackedBatch, stored: bool) -> None:
    """The reference's log-probs as a token column, where the method reads them and the examples have none.

    An empty batch goes through the reference too: a sharded one needs every rank.

    Args:
        stored: `has_stored_reference` of the step.
    """
    reads = ctx.method.reference
    if ctx.reference is None or "logits" in reads or "logprobs" not in reads or stored:
        return  # with logits they come beside the policy's outputs, from the same forward
    found = ctx.reference.logprobs(batch)
    if batch.layout.groups:
        batch.table.token_columns[REFERENCE_COLUMN] = found


def call_models(ctx: StepContext, batch: PackedBatch) -> Outputs:
    """What the method wants of each model, in one; a live reference's log-probs go to the table, as stored ones do."""
    parts = [_call_policy(ctx, batch)]
    parts += [ctx.models[name](batch, want) for name, want in ctx.method.want.items() if name != "policy"]
    return parts[0] if len(parts) == 1 else merge_outputs(parts)


def _call_policy(ctx: StepContext, batch: PackedBatch) -> Outputs:
    method, policy = ctx.method, ctx.models["policy"]
    want = method.want["policy"]
    if not method.functionals:
        return policy(batch, want)
    if "logits" not in method.reference:
        return policy(batch, want, functionals=method.functionals)
    if ctx.reference is None:
        raise BurnishError(f"method {method.name} needs a live reference", remedy="give the engine a reference model")
    further = (AGAINST_LOGPROBS,) if "logprobs" in method.reference else ()
    against = ctx.reference.head_input(batch)
    outputs = policy(batch, want, functionals=(*method.functionals, *further), against=against)
    if further:
        found = outputs.functionals.pop(AGAINST_LOGPROBS.name)
        if batch.layout.groups:
            batch.table.token_columns[REFERENCE_COLUMN] = found.detach()
    return outputs


def merge_outputs(parts: Iterable[Outputs]) -> Outputs:
    """The outputs of several models as one.

    Raises:
        ValueError: Two models computed the same field.
    """
    merged = Outputs()
    for part in parts:
        for name in (f.name for f in fields(part) if f.name != "functionals"):
            value = getattr(part, name)
            if value is None:
                continue
            if getattr(merged, name) is not None:
                raise ValueError(f"two models compute {name}: a method may want it of one only")
            setattr(merged, name, value)
        merged.functionals |= part.functionals
    return merged


def run_forward(ctx: StepContext, batch: PackedBatch, step: int, index: int) -> Outputs:
    """The models' outputs in training; dropout is reseeded by (seed, step, rank, micro-batch), so that both passes of a
    coupled step see the same."""
    reseed(ctx, step, index)
    enter_phase("forward", batch.input_ids.numel(), batch.last_index.numel())
    fault_point("step.forward")
    outputs = call_models(ctx, batch)
    _spoil(outputs)
    return outputs


def reseed(ctx: StepContext, step: int, index: int) -> None:
    """Set the generator that dropout draws from; only that of this rank's device."""
    if not ctx.reseed:
        return
    seed = compute_seed(ctx.seed, "dropout", step, ctx.runtime.rank, index)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes a stack trace for each device not in use
    if ctx.runtime.device.type == "cuda":
        torch.cuda.default_generators[torch.cuda.current_device()].manual_seed(seed)


def read_generator(ctx: StepContext) -> Tensor:
    """The state of the device's random numbers: it moves when a forward draws (dropout)."""
    return torch.cuda.get_rng_state(ctx.runtime.device) if ctx.runtime.device.type == "cuda" else torch.get_rng_state()


def _spoil(outputs: Outputs) -> None:
    """For the tests: a number that is none, in the outputs of one micro-batch."""
    for name in ("logprobs", "scores"):
        value = getattr(outputs, name)
        if value is not None and (number := fault_point(f"step.nan_{name}")) is not None:
            setattr(outputs, name, value * number)

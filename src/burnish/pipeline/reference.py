"""The reference of a preference stage: log-probs cached on disk, a frozen copy, or the base under a fresh adapter."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from burnish.config.stages import ReferenceSettings
from burnish.config.train import TrainSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.budget import choose_budget
from burnish.engine.job import build_source
from burnish.engine.method import Method
from burnish.engine.parallel.interface import Parallel
from burnish.engine.runtime import Runtime
from burnish.engine.source import OfflineSource
from burnish.errors import BurnishError, ConfigError
from burnish.models.fingerprint import fingerprint_model
from burnish.models.load import BuiltModel, fetch_model_folder
from burnish.models.policy import Policy
from burnish.models.quantise import read_quantization
from burnish.models.reference import (
    Mode,
    Reference,
    ReferenceCache,
    ReferenceTable,
    attach_table,
    build_reference,
    build_reference_key,
    compute_reference_table,
    compute_start_gap,
    evaluating,
)
from burnish.pipeline.stage_models import StageModel
from burnish.pipeline.stored import OnBatch, load_or_compute

if TYPE_CHECKING:
    from burnish.pipeline.train_stage import StageInputs

log = logging.getLogger("burnish")

GAP_LIMIT = {True: 1e-3, False: 5e-2}  # fp32, else: the largest |log π − log π_ref| at step 0, nats a token
PROBE_GROUPS = 4


Complete = Callable[[Sequence[Group]], Sequence[Group]]


@dataclass(frozen=True)
class Referenced:
    """The groups of a stage and where their reference log-probs come from.

    Attributes:
        train, held_out: Groups, with reference log-probs where these do not change from epoch to epoch.
        model: The reference model, where log-probs are not stored.
        complete: Attaches stored log-probs to the arranged groups of an epoch.
    """

    train: list[Group]
    held_out: list[Group]
    model: Reference | None = None
    complete: Complete = list


def attach_reference(
    settings: TrainSettings,
    method: Method,
    inputs: StageInputs,
    models: Mapping[str, StageModel],
    train: Sequence[Group],
    held_out: Sequence[Group],
    cache_dir: Path,
    parallel: Parallel,
) -> Referenced:
    """Give the groups their reference log-probs, or the stage a reference model.

    Called with the policy as the stage received it, before any checkpoint is restored.

    Args:
        models: Those of the stage; "policy" is compared with the reference.
        held_out: With their partners, where the method has such.
        cache_dir: Where the cached log-probs lie, each table under the key of all that it depends on.
    """
    other, built, policy = inputs.other, models["policy"].built, models["policy"].policy
    if not isinstance(settings, ReferenceSettings):
        if other is None:
            raise ConfigError(
                f"a stage of kind {settings.kind} reads a reference, but has no setting that names one",
                where="teacher",
                remedy="derive the kind's settings from ReferenceSettings, or give them a `teacher` that is set",
            )
        teacher = _build_copy(parallel, policy, other, inputs, settings, what="teacher")
        log.info("teacher: %s", other)
        return Referenced(list(train), list(held_out), teacher)
    mode = _choose_mode(settings, method, built)
    if mode != "cached":
        if mode == "adapter":
            reference = build_reference(policy, mode, fresh_adapter=built.fresh_adapter, path=other)
        else:
            reference = _build_copy(parallel, policy, other, inputs, settings)
        _check_start(policy, reference, train, same=other is None)
        log.info("reference: %s", "the base under the fresh adapter" if mode == "adapter" else "a frozen copy")
        return Referenced(list(train), list(held_out), reference)
    if other is None:  # nothing is trained yet: the policy itself is the reference
        reference = Reference(policy, "copy")
        model = inputs.fingerprints["model"]
    else:
        reference = _build_copy(parallel, policy, other, inputs, settings)
        model = fingerprint_model(fetch_model_folder(other))

    def attach(groups: Sequence[Group]) -> list[Group]:
        return _attach_cached(groups, reference, model, settings, inputs, policy, cache_dir, parallel.runtime)

    source = build_source(settings, train, parallel.runtime.world, method)
    kept = attach(held_out)
    if (
        method.partners is not None
    ):  # what a row takes of others changes with the order: a cache for each epoch, read as it begins
        epochs = range(-(-source.total_steps // source.steps_per_epoch))
        sizes = []
        for epoch in epochs:
            fresh = attach(source.arranged(epoch))
            sizes.append(len(fresh))
            if epoch == 0:
                _check_columns(policy, fresh, same=other is None)
        log.info("reference: log-probs of %d groups, cached in %s", sum(sizes) + len(kept), cache_dir)
        return Referenced(list(train), kept, complete=attach)
    used = find_used(source)
    fresh = attach([train[i] for i in used])
    complete = list(train)
    for i, group in zip(used, fresh, strict=True):
        complete[i] = group
    _check_columns(policy, fresh, same=other is None)
    log.info("reference: log-probs of %d groups, cached in %s", len(fresh) + len(kept), cache_dir)
    return Referenced(complete, kept)


def _build_copy(
    parallel: Parallel,
    policy: Policy,
    other: str | None,
    inputs: StageInputs,
    settings: TrainSettings,
    *,
    what: str = "reference",
) -> Reference:
    """A frozen model beside the policy: a copy of it or another model, laid over the ranks as the policy is.

    A base in few bits is not sharded: each rank holds all of it.
    """
    if other is None and not parallel.sharded:
        return build_reference(policy, "copy")
    path = other if other is not None else str(inputs.folder)

    def make() -> Reference:
        return build_reference(policy, "copy", path=path, policy_folder=inputs.folder, settings=settings, what=what)

    if parallel.sharded and read_quantization(fetch_model_folder(path)) is not None:
        log.info("%s: its base is stored in few bits, so each process holds all of it", what)
        reference = make()
        reference.policy.to(parallel.runtime.device)
        return reference
    reference = parallel.build(make)
    parallel.prepare({what: reference.policy})
    return reference


def _compute_table(
    reference: Reference, budget: int, mine: list[Group], on_batch: OnBatch, forwards: int
) -> ReferenceTable:
    return compute_reference_table(reference, mine, budget=budget, on_batch=on_batch, forwards=forwards)


def _choose_mode(settings: ReferenceSettings, method: Method, built: BuiltModel) -> Mode | Literal["cached"]:
    """How the reference is kept; one whose distribution is read must run live."""
    asked = settings.reference_mode
    if "logits" not in method.reference:
        return "cached" if asked == "auto" else asked
    if asked == "cached":
        raise ConfigError(
            "reference_mode is cached, but the loss reads the reference's whole distribution, which is not stored",
            where="reference_mode",
            remedy="set reference_mode: auto, copy or adapter",
        )
    if asked != "auto":
        return asked
    alone = settings.lora is not None and settings.lora.bias == "none" and built.fresh_adapter
    return "adapter" if alone and settings.reference == "same" else "copy"


def find_used(source: OfflineSource) -> list[int]:
    """Positions of the examples that the stage's steps will read: all, unless max_steps ends within the first epoch."""
    train = source.groups
    if source.total_steps >= source.steps_per_epoch:
        return list(range(len(train)))
    rows = source.order(0)[: source.total_steps * source.batch_size]
    return sorted(int(i) for i in rows)


def _attach_cached(
    groups: Sequence[Group],
    reference: Reference,
    model: str,
    settings: ReferenceSettings,
    inputs: StageInputs,
    policy: Policy,
    cache_dir: Path,
    runtime: Runtime,
) -> list[Group]:
    if not groups:
        return []
    key = build_reference_key(
        model=model, groups=groups, settings=settings, template=inputs.tokenizer.chat_template, policy=policy
    )
    budget = choose_budget(settings, runtime.device.type)
    table = load_or_compute(
        ReferenceCache(cache_dir, key),
        groups,
        partial(_compute_table, reference, budget),
        runtime,
        budget=budget,
        label="reference log-probs",
    )
    return attach_table(groups, table)


def _check_start(policy: Policy, reference: Reference, train: Sequence[Group], *, same: bool) -> None:
    """The margin is 0 before the first step when the reference is the policy as the stage received it."""
    if same and train:
        batch = build_packed_batch(list(train[:PROBE_GROUPS])).to(policy.device)
        _check_gap(policy, compute_start_gap(policy, reference, batch))


def _check_columns(policy: Policy, train: Sequence[Group], *, same: bool) -> None:
    """The same for cached log-probs: it also finds a cache that belongs to another model."""
    if not same or not train:
        return
    batch = build_packed_batch(list(train[:PROBE_GROUPS])).to(policy.device)
    with torch.no_grad(), evaluating(policy):
        ours = policy(batch, frozenset({"logprobs"})).logprobs
    assert ours is not None
    _check_gap(policy, float((ours - batch.table.token_columns["ref_logprobs"]).abs().max()))


def _check_gap(policy: Policy, gap: float) -> None:
    limit = GAP_LIMIT[policy.compute_dtype is None]
    if gap > limit:
        raise BurnishError(
            f"policy and reference differ by {gap:.3g} nats a token before the first step (at most {limit})",
            where="reference",
            remedy="this is a defect of burnish: please report it; reference_mode: copy may go round it",
        )

"""The reference of a preference stage: log-probs cached on disk, a frozen copy, or the base under a fresh adapter."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from burnish.config.stages import DpoSettings
from burnish.config.train import TrainSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.job import build_source, choose_budget
from burnish.engine.runtime import Runtime
from burnish.errors import BurnishError
from burnish.models.fingerprint import fingerprint_model
from burnish.models.load import BuiltModel, fetch_model_folder, resolve_model_path
from burnish.models.policy import Policy
from burnish.models.reference import (
    Reference,
    ReferenceCache,
    attach_table,
    build_reference,
    build_reference_key,
    compute_reference_table,
    compute_start_gap,
    evaluating,
)
from burnish.track.progress import Progress

if TYPE_CHECKING:
    from burnish.pipeline.train_stage import StageInputs

log = logging.getLogger("burnish")

GAP_LIMIT = {True: 1e-3, False: 5e-2}  # fp32, else: the largest |log π − log π_ref| at step 0, nats a token
PROBE_GROUPS = 4


def attach_reference(
    settings: TrainSettings, inputs: StageInputs, built: BuiltModel, policy: Policy, train: Sequence[Group],
    held_out: Sequence[Group], stage_dir: Path, runtime: Runtime,
) -> tuple[list[Group], list[Group], Reference | None]:  # fmt: skip
    """Give the groups their reference log-probs, or the stage a reference model.

    Called with the policy as the stage received it, before any checkpoint is restored.

    Returns:
        (training groups, held-out groups, reference model or None when the groups carry the log-probs).
    """
    assert isinstance(settings, DpoSettings)
    other = None if settings.reference == "same" else resolve_model_path(settings.reference)
    mode = "cached" if settings.reference_mode == "auto" else settings.reference_mode
    if mode != "cached":
        reference = build_reference(
            policy, mode, fresh_adapter=built.fresh_adapter, path=other, policy_folder=inputs.folder, settings=settings
        )
        _check_start(policy, reference, train, same=other is None)
        log.info("reference: %s", "the base under the fresh adapter" if mode == "adapter" else "a frozen copy")
        return list(train), list(held_out), reference
    if other is None:  # nothing is trained yet: the policy itself is the reference
        reference = Reference(policy, "copy")
        model = inputs.fingerprints["model"]
    else:
        reference = build_reference(policy, "copy", path=other, policy_folder=inputs.folder, settings=settings)
        model = fingerprint_model(fetch_model_folder(other))
    used = find_used(settings, train, runtime.world)
    fresh = _attach_cached([train[i] for i in used], reference, model, settings, inputs, policy, stage_dir, runtime)
    complete = list(train)
    for i, group in zip(used, fresh, strict=True):
        complete[i] = group
    kept = _attach_cached(held_out, reference, model, settings, inputs, policy, stage_dir, runtime)
    _check_columns(policy, fresh, same=other is None)
    log.info("reference: log-probs of %d groups, cached in %s", len(fresh) + len(kept), stage_dir / "reference")
    return complete, kept, None


def find_used(settings: DpoSettings, train: Sequence[Group], world: int) -> list[int]:
    """Positions of the examples that the stage's steps will read: all, unless max_steps ends within the first epoch."""
    source = build_source(settings, train, world)
    if source.total_steps >= source.steps_per_epoch:
        return list(range(len(train)))
    rows = source.order(0)[: source.total_steps * source.batch_size]
    return sorted(int(i) for i in rows)


def _attach_cached(
    groups: Sequence[Group], reference: Reference, model: str, settings: DpoSettings, inputs: StageInputs,
    policy: Policy, stage_dir: Path, runtime: Runtime,
) -> list[Group]:  # fmt: skip
    if not groups:
        return []
    key = build_reference_key(
        model=model, groups=groups, settings=settings, template=inputs.tokenizer.chat_template, policy=policy
    )
    cache = ReferenceCache(stage_dir / "reference", key)
    budget = choose_budget(settings, runtime.device.type)
    found = runtime.gather(cache.load(groups) is not None if runtime.is_main else None)[0]
    if not found:
        share = range(runtime.rank, len(groups), runtime.world)
        with Progress("reference log-probs", len(share), quiet=not runtime.is_main) as progress:
            mine = compute_reference_table(
                reference, [groups[i] for i in share], budget=budget,
                on_batch=lambda done, total: progress.advance({}, steps=done - progress.done),
            )  # fmt: skip
        every = runtime.gather(mine)
        table = [every[i % runtime.world][i // runtime.world] for i in range(len(groups))]
        if runtime.is_main:
            cache.save(groups, table)
        return attach_table(groups, table)
    table = cache.load(groups)
    if table is None:
        raise BurnishError(
            "the cached reference log-probs vanished", where=str(cache.path), remedy="give the command again"
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

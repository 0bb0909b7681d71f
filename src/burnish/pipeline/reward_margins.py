"""The margins of a stage's pairs under a fixed reward model: scored once, before the policy is loaded."""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.engine.budget import choose_budget
from burnish.engine.job import build_source
from burnish.engine.method import Method
from burnish.engine.parallel.interface import Parallel
from burnish.errors import NumericStop
from burnish.losses.madpo import COLUMN
from burnish.models.folder import read_hidden_size
from burnish.models.frozen import load_frozen
from burnish.models.policy import Policy
from burnish.models.precision import resolve_precision
from burnish.models.quantise import read_quantization
from burnish.models.scores import ScoreCache, ScoreTable, compute_score_table
from burnish.models.stored import build_stored_key
from burnish.pipeline.reference import find_used
from burnish.pipeline.stored import OnBatch, load_or_compute

if TYPE_CHECKING:
    from burnish.pipeline.train_stage import StageInputs

log = logging.getLogger("burnish")


def attach_reward_margins(
    settings: TrainSettings, method: Method, inputs: StageInputs, cache_dir: Path, parallel: Parallel
) -> tuple[list[Group], list[Group]]:
    """(training pairs, held-out pairs) with the group column `reward_margin`: r(chosen) − r(rejected).

    Pairs that no step of the stage reads are left as they are. The reward model is loaded only where the cache lacks
    these scores, and its memory is given back before this returns.

    Args:
        cache_dir: Where the scores lie, under the key of all that they depend on.

    Raises:
        NumericStop: A score is not finite; the rows are named.
    """
    folder, runtime = inputs.reward_model, parallel.runtime
    assert folder is not None
    train, held_out = list(inputs.data.train), list(inputs.data.held_out)
    used = find_used(build_source(settings, train, runtime.world, method))
    groups = [*(train[i] for i in used), *held_out]
    precision = resolve_precision(settings.precision, runtime.device, read_hidden_size(folder), training=False)
    quantization = read_quantization(folder)
    form = {
        "compute": str(precision.compute or torch.float32),
        "weights": str(precision.frozen),
        "quantization": str(quantization),
        "attention": settings.attention,
        "device": runtime.device.type,
    }
    key = build_stored_key(
        model=inputs.fingerprints["reward_model"],
        groups=groups,
        settings=settings,
        template=inputs.tokenizer.chat_template,
        form=form,
    )

    budget = choose_budget(settings, runtime.device.type)

    def load() -> Policy:
        return load_frozen(
            folder,
            head="score",
            precision=precision,
            device=runtime.device,
            attention=settings.attention,
            quantization=quantization,
            trust_remote_code=settings.trust_remote_code,
            place=quantization is not None,
        )

    def compute(mine: list[Group], on_batch: OnBatch, forwards: int) -> ScoreTable:
        log.info("scoring the pairs with %s: %s", folder, precision.why)
        if quantization is not None:  # weights in few bits are not sharded
            return compute_score_table(load(), mine, budget=budget, on_batch=on_batch)
        policy = parallel.build(load)
        parallel.prepare({"reward": policy})
        return compute_score_table(policy, mine, budget=budget, on_batch=on_batch, forwards=forwards)

    cache = ScoreCache(cache_dir, key)
    table = load_or_compute(cache, groups, compute, runtime, budget=budget, label="reward model's scores")
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    scored = attach_margins(groups, table)
    log.info("reward model: margins of %d pairs, scores cached in %s", len(scored), cache_dir)
    for i, group in zip(used, scored, strict=False):
        train[i] = group
    return train, scored[len(used) :]


def attach_margins(groups: Sequence[Group], table: ScoreTable) -> list[Group]:
    """The pairs with their margins.

    Raises:
        NumericStop: A score is not finite.
    """
    margins = [float(chosen) - float(rejected) for chosen, rejected in table]
    bad = [group.id for group, margin in zip(groups, margins, strict=True) if not math.isfinite(margin)]
    if bad:
        raise NumericStop(
            f"the reward model gives a non-finite score on {len(bad)} pairs: {', '.join(bad[:5])}",
            where="reward_model",
            remedy="use precision fp32; if it stays, the reward model's weights are damaged",
        )
    return [replace(g, columns={**g.columns, COLUMN: m}) for g, m in zip(groups, margins, strict=True)]

"""KTO and distillation train pocket: after 40 steps the loss on 64 fixed pairs (texts) is down by more than 2 standard errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from burnish.config.stages import DistillSettings, KtoSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.context import StepContext
from burnish.engine.forward import call_models
from burnish.engine.method import arrange_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import compute_gradient
from burnish.losses.kto import compute_apo_zero_unpaired_loss, compute_kl_baseline, compute_kto_loss
from burnish.methods.distill import Distill
from burnish.methods.kto import Kto
from burnish.models.load import build_model
from burnish.models.policy import Policy
from burnish.models.reference import Reference, build_reference
from burnish.pipeline.train_stage import load_inputs
from tests.config.recipes import one

STEPS, BATCH, FIXED = 40, 8, 64
WEIGHTS = {"desirable_weight": 1.0, "undesirable_weight": 1.0}


def load(kind: str, model: str, **settings: Any) -> tuple[Policy, list[torch.nn.Parameter], list[Group]]:
    found = one(kind, validation_split=0.0, seed=1, max_samples=STEPS * BATCH + FIXED, **settings)
    inputs = load_inputs(found, model, lambda folder: "")
    built = build_model(found, inputs.path, head="lm", seed=0)
    return Policy(built.model, head="lm"), list(built.trainable.values()), list(inputs.data.train)


def train(ctx: StepContext, groups: list[Group], rate: float) -> None:
    policy: Any = ctx.models["policy"]
    optimizer = torch.optim.AdamW(ctx.parameters, lr=rate, weight_decay=0.0, fused=True)
    for step in range(STEPS):
        policy.train(True)
        rows = groups[step * BATCH : (step + 1) * BATCH]
        plan = build_plan(rows, budget=2048, coupled=ctx.method.coupled)
        assert not compute_gradient(ctx, rows, plan, {}, step).bad
        torch.nn.utils.clip_grad_norm_(ctx.parameters, 1.0)
        optimizer.step()
    policy.train(False)


def check(name: str, before: torch.Tensor, after: torch.Tensor) -> None:
    fall = before.double() - after.double()
    error = float(fall.std() / len(fall) ** 0.5)
    print(f"{name}: {float(before.mean()):.4f}, fell by {float(fall.mean()):.4f}, standard error {error:.4f}")
    assert float(fall.mean()) > 2 * error


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["kto", "apo_zero_unpaired"])
def test_kto_on_fixed_pairs(loss_type: Any) -> None:
    """Pairs taken apart; a pair's loss is the mean of its two rows."""
    policy, parameters, groups = load("kto", "pocket", data="pocket/preferences")
    method = Kto(KtoSettings(loss_type=loss_type))
    fixed = arrange_groups(method, groups[: 2 * FIXED])
    rest = groups[2 * FIXED :]
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(0)).tolist()
    rows = arrange_groups(method, [rest[i] for i in order])
    reference = build_reference(policy, "copy")
    ctx = StepContext(
        {"policy": policy},
        method,
        build_parallel(Runtime(torch.device("cpu"))),
        parameters,
        seed=0,
        reference=reference,
    )

    @torch.no_grad()
    def measure() -> torch.Tensor:
        batch = build_packed_batch(fixed)
        found = policy(batch, method.want["policy"]).logprobs
        assert found is not None
        ratio = batch.table.sum_tokens(found - reference.logprobs(batch))
        own, label = batch.table.slot(ratio, 0), batch.table.group_columns["label"]
        if not method.has_baseline:
            return compute_apo_zero_unpaired_loss(own, label, beta=0.1, **WEIGHTS).view(FIXED, 2).mean(1)
        baseline = compute_kl_baseline(batch.table.slot(ratio, 1))
        return compute_kto_loss(own, label, baseline, beta=0.1, **WEIGHTS).view(FIXED, 2).mean(1)

    policy.train(False)
    before = measure()
    torch.testing.assert_close(before, torch.full((FIXED,), 0.5), rtol=0, atol=1e-4)
    train(ctx, rows, 1e-5)
    check(loss_type, before, measure())


@pytest.mark.slow
@pytest.mark.parametrize("loss_type", ["forward_kl", "reverse_kl", "jsd"])
def test_distillation_on_fixed_rows(loss_type: Any) -> None:
    """A small model learns the bundled larger one's distribution."""
    policy, parameters, groups = load("distill", "pocket-small", data="pocket/chat", teacher="pocket")
    teacher, _, _ = load("sft", "pocket", data="pocket/chat")
    method = Distill(DistillSettings(loss_type=loss_type))
    ctx = StepContext(
        {"policy": policy},
        method,
        build_parallel(Runtime(torch.device("cpu"))),
        parameters,
        seed=0,
        reference=Reference(teacher, "copy"),
    )

    @torch.no_grad()
    def measure() -> torch.Tensor:
        batch = build_packed_batch([replace(g, id=f"{i}") for i, g in enumerate(groups[:FIXED])])
        table = batch.table
        return table.sum_tokens(call_models(ctx, batch).functionals["divergence"]) / table.completion_scored

    policy.train(False)
    before = measure()
    train(ctx, groups[FIXED:], 1e-4)
    check(loss_type, before, measure())

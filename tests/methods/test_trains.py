"""Every loss type trains pocket: after 40 steps the loss on 64 fixed pairs is below its start by more than 2 standard errors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from burnish.config.stages import DpoSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.engine.context import StepContext
from burnish.engine.forward import call_models
from burnish.engine.method import build_initial_state
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import compute_gradient
from burnish.methods.dpo import Dpo
from burnish.models.load import build_model
from burnish.models.policy import Policy
from burnish.models.reference import Reference, attach_table, build_reference, compute_reference_table
from burnish.pipeline.train_stage import load_inputs
from tests.config.recipes import one
from tests.losses.drawn import REGISTERED, build_method

STEPS, BATCH, FIXED = 40, 4, 64
LEARNING_RATE = 1e-5  # at 5e-5 forward_kl runs away: e^(−a) of a chosen answer that sinks
IN_THE_DEFAULT_SUITE = ("dpo aot", "orpo orpo")
METHODS: dict[str, Any] = {
    **{str(case): (lambda case=case: build_method(case)) for case in REGISTERED},
    "rpo": lambda: Dpo(DpoSettings(loss_type=["sigmoid", "sft"])),
    "wpo": lambda: Dpo(DpoSettings(use_weighting=True)),
    "ld": lambda: Dpo(DpoSettings(ld_alpha=0.5)),
    "js_divergence": lambda: Dpo(DpoSettings(f_divergence_type="js_divergence")),
    "forward_kl": lambda: Dpo(DpoSettings(f_divergence_type="forward_kl")),
}


@dataclass
class Pocket:
    """Pocket as it is bundled, with pairs that carry its own log-probs as the reference's, and a copy for live references."""

    policy: Policy
    reference: Reference
    parameters: list[torch.nn.Parameter]
    start: list[torch.Tensor]
    train: Sequence[Group]
    fixed: Sequence[Group]


@pytest.fixture(scope="module")
def pocket() -> Pocket:
    settings = one("dpo", max_samples=STEPS * BATCH + FIXED, validation_split=0.0, seed=1)
    inputs = load_inputs(settings, "pocket", lambda folder: "")
    built = build_model(settings, inputs.path, head="lm", seed=0)
    policy = Policy(built.model, head="lm")
    groups = list(inputs.data.train)
    groups = attach_table(groups, compute_reference_table(Reference(policy, "copy"), groups, budget=4096))
    parameters = list(built.trainable.values())
    assert len(groups) == STEPS * BATCH + FIXED
    frozen = build_reference(policy, "copy")
    return Pocket(policy, frozen, parameters, [p.detach().clone() for p in parameters], groups[FIXED:], groups[:FIXED])


def measure(method: Any, pocket: Pocket, ctx: StepContext) -> torch.Tensor:
    """(64,) the loss of each fixed pair.

    A running state is that of the start, a loss on tokens counts a mean answer's length, and weights are left out: WPO's
    move with the policy, and few pairs have almost all of them.
    """
    pocket.policy.train(False)
    total = torch.zeros(FIXED, dtype=torch.float64)
    with torch.no_grad():
        batch = build_packed_batch(pocket.fixed)
        outputs = call_models(ctx, batch)
    pairs = method.compute_pairs(outputs, batch.table)
    for loss_type in method.mix:
        loss = loss_type.compute(pairs).loss.double()
        total += loss_type.weight * (loss / pairs.chosen_tokens.mean() if loss_type.entry.unit == "token" else loss)
    return total


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in IN_THE_DEFAULT_SUITE else pytest.mark.slow) for n in METHODS]
)
def test_the_loss_on_fixed_pairs_falls(name: str, pocket: Pocket) -> None:
    method = METHODS[name]()
    with torch.no_grad():
        for parameter, value in zip(pocket.parameters, pocket.start, strict=True):
            parameter.copy_(value)
    ctx = StepContext(
        {"policy": pocket.policy}, method, build_parallel(Runtime(torch.device("cpu"))), pocket.parameters, seed=0
    )
    ctx.reference = pocket.reference if "logits" in method.reference else None
    before, state = measure(method, pocket, ctx), build_initial_state(method)
    optimizer = torch.optim.AdamW(pocket.parameters, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    for step in range(STEPS):
        pocket.policy.train(True)
        groups = pocket.train[step * BATCH : (step + 1) * BATCH]
        plan = build_plan(groups, budget=4096, coupled=method.coupled)
        found = compute_gradient(ctx, groups, plan, state, step)
        assert not found.bad
        state = found.state if found.state is not None else state
        torch.nn.utils.clip_grad_norm_(pocket.parameters, 1.0)
        optimizer.step()
    fall = before - measure(method, pocket, ctx)
    error = fall.std() / FIXED**0.5
    print(f"{name}: {float(before.mean()):.4f}, fell by {float(fall.mean()):.4f}, standard error {float(error):.4f}")
    assert float(fall.mean()) > 2 * float(error)

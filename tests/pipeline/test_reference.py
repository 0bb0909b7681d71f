"""The reference of a stage: stored log-probs, a frozen copy and the base under a fresh adapter are one reference."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from burnish.config.registry import KINDS, load_object
from burnish.config.spec import ModelSpec
from burnish.core.batch import build_packed_batch
from burnish.engine.context import StepContext
from burnish.engine.evaluation import run_evaluation
from burnish.engine.job import build_source
from burnish.engine.method import arrange_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import compute_gradient
from burnish.models.precision import resolve_precision
from burnish.pipeline.reference import attach_reference
from burnish.pipeline.stage_models import load_stage_model
from burnish.pipeline.train_stage import load_inputs
from tests.config.recipes import one
from tests.models.small import shake

RUNTIME = Runtime(torch.device("cpu"))
STAGES: dict[str, dict[str, Any]] = {
    "dpo": {"kind": "dpo"},
    "ipo": {"kind": "dpo", "loss_type": "ipo"},
    "kto": {"kind": "kto"},
    "kto without a baseline": {"kind": "kto", "loss_type": "apo_zero_unpaired"},
}


@dataclass
class Found:
    """Of a step in the second epoch and of the held-out rows, with a policy that has moved away."""

    logprobs: Tensor
    figures: dict[str, float]
    gradient: Tensor
    evaluation: dict[str, float]


def measure(inputs: Path, cache: Path, mode: str, stage: dict[str, Any]) -> Found:
    settings = one(
        data=str(inputs / "pairs.jsonl"),
        validation_split=0.25,
        batch_size=8,
        num_train_epochs=2.0,
        seed=3,
        reference_mode=mode,
        lora={"r": 4},
        **stage,
    )
    found = load_inputs(settings, str(inputs / "model"), lambda folder: "")
    spec, precision = ModelSpec(), resolve_precision("fp32", RUNTIME.device, 32)
    model = load_stage_model("policy", spec, settings, found.path, found.folder, precision, build_parallel(RUNTIME))
    built, policy = model.built, model.policy
    method = load_object(KINDS[settings.kind].runner)(settings)
    held_out = arrange_groups(method, found.data.held_out)
    data = attach_reference(
        settings, method, found, {"policy": model}, found.data.train, held_out, cache, build_parallel(RUNTIME)
    )
    assert (data.model is None) == (mode == "cached"), "in the mode that was asked for"
    source = build_source(settings, data.train, 1, method, data.complete)
    groups = source.step(source.steps_per_epoch + 1).groups
    shake(built.trainable.values(), 0.1)
    parameters = list(built.trainable.values())
    ctx = StepContext({"policy": policy}, method, build_parallel(RUNTIME), parameters, seed=0, reference=data.model)
    batch = build_packed_batch(groups)
    logprobs = batch.table.token_columns["ref_logprobs"] if data.model is None else data.model.logprobs(batch)
    result = compute_gradient(ctx, groups, build_plan(groups, budget=200, coupled=method.coupled), {}, step=0)
    assert not result.bad
    gradient = torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None])
    return Found(logprobs, result.figures, gradient, run_evaluation(ctx, data.held_out, {}, budget=200, chunk=8))


@pytest.mark.parametrize("name", STAGES)
def test_a_reference_that_is_stored_and_one_that_is_run_agree_to_1e_5(inputs: Path, tmp_path: Path, name: str) -> None:
    """Log-probs of the reference, loss, gradient and held-out loss, in fp32; made, read back from disk, copy, adapter."""
    made = measure(inputs, tmp_path, "cached", STAGES[name])
    assert list(tmp_path.glob("reference-*")), "stored"
    others = {mode: measure(inputs, tmp_path, mode, STAGES[name]) for mode in ("cached", "copy", "adapter")}
    assert made.gradient.norm() > 1e-3 and made.evaluation["eval_loss"] > 0
    if name == "kto":
        assert made.figures["kl"] > 0, "the baseline takes part"
    for mode, found in others.items():
        torch.testing.assert_close(found.logprobs, made.logprobs, rtol=0, atol=1e-5, msg=mode)
        assert found.figures["loss"] == pytest.approx(made.figures["loss"], rel=0, abs=1e-5), mode
        torch.testing.assert_close(found.gradient, made.gradient, rtol=0, atol=1e-5, msg=mode)
        assert (found.gradient - made.gradient).norm() / made.gradient.norm() < 1e-5, mode
        assert found.evaluation == pytest.approx(made.evaluation, rel=1e-5, abs=1e-5), mode
    assert torch.equal(others["cached"].logprobs, made.logprobs), "what is read back is what was stored"

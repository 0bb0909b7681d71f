"""The micro-batch budget: sized by free memory, halved when memory runs out, kept, and the gradient the same throughout."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.train import TrainSettings
from burnish.engine.budget import LEAST, MOST, Budget, estimate_token_bytes, find_smaller, size_budget
from burnish.engine.loop import Trainer
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.state import TrainState
from burnish.errors import ResourceError
from tests.engine.tiny import build_groups
from tests.reliability.stages import build_job

GB = 1 << 30


def _train(folder: Path, **changes: Any) -> Trainer:
    trainer = Trainer(build_job(folder, **{"optim": "sgd"} | changes))  # sgd: AdamW's first steps blow up rounding
    trainer.run()
    return trainer


def _gap(a: Trainer, b: Trainer) -> float:
    return max(float((p - q).detach().abs().max()) for p, q in zip(a.parameters, b.parameters, strict=True))


@pytest.mark.parametrize("fault", ["step.forward:2", "step.backward:3", "step.backward:5"])
def test_memory_that_runs_out_in_a_step_repeats_it_in_smaller_pieces(
    tmp_path: Path, arm_fault: Any, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    """The step is done again with half the budget, said once, kept; parameters as without, to rounding."""
    calm = _train(tmp_path / "calm")
    arm_fault(f"{fault}:oom")
    with caplog.at_level(logging.WARNING, logger="burnish"):
        found = _train(tmp_path / "found")
    said = [r.getMessage() for r in caplog.records if "out of memory" in r.getMessage()]
    assert len(said) == 1 and "the same gradient" in said[0]
    limit = found.state.counters.budget_limit
    assert 0 < limit < 8192 and found.budget.tokens == limit and str(limit) in said[0]
    assert found.state.counters.updates == calm.state.counters.updates == 10
    assert _gap(found, calm) < 1e-5
    assert _gap(found, _train(tmp_path / "first", max_steps=1)) > 1e-3


def test_the_steps_after_are_those_of_the_smaller_budget_to_the_bit(tmp_path: Path, arm_fault: Any) -> None:
    """From the first step on with the smaller size: nothing of the attempt that failed is left."""
    arm_fault("step.backward:1:oom")
    found = _train(tmp_path / "found")
    arm_fault("")
    small = _train(tmp_path / "small", micro_batch_tokens=found.state.counters.budget_limit)
    assert _gap(found, small) == 0.0


def test_a_resumed_run_keeps_the_smaller_size(tmp_path: Path, arm_fault: Any) -> None:
    arm_fault("step.backward:2:oom")
    found = _train(tmp_path / "run")
    arm_fault("")
    limit = found.state.counters.budget_limit
    state = json.loads((tmp_path / "run" / "checkpoint-10" / "state.json").read_text())
    assert state["counters"]["budget_limit"] == limit
    again = Trainer(build_job(tmp_path / "run", resume=True, optim="sgd"))
    assert again.saves.resume() == 10 and again.budget.tokens == limit


def test_memory_that_never_suffices_stops_with_the_state_before(tmp_path: Path, arm_fault: Any) -> None:
    """Down to single rows, then the message; the budget that did not help is not kept."""
    arm_fault("step.backward:4+:oom")
    trainer = Trainer(build_job(tmp_path / "run"))
    with pytest.raises(ResourceError, match="out of memory in phase backward after step 3"):
        trainer.run()
    assert trainer.state.counters.step == 3 and trainer.state.counters.budget_limit == 0
    assert all(p.grad is None for p in trainer.parameters)


def test_an_evaluation_is_repeated_in_smaller_pieces_too(tmp_path: Path, arm_fault: Any) -> None:
    calm = _train(tmp_path / "calm")
    arm_fault("evaluation.forward:1:oom")
    found = _train(tmp_path / "found")
    assert found.state.counters.budget_limit > 0
    assert found.record.evaluation["eval_loss"] == pytest.approx(calm.record.evaluation["eval_loss"], rel=1e-5)


def test_other_errors_are_not_repeated(tmp_path: Path, arm_fault: Any) -> None:
    arm_fault("step.forward:2:raise")
    with pytest.raises(RuntimeError, match="fault injected"):
        _train(tmp_path / "run")


def test_what_is_tried_next_cuts_the_largest_micro_batch() -> None:
    groups = build_groups(6)
    tokens = sum(g.tokens for g in groups)
    plan = build_plan(groups, budget=10_000)
    smaller = find_smaller(plan, groups, 10_000)
    assert smaller is not None and smaller <= 0.6 * tokens
    assert len(build_plan(groups, budget=smaller).of(0)) > 1
    single = build_groups(3, k=1)
    assert find_smaller(build_plan(single, budget=1), single, 1) is None


def test_g08_the_budget_follows_free_memory() -> None:
    from transformers import Qwen3Config

    small = Qwen3Config(hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, head_dim=128)
    each = estimate_token_bytes(small, 2, checkpointing=False)
    assert estimate_token_bytes(small, 4, checkpointing=False) > each
    assert estimate_token_bytes(small, 2, checkpointing=True) < each / 5
    found = [size_budget(free * GB, each, 8 * GB) for free in (8, 16, 24, 40, 80, 160, 10_000)]
    assert found == sorted(found) and found[0] == LEAST and found[-1] == MOST and len(set(found)) > 4
    assert all(n & (n - 1) == 0 for n in found)
    assert size_budget(40 * GB, each, 8 * GB) == size_budget(40 * GB + 50_000_000, each, 8 * GB)
    assert found[3] * each <= 32 * GB


def test_g08_auto_is_sized_once_and_recorded(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """On CUDA, by what is free when the models are there; a restored state keeps its number; what is set is not changed."""
    from tests.engine.tiny import build_policy

    policy = build_policy()
    free = [40 * GB]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[0], 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    runtime = Runtime(torch.device("cuda", 0))

    def build(setting: Any) -> Budget:
        return Budget(TrainSettings(kind="sft", micro_batch_tokens=setting), TrainState({}, None, {}), runtime)  # pyright: ignore

    auto = build("auto")
    with caplog.at_level(logging.INFO, logger="burnish"):
        auto.size({"policy": policy}, list(policy.parameters()))
    assert auto.tokens == auto._state.counters.auto_budget == MOST and "micro_batch_tokens" in caplog.text
    free[0] = 0
    auto.size({"policy": policy}, list(policy.parameters()))
    assert auto.tokens == MOST
    fresh = build("auto")
    fresh.size({"policy": policy}, list(policy.parameters()))
    assert fresh.tokens == LEAST
    given = build(777)
    given.size({"policy": policy}, list(policy.parameters()))
    assert given.tokens == 777 and given._state.counters.auto_budget == 0
    given._state.counters.auto_budget = MOST  # of a run that was begun with auto
    assert given.tokens == 777

"""Steps on a CUDA device: bf16, fp16 with its loss scale, 8-bit AdamW, one wait a step; skipped where there is none."""

from __future__ import annotations

import importlib.util
import warnings

import pytest
import torch

from burnish.config.train import TrainSettings
from burnish.core.batch import build_packed_batch
from burnish.engine.context import StepContext
from burnish.engine.optimizer import build_optimizer, build_parameter_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.state import TrainState
from burnish.engine.step import compute_gradient
from burnish.engine.update import run_update
from burnish.models.policy import Policy
from tests.engine.tiny import VOCAB, build_groups, build_method

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def _policy(compute: torch.dtype | None, attention: str = "sdpa", device: str = "cuda") -> Policy:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).to(device)  # pyright: ignore[reportArgumentType]
    return Policy(model, head="lm", attention=attention, compute_dtype=compute)


def _train(
    policy: Policy, optim: str = "adamw", scale: float | None = None, steps: int = 3
) -> tuple[list[float], TrainState]:
    method, _, k, reference = build_method("sigmoid")
    groups = build_groups(5, k=k, reference=reference)
    trainable = dict(policy.named_parameters())
    settings = TrainSettings(kind="dpo", optim=optim, learning_rate=1e-3)  # pyright: ignore[reportArgumentType]
    optimizer = build_optimizer(build_parameter_groups(trainable, settings, no_decay=(), head=()), settings)
    state = TrainState(trainable=trainable, optimizer=optimizer, method={}, scale=scale)
    ctx = StepContext(
        {"policy": policy}, method, build_parallel(Runtime(policy.device)), list(trainable.values()), seed=0
    )
    losses = []
    for step in range(steps):
        ctx.scale = state.scale
        gradient = compute_gradient(ctx, groups, build_plan(groups, budget=60), {}, step)
        update = run_update(state, ctx.parameters, settings, steps, gradient, ctx.parallel)
        if update.applied:
            losses.append(gradient.figures["loss"])
    return losses, state


@pytest.mark.parametrize("attention", ["sdpa", "flex"])
def test_fp32_equals_the_cpu(attention: str) -> None:
    expected, _ = _train(_policy(None, device="cpu"))
    found, _ = _train(_policy(None, attention))
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("attention", ["varlen", "sdpa", "flex"])
def test_bf16_stays_near_fp32(attention: str) -> None:
    expected, _ = _train(_policy(None))
    found, state = _train(_policy(torch.bfloat16, attention))
    assert found == pytest.approx(expected, rel=5e-2)
    assert all(p.dtype == torch.float32 for p in state.trainable.values())


def test_fp16_overflows_lower_the_scale_and_then_train() -> None:
    """A scale far too large: the first steps change nothing but the scale; in the end the loss is that of fp32."""
    expected, _ = _train(_policy(None), steps=1)
    found, state = _train(_policy(torch.float16), scale=2.0**40, steps=40)
    assert state.counters.overflows > 0 and state.scale is not None and state.scale < 2.0**40
    assert found[0] == pytest.approx(expected[0], rel=5e-2)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_adamw_8bit_follows_adamw() -> None:
    expected, _ = _train(_policy(None), steps=6)
    found, _ = _train(_policy(None), optim="adamw_8bit", steps=6)
    assert found[-1] < found[0]
    assert found == pytest.approx(expected, rel=0.1)


def test_a_step_waits_once() -> None:
    """CUDA's own watch: every synchronising call warns; the fetch is one, and there is no second."""
    policy = _policy(torch.bfloat16)
    _train(policy, steps=1)  # kernels, caches
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            _train(policy, steps=3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    waits = [w for w in seen if "synchroniz" in str(w.message).lower()]
    assert len(waits) <= 3, [str(w.message) for w in waits]


def test_a_batch_moves_whole() -> None:
    batch = build_packed_batch(build_groups(3, reference=True)).to("cuda")
    table = batch.table
    tensors = [batch.input_ids, batch.position_ids, batch.source_index, table.token_completion]
    tensors += [*table.token_columns.values(), *table.group_columns.values(), *table.slot_rows.values()]
    assert all(t.device.type == "cuda" for t in tensors)

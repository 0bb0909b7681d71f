"""Packed rows against padded rows and against one eager pass per completion, family by family (R-22, T-29)."""

from __future__ import annotations

import copy

import pytest
import torch

from burnish.core.batch import build_packed_batch
from burnish.models.policy import Policy
from tests.models import packing

LOGPROBS = frozenset({"logprobs"})


def _outcome(policy: Policy, batch) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probs, gradients of all parameters)."""
    logprobs = policy(batch, LOGPROBS).logprobs
    packing.weigh(logprobs).backward()
    return logprobs.detach(), packing.take_gradients(policy.model)


def _separate(model, groups) -> tuple[torch.Tensor, torch.Tensor]:
    logprobs = packing.run_separately(model, groups)
    packing.weigh(logprobs).backward()
    return logprobs.detach(), packing.take_gradients(model)


def sample(families: tuple[str, ...], default: set[str]) -> list:
    """By default some families that differ in what matters here, all of them in the slow suite."""
    return [pytest.param(name, marks=() if name in default else pytest.mark.slow) for name in families]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
@pytest.mark.parametrize("family", sample(packing.PACKED, {"qwen3", "mistral_window", "gpt2", "gpt_neox"}))
def test_r22_t29_packed_equals_padded_and_separate(family: str, seed: int) -> None:
    model = packing.build_model(family, seed=seed, **packing.draw_fields(family, seed))
    groups = packing.draw_groups(seed)
    batch = build_packed_batch(groups)
    expected, expected_gradient = _separate(model, groups)
    for attention in ("sdpa", "padded"):
        policy = Policy(copy.deepcopy(model), head="lm", attention=attention)
        assert policy.backend == attention, policy.why_padded
        logprobs, gradient = _outcome(policy, batch)
        assert (logprobs - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert packing.relative(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("family", sample(packing.PACKED_SPECIAL, {"qwen2_window", "gemma2", "gpt_oss"}))
def test_r22_windows_softcaps_and_sinks_pack_exactly(family: str) -> None:
    model = packing.build_model(family)
    groups = packing.draw_groups(3)
    expected, expected_gradient = _separate(model, groups)
    policy = Policy(model, head="lm")
    assert policy.backend == "sdpa", policy.why_padded
    logprobs, gradient = _outcome(policy, build_packed_batch(groups))
    assert (logprobs - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert packing.relative(gradient, expected_gradient) <= 2e-5


@pytest.mark.parametrize("family", sample(packing.PADDED, {"bloom", "gptj", "mamba"}))
def test_unpackable_families_fall_back_and_say_so(family: str, caplog: pytest.LogCaptureFixture) -> None:
    model = packing.build_model(family)
    groups = packing.draw_groups(4)
    expected, expected_gradient = _separate(model, groups)
    with caplog.at_level("INFO", logger="burnish"):
        policy = Policy(model, head="lm")
    assert policy.backend == "padded"
    assert type(model).__name__ in policy.why_padded and "padded" in policy.why_padded
    assert sum(policy.why_padded in record.message for record in caplog.records) == 1
    logprobs, gradient = _outcome(policy, build_packed_batch(groups))
    assert (logprobs - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert packing.relative(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox"])
def test_r22_float64_packed_equals_padded_to_1e_10(family: str) -> None:
    """Families whose norms compute in the input's type; RMS norms of the library go through fp32."""
    model = packing.build_model(family, dtype=torch.float64)
    batch = packing.draw_batch(5)
    packed = _outcome(Policy(copy.deepcopy(model), head="lm", attention="sdpa"), batch)
    padded = _outcome(Policy(model, head="lm", attention="padded"), batch)
    assert (packed[0] - padded[0]).abs().max() <= 1e-10
    assert packing.relative(packed[1], padded[1]) <= 1e-10


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "stablelm", "gemma2"])
def test_r22_gradient_checkpointing_recomputes_with_the_layout_of_its_own_forward(family: str) -> None:
    """Two batches of equal length are forwarded before either is back-propagated."""
    model = packing.build_model(family)
    plain = Policy(copy.deepcopy(model), head="lm", attention="sdpa")
    checked = Policy(model, head="lm", attention="sdpa")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    rng = packing.np.random.default_rng(0)
    one = build_packed_batch([packing.draw_group(rng, "a", 9, [3, 4]), packing.draw_group(rng, "b", 2, [6])])
    two = build_packed_batch([packing.draw_group(rng, "c", 3, [9, 2]), packing.draw_group(rng, "d", 7, [3])])
    assert one.layout.total == two.layout.total
    gradients = []
    for policy in (plain, checked):
        outputs = [policy(batch, LOGPROBS).logprobs for batch in (one, two)]
        packing.weigh(torch.cat(outputs)).backward()
        gradients.append(packing.take_gradients(policy.model))
    assert packing.relative(gradients[1], gradients[0]) <= 1e-6


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "phi3"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_r22_lora_packed_equals_separate(family: str, checkpointing: bool) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        packing.build_model(family),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"),
    )
    groups = packing.draw_groups(6)
    expected = packing.run_separately(model.get_base_model(), groups)
    packing.weigh(expected).backward()
    expected_gradient = packing.take_gradients(model)
    policy = Policy(model, head="lm", attention="sdpa")
    if checkpointing:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    logprobs, gradient = _outcome(policy, build_packed_batch(groups))
    assert (logprobs - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert packing.relative(gradient, expected_gradient) <= 1e-5


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "gpt_neox", "mistral_window"])
def test_scores_packed_equal_separate(family: str) -> None:
    model = packing.build_model(family, head="score")
    groups = packing.draw_groups(7)
    policy = Policy(model, head="score")
    assert policy.backend == "sdpa"
    scores = policy(build_packed_batch(groups), frozenset({"scores"})).scores
    expected = []
    with policy.unpacked():
        for group in groups:
            for c in group.completions:
                ids = torch.from_numpy(packing.np.concatenate((group.prompt, c.ids)).astype("int64"))[None]
                expected.append(model(ids).logits[0, 0])
    expected = torch.stack(expected)
    assert (scores - expected).abs().max() <= 1e-5 * expected.abs().max()

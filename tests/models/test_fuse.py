"""Fused blocks against the library's own modules: hidden states, every gradient, and when they step aside."""

from __future__ import annotations

import contextlib
import copy
import pickle

import pytest
import torch

from burnish.core import block_attention
from burnish.core.kernels import calls
from burnish.core.kernels.build import load_kernels
from burnish.models import fuse
from burnish.models.fuse import fuse_blocks, split_blocks
from burnish.models.policy import Policy
from tests.models import packing

LOGPROBS = frozenset({"logprobs"})
FAMILIES = ("llama", "qwen3", "mistral", "mistral_window", "qwen2_window")


def _pair(family: str, **fields) -> tuple[Policy, Policy]:
    """(fused, not fused) policies with the same weights."""
    model = packing.build_model(family, **fields)
    plain = Policy(copy.deepcopy(model), head="lm", attention="sdpa")
    split_blocks(plain.backbone)
    fused = Policy(model, head="lm", attention="sdpa")
    assert "forward" in fused.backbone.layers[0].__dict__ and "forward" not in plain.backbone.layers[0].__dict__
    return fused, plain


def _outcome(policy: Policy, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    out = policy(batch, LOGPROBS).logprobs
    assert out is not None
    packing.weigh(out).backward()
    gradients = {name: p.grad for name, p in policy.named_parameters()}
    for p in policy.parameters():
        p.grad = None
    return out.detach(), gradients


def _agree(policies: tuple[Policy, Policy], seed: int = 0, limit: float = 1e-5) -> None:
    batch = packing.draw_batch(seed)
    (a, ga), (b, gb) = (_outcome(p, batch) for p in policies)
    assert (a - b).abs().max() <= limit * b.abs().max()
    assert ga.keys() == gb.keys()
    whole = torch.cat([g.flatten() for g in gb.values() if g is not None]).norm()
    for name, g in gb.items():
        mine = ga[name]
        assert (mine is None) == (g is None), name
        if g is not None and mine is not None:
            assert mine.dtype == g.dtype and (mine - g).norm() <= limit * max(g.norm(), 0.01 * whole), name


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("way", ["kernels", "modules"])
def test_every_gradient_equals_the_modules(family: str, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by kernels, or by the library's modules beside the fused feed-forward half."""
    pair, taken = _pair(family), []
    attend = calls.attend
    monkeypatch.setattr(calls, "attend", lambda *args, **named: taken.append(1) or attend(*args, **named))
    if way == "modules":
        with calls.without_kernels():
            _agree(pair)
        assert not taken
        return
    if load_kernels().library is None:
        pytest.skip(load_kernels().note)
    _agree(pair)
    assert taken or family.endswith("window")


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_kernels_and_operations_agree(dtype: torch.dtype | None) -> None:
    """The whole policy with every kernel and with none; in bf16 to the rounding of its products."""
    if load_kernels().library is None:
        pytest.skip(load_kernels().note)
    policy = Policy(packing.build_model("qwen3"), head="lm", attention="sdpa", compute_dtype=dtype)
    batch = packing.draw_batch(3)
    found, gradients = _outcome(policy, batch)
    with calls.without_kernels():
        expected, others = _outcome(policy, batch)
    assert not torch.equal(found, expected), "both ran the same code"
    limit = 1e-5 if dtype is None else 0.03
    assert (found - expected).norm() <= limit * expected.norm()
    for name, g in others.items():
        mine = gradients[name]
        assert (g is None and mine is None) or (
            g is not None and mine is not None and (mine - g).norm() <= limit * g.norm().clamp_min(1e-3)
        ), name


def test_biases_and_equal_heads() -> None:
    _agree(_pair("llama", attention_bias=True, num_key_value_heads=4))
    _agree(_pair("llama", mlp_bias=True))


def test_frozen_parts_get_no_gradient() -> None:
    fused, plain = _pair("qwen3")
    for policy in (fused, plain):
        for name, p in policy.named_parameters():
            p.requires_grad_("layers.1" in name and "k_proj" not in name and "up_proj" not in name)
    _agree((fused, plain))


@pytest.mark.parametrize("way", ["kernels", "operations"])
def test_norms_alone_may_train(way: str) -> None:
    """Neither a layer's input nor its projections have a gradient: nothing of attention is kept for backward."""
    fused, plain = _pair("qwen3")
    for policy in (fused, plain):
        for name, p in policy.named_parameters():
            p.requires_grad_("norm" in name)
    with calls.without_kernels() if way == "operations" else contextlib.nullcontext():
        _agree((fused, plain))


def test_backward_goes_the_way_of_forward() -> None:
    """Kernels switched off between the passes: backward still reads what forward has left."""
    policy, _ = _pair("qwen3")
    batch = packing.draw_batch(0)
    _, expected = _outcome(policy, batch)
    out = policy(batch, LOGPROBS).logprobs
    assert out is not None
    with calls.without_kernels():
        packing.weigh(out).backward()
    for name, p in policy.named_parameters():
        g = expected[name]
        assert (p.grad is None and g is None) or (p.grad is not None and g is not None)
        if p.grad is not None and g is not None:
            assert (p.grad - g).norm() <= 1e-5 * g.norm().clamp_min(1e-3), name


def test_gradient_checkpointing_recomputes_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, plain = _pair("qwen3")
    fused.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    apply = fuse.AttentionHalf.apply
    monkeypatch.setattr(fuse.AttentionHalf, "apply", lambda *args: calls.append(1) or apply(*args))
    _agree((fused, plain))
    assert len(calls) == 2 * len(fused.backbone.layers)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["gate_proj", "down_proj"], "all-linear"])
def test_adapters_send_their_half_through_its_modules(targets) -> None:
    from peft import LoraConfig, get_peft_model

    model = packing.build_model("qwen3")
    config = LoraConfig(r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    plain = Policy(copy.deepcopy(adapted), head="lm", attention="sdpa")
    split_blocks(plain.backbone)
    _agree((Policy(adapted, head="lm", attention="sdpa"), plain))


def test_bf16_autocast_is_as_near_to_fp32_as_the_modules() -> None:
    model = packing.build_model("qwen3")
    batch = packing.draw_batch(1)
    exact, _ = _outcome(Policy(copy.deepcopy(model), head="lm", attention="sdpa"), batch)
    errors = []
    for fused in (True, False):
        policy = Policy(copy.deepcopy(model), head="lm", attention="sdpa", compute_dtype=torch.bfloat16)
        if not fused:
            split_blocks(policy.backbone)
        out, gradients = _outcome(policy, batch)
        assert all(g is not None and g.dtype == torch.float32 for g in gradients.values())
        errors.append(float((out - exact).norm()))
    assert errors[0] <= 1.5 * errors[1]


def test_the_last_block_computes_its_feed_forward_at_scored_rows_only(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = _pair("qwen3")
    batch = packing.draw_batch()
    rows = []
    apply = fuse.MlpHalf.apply
    monkeypatch.setattr(fuse.MlpHalf, "apply", lambda x, *rest: rows.append(len(x)) or apply(x, *rest))
    fused(batch, LOGPROBS)
    assert rows == [batch.layout.total, len(batch.source_index)]


def test_low_precision_rows_come_in_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each new shape of a bf16 product costs a kernel; the rows that are added move no number that is read."""
    model = packing.build_model("qwen3")
    policy = Policy(model, head="lm", attention="sdpa", compute_dtype=torch.bfloat16)
    batch = packing.draw_batch()
    sizes = []
    apply = fuse.MlpHalf.apply
    monkeypatch.setattr(fuse.MlpHalf, "apply", lambda x, *rest: sizes.append(len(x)) or apply(x, *rest))
    found, gradients = _outcome(policy, batch)
    assert batch.layout.total % 32 and all(size % 32 == 0 for size in sizes) and len(found) == len(batch.target_ids)
    monkeypatch.setattr(Policy, "_spare", lambda self, rows: 0)
    expected, exact = _outcome(policy, batch)
    assert (found - expected).abs().max() <= 0.02 * expected.abs().max()
    for name, g in exact.items():
        assert g is None or (gradients[name] - g).norm() <= 0.05 * g.norm(), name


def test_a_model_may_be_copied_pickled_and_unpacked() -> None:
    fused, _ = _pair("qwen3")
    batch = packing.draw_batch()
    expected = fused(batch, LOGPROBS).logprobs
    other = copy.deepcopy(fused)
    with torch.no_grad():
        for p in fused.parameters():
            p.zero_()
    assert torch.equal(other(batch, LOGPROBS).logprobs, expected)  # the copy runs its own weights
    assert torch.equal(pickle.loads(pickle.dumps(other))(batch, LOGPROBS).logprobs, expected)
    with other.unpacked() as model, torch.no_grad():
        assert model(torch.tensor([[5, 6, 7]])).logits.shape == (1, 3, packing.VOCABULARY)


def test_replaced_modules_hooks_and_other_architectures_are_left_alone() -> None:
    fused, _ = _pair("qwen3")
    batch = packing.draw_batch()
    seen = []
    fused.backbone.layers[0].mlp.up_proj.register_forward_hook(lambda *_: seen.append(1))
    fused(batch, LOGPROBS)
    assert seen == [1]
    assert fuse_blocks(packing.build_model("gemma2")) == 0
    assert fuse_blocks(packing.build_model("granite")) == 0
    assert fuse_blocks(packing.build_model("llama", hidden_act="gelu")) == 0


def test_rows_kept_for_the_kernels_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, _ = _pair("qwen3")
    batch = packing.draw_batch(0)
    kept, gradients = _outcome(fused, batch)
    monkeypatch.setattr(block_attention, "_KEEP", 0)
    again, others = _outcome(fused, batch)
    _are_equal(kept, again, gradients, others)


def _are_equal(kept, again, gradients, others) -> None:
    assert torch.equal(kept, again)
    for name, g in gradients.items():
        other = others[name]
        assert (g is None and other is None) or (g is not None and other is not None and torch.equal(g, other)), name


def test_a_second_derivative_is_refused() -> None:
    """The halves compute their gradients without autograd: a gradient of them would silently miss terms."""
    policy, _ = _pair("qwen3")
    out = policy(packing.draw_batch(0), LOGPROBS).logprobs
    assert out is not None
    first = torch.autograd.grad(packing.weigh(out), list(policy.parameters()), create_graph=True, allow_unused=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.stack([g.square().sum() for g in first if g is not None]).sum().backward()

"""Losses that read whole distributions of two models: closed forms, gradients, any cut, and what is never in memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.config.stages import DistillSettings, DpoSettings
from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.core.head import HeadInput
from burnish.engine.context import StepContext
from burnish.engine.evaluation import run_evaluation
from burnish.engine.forward import call_models
from burnish.engine.method import build_initial_state
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import compute_gradient
from burnish.errors import BurnishError, UsageError
from burnish.methods.distill import Distill
from burnish.methods.dpo import Dpo
from burnish.models.reference import Reference
from tests.engine.tiny import VOCAB, build_groups, build_policy, trainable
from tests.losses.dense import compute_dense, log_sum, probabilities, risk, sequential_kl

BETA, ALPHA, EPSILON = 0.3, 0.7, 0.05
TIDY: dict[str, Any] = {"beta": BETA}
METHODS: dict[str, Callable[[], Any]] = {
    "tdpo1": lambda: Dpo(DpoSettings(loss_type="tdpo1", **TIDY)),
    "tdpo2": lambda: Dpo(DpoSettings(loss_type="tdpo2", tdpo_alpha=ALPHA, **TIDY)),
    "radpo1": lambda: Dpo(DpoSettings(loss_type="radpo1", radpo_confidence=0.87, **TIDY)),
    "radpo2": lambda: Dpo(DpoSettings(loss_type="radpo2", radpo_confidence=0.33, tdpo_alpha=ALPHA, **TIDY)),
    "epsilon": lambda: Dpo(DpoSettings(loss_type="epsilon", epsilon=EPSILON, **TIDY)),
    "mix": lambda: Dpo(DpoSettings(loss_type=["tdpo2", "sigmoid", "epsilon"], use_weighting=True, **TIDY)),
    "forward_kl": lambda: Distill(DistillSettings(temperature=2.0)),
    "reverse_kl": lambda: Distill(DistillSettings(loss_type="reverse_kl", alpha=0.6)),
    "jsd": lambda: Distill(DistillSettings(loss_type="jsd", jsd_beta=0.3, alpha=0.25, temperature=1.5)),
}


def k_of(method: Any) -> int:
    return 1 if method.name == "distill" else 2


class Live:
    """A method with a policy in training and a live reference of other weights."""

    def __init__(self, name: str, *, n: int = 6, seed: int = 1, **config: Any) -> None:
        self.method = METHODS[name]()
        self.policy, other = build_policy(**config), build_policy(seed=seed, **config)
        self.policy.train(True)
        self.reference = Reference(other, "copy")
        self.groups = build_groups(n, k=k_of(self.method))
        self.parameters = trainable(self.policy)
        self.ctx = StepContext(
            {"policy": self.policy},
            self.method,
            build_parallel(Runtime(torch.device("cpu"))),
            list(self.parameters.values()),
            seed=0,
            reference=self.reference,
        )

    def step(self, budget: int = 10_000, cap: int | None = None, state: Any = None) -> tuple[Any, Tensor]:
        plan = build_plan(self.groups, budget=budget, cap=cap, coupled=self.method.coupled)
        found = compute_gradient(self.ctx, self.groups, plan, state or build_initial_state(self.method), step=0)
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters.values()]
        return found, torch.cat([g.reshape(-1) for g in grads])


# -- closed forms -------------------------------------------------------------------------------------------------------


def dense_pair(name: str, live: Live, group: Group) -> Tensor:
    """The loss of one pair from all logits of both models."""
    sides = [compute_dense(live.policy, live.reference.policy, group, slot) for slot in (0, 1)]
    ratio = [log_sum(own, y) - log_sum(other, y) for own, other, y in sides]
    margin = BETA * (ratio[0] - ratio[1])
    if name == "epsilon":
        margin = margin / (1 + EPSILON * dense_steps(sides))
    elif name.startswith("tdpo"):
        kl = [sequential_kl(side) for side in sides]
        margin -= BETA * (kl[1] - kl[0]) if name == "tdpo1" else ALPHA * BETA * (kl[1] - kl[0].detach())
    else:
        bad = [risk(side, 0.87 if name == "radpo1" else 0.33) for side in sides]
        margin -= BETA * (bad[1] - bad[0]) if name == "radpo1" else ALPHA * BETA * (bad[1] - bad[0].detach())
    return torch.log(1 + torch.exp(-margin))


def dense_steps(sides: Sequence[Any]) -> float:
    """+1, 0 or −1 from three log-ratios g⁻, g, g⁺ of the mixed logits."""
    down, here, up = (
        float(
            sum(
                sign * log_sum((1 + e) * own - e * other, y)
                for sign, (own, other, y) in zip((1, -1), sides, strict=True)
            ).detach()
        )  # type: ignore[union-attr]
        for e in (-EPSILON, 0.0, EPSILON)
    )
    return 1.0 if up > here > down else -1.0 if up < here < down else 0.0


def dense_tokens(name: str, live: Live, group: Group) -> tuple[Tensor, int]:
    """Σ of the distillation loss over the tokens of one completion, and their number."""
    own, other, y = compute_dense(live.policy, live.reference.policy, group, 0)
    t, alpha = {"forward_kl": (2.0, 1.0), "reverse_kl": (1.0, 0.6), "jsd": (1.5, 0.25)}[name]
    p, q = probabilities(other / t), probabilities(own / t)
    if name == "jsd":
        m = 0.3 * p + 0.7 * q
        value = 0.3 * (p * torch.log(p / m)).sum() + 0.7 * (q * torch.log(q / m)).sum()
    else:
        a, b = (p, q) if name == "forward_kl" else (q, p)
        value = (a * torch.log(a / b)).sum()
    return alpha * t * t * value - (1 - alpha) * log_sum(own, y), len(y)


@pytest.mark.parametrize("name", [n for n in METHODS if n != "mix"])
def test_values_and_gradients_equal_the_dense_computation(name: str) -> None:
    live = Live(name)
    found, gradient = live.step(budget=60)
    if live.method.name == "distill":
        rows = [dense_tokens(name, live, group) for group in live.groups]
        loss = torch.stack([value for value, _ in rows]).sum() / sum(n for _, n in rows)
    else:
        loss = torch.stack([dense_pair(name, live, group) for group in live.groups]).mean()
    assert found.figures["loss"] == pytest.approx(float(loss.detach()), rel=1e-10)
    expected = torch.autograd.grad(loss, list(live.parameters.values()), allow_unused=True)
    flat = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).reshape(-1)
            for g, p in zip(expected, live.parameters.values(), strict=True)
        ]
    )
    assert flat.norm() > 1e-3 and (gradient - flat).norm() / flat.norm() < 1e-10


@pytest.mark.parametrize("name", METHODS)
def test_r11_one_gradient_under_any_cut(name: str) -> None:
    live = Live(name)
    whole, expected = live.step()
    assert whole.bad == []
    for budget, cap in ((10_000, 1), (60, None), (12, None)):
        found, gradient = live.step(budget, cap)
        assert (gradient - expected).norm() / expected.norm() < 1e-10, (budget, cap)
        assert found.figures == pytest.approx(whole.figures, rel=1e-10, abs=1e-12)
        if whole.state is not None:
            assert found.state["losses"]["epsilon"] == pytest.approx(whole.state["losses"]["epsilon"], rel=1e-14)


@pytest.mark.parametrize("name", ["tdpo2", "epsilon", "jsd"])
def test_t33_evaluation_is_the_same_for_every_batch_size(name: str) -> None:
    live = Live(name)
    state = build_initial_state(live.method)
    found = [
        run_evaluation(live.ctx, live.groups, state, budget=b, cap=c) for b, c in ((12, 1), (60, 2), (10**6, None))
    ]
    assert found[0]["eval_loss"] > 0
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-10, abs=1e-12)
    assert state == build_initial_state(live.method), "an evaluation moves nothing"


def test_no_groups_give_zero_with_a_graph() -> None:
    for name in METHODS:
        live, batch = Live(name), build_packed_batch([])
        result = live.method.compute_loss(call_models(live.ctx, batch), batch.table, build_initial_state(live.method))
        for term in result.terms:
            assert (term.sum.item(), term.count) == (0.0, 0.0)
            term.sum.backward(retain_graph=True)
        assert all(p.grad is None or not p.grad.any() for p in live.policy.parameters()), name


# -- what they are at the edges -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tdpo1", "tdpo2", "radpo1", "radpo2", "epsilon"])
def test_s0_25_policy_equal_to_reference_is_ln_2_with_no_divergence(name: str) -> None:
    live = Live(name, seed=0)
    found, gradient = live.step()
    assert found.figures["loss"] == pytest.approx(0.6931471805599453, rel=1e-10)
    assert gradient.norm() > 1e-4
    for side in ("chosen", "rejected"):
        assert found.figures.get(f"divergence/{side}", 0.0) == pytest.approx(0.0, abs=1e-9)


def test_s0_24_epsilon_zero_is_dpo_bit_for_bit() -> None:
    live = Live("epsilon")
    plain = Dpo(DpoSettings(loss_type="sigmoid", beta=BETA))
    live.method = live.ctx.method = Dpo(DpoSettings(loss_type="epsilon", epsilon=0.0, beta=BETA))
    found, gradient = live.step(60)
    live.method = live.ctx.method = plain
    want, expected = live.step(60)
    assert found.figures["loss"] == want.figures["loss"] and torch.equal(gradient, expected)
    assert found.state == {"losses": {"epsilon": {"factor": 1.0}}}


def test_distillation_of_the_model_itself_has_no_gradient() -> None:
    for name in ("forward_kl", "reverse_kl", "jsd"):
        live = Live(name, seed=0)
        live.method = live.ctx.method = Distill(DistillSettings(loss_type=name))  # type: ignore[arg-type]
        found, gradient = live.step()
        assert found.figures["loss"] == pytest.approx(0.0, abs=1e-12) and gradient.norm() < 1e-9


def test_a_live_loss_without_a_reference_is_an_error() -> None:
    live = Live("tdpo1")
    live.ctx.reference = None
    with pytest.raises(BurnishError, match="needs a live reference"):
        live.step()


def test_another_vocabulary_is_a_clear_error() -> None:
    live = Live("tdpo1")
    live.ctx.reference = Wider(live.reference)
    with pytest.raises(UsageError, match=f"vocabularies differ: {VOCAB} and {VOCAB + 3} tokens"):
        live.step()


class Wider:
    """A reference whose head has three tokens more."""

    def __init__(self, inner: Reference) -> None:
        self.inner = inner

    def logprobs(self, batch: Any) -> Tensor:
        return self.inner.logprobs(batch)

    def head_input(self, batch: Any) -> HeadInput:
        found = self.inner.head_input(batch)
        assert found.weight is not None
        return HeadInput(found.hidden, torch.cat([found.weight, found.weight[:3]]))


def test_a_fresh_adapter_is_off_in_the_reference_also_on_the_head() -> None:
    from peft import LoraConfig, get_peft_model

    from burnish.models.policy import Policy

    base = build_policy()
    groups = build_groups(3)
    batch = build_packed_batch(groups)
    want = Reference(base, "copy").logprobs(batch)
    config = LoraConfig(r=4, target_modules=["c_attn", "lm_head"], init_lora_weights=False)
    adapted = Policy(get_peft_model(base.model, config), head="lm", attention="sdpa")
    live = Live("tdpo2")
    live.ctx.models, live.ctx.reference = {"policy": adapted}, Reference(adapted, "adapter")
    live.ctx.parameters = [p for p in adapted.parameters() if p.requires_grad]
    head = live.ctx.reference.head_input(batch)
    assert head.module is not None
    logits = head.logits(0, len(want))
    found = torch.log_softmax(logits, -1)[torch.arange(len(want)), batch.target_ids]
    torch.testing.assert_close(found.detach(), want, rtol=0, atol=1e-6)
    live.groups = groups
    result, _ = live.step()
    assert result.figures["divergence/chosen"] > 0


# -- memory -------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation makes, with its shape."""

    def __init__(self) -> None:
        super().__init__()
        self.size, self.shape = 0, ()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(value, Tensor) and value.numel() > self.size:
                self.size, self.shape = value.numel(), tuple(value.shape)
        return out


@pytest.mark.parametrize("name", METHODS)
def test_no_tensor_has_tokens_times_vocabulary_elements(name: str) -> None:
    """1,200 scored tokens × 4,096 words are 4.9 M numbers; nothing beyond blocks of 256 positions is ever made."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from burnish.models.policy import Policy

    cfg = Qwen3Config(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    live = Live(name, n=1)
    live.policy, other = (Policy(Qwen3ForCausalLM(cfg), head="lm", attention="sdpa") for _ in range(2))
    live.parameters = trainable(live.policy)
    live.ctx.models, live.ctx.reference = {"policy": live.policy}, Reference(other, "copy")
    live.ctx.parameters = list(live.parameters.values())
    live.groups = build_groups(2, k=k_of(live.method), spread=1)
    live.groups = [lengthen(group, 600 // k_of(live.method)) for group in live.groups]
    scored = sum(c.scored for g in live.groups for c in g.completions)
    assert scored == 1200
    with Largest() as largest:
        found, gradient = live.step()
    assert found.bad == [] and gradient.norm() > 0
    assert largest.size <= 256 * 4096 < scored * 4096 / 4, largest.shape


def lengthen(group: Group, length: int) -> Group:
    from dataclasses import replace

    import numpy as np

    ids = np.arange(length, dtype=np.int32) % 50 + 3
    completions = tuple(replace(c, ids=ids + i, mask=np.ones(length, bool)) for i, c in enumerate(group.completions))
    return replace(group, completions=completions)

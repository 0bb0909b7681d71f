"""A training step asks the device once: between its first forward and its optimizer the host waits in one marked place.

Two nets catch what would wait on a CUDA device. On the CPU two modes refuse every read of a number (`item`, `bool(tensor)`,
`tolist`, `cpu`, `nonzero`, boolean indexing …) through the whole step, optimizer included. On the meta device, whose tensors hold
no data, the code of devices other than the CPU runs, and every copy to the host raises by itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.config.train import LoraSettings, TrainSettings
from burnish.engine import sums as sums_module
from burnish.engine.context import StepContext
from burnish.engine.fetch import fetch_numbers
from burnish.engine.method import build_initial_state
from burnish.engine.optimizer import build_optimizer, build_parameter_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.state import TrainState
from burnish.engine.step import compute_gradient
from burnish.engine.update import run_update
from burnish.models.adapters import build_lora
from burnish.models.policy import Policy
from burnish.models.reference import build_reference
from tests.engine.tiny import VOCAB, build_groups, build_method

OPS = {
    "_local_scalar_dense",
    "nonzero",
    "nonzero_static",
    "masked_select",
    "equal",
    "is_nonzero",
    "_unique2",
    "unique_dim",
    "bincount",
}
CALLS = {"item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__", "__array__"}
CASES = ["sft", "reward", "dpo", "dpo, reference in the step", "dpo, lora", "reward, lora"]


class HostRead(AssertionError):
    """A step read a number from the device."""


class Gate:
    """Open while the one allowed fetch runs; counts how often that was."""

    def __init__(self) -> None:
        self.open, self.fetches = False, 0

    def fetch(self, tensors: Sequence[Tensor]) -> list[float]:
        self.open, self.fetches = True, self.fetches + 1
        try:
            return fetch_numbers(tensors)
        finally:
            self.open = False


class NoCalls(TorchFunctionMode):
    """Refuses the methods by which Python reads a tensor."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.gate.open and getattr(func, "__name__", "") in CALLS:
            raise HostRead(f"Tensor.{func.__name__} within a step")
        return func(*args, **(kwargs or {}))


class NoReads(TorchDispatchMode):
    """Refuses the operations that a CUDA device answers only after the host has waited for it."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self.gate = gate

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        )
        if not self.gate.open and (name in OPS or by_mask):
            raise HostRead(f"aten.{name}{' by a mask' if by_mask else ''} within a step")
        return func(*args, **(kwargs or {}))


def _build(case: str) -> tuple[Policy, Any, list, bool]:
    """(policy, method, groups, whether the reference runs within the step)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    kind, _, variant = case.partition(", ")
    method, head, k, reference = build_method("sigmoid" if kind == "dpo" else kind)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
        num_labels=1,
    )
    torch.manual_seed(0)
    model: Any = (Qwen3ForCausalLM if head == "lm" else Qwen3ForSequenceClassification)(config)
    if variant == "lora":
        model = build_lora(model, LoraSettings(), head=head, seed=0)
    policy = Policy(
        model, head="lm" if head == "lm" else "score", attention="padded" if variant == "padded" else "sdpa"
    )
    inside = variant == "reference in the step"
    return policy, method, build_groups(5, k=k, reference=reference and not inside), inside


def _context(policy: Policy, method: Any, inside: bool) -> tuple[StepContext, dict[str, torch.nn.Parameter]]:
    trainable = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    reference = build_reference(policy, "copy") if inside else None
    runtime = Runtime(policy.device)
    return StepContext(
        {"policy": policy}, method, build_parallel(runtime), list(trainable.values()), seed=0, reference=reference
    ), trainable


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_reads_one_thing_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several micro-batches, gradient, guard, clip and fused AdamW, with one fetch in all."""
    policy, method, groups, inside = _build(case)
    ctx, trainable = _context(policy, method, inside)
    settings = TrainSettings(kind=method.name, max_grad_norm=1e-3)
    state = TrainState(
        trainable=trainable,
        optimizer=build_optimizer(build_parameter_groups(trainable, settings, no_decay=(), head=()), settings),
        method=build_initial_state(method),
    )
    before = [p.detach().clone() for p in trainable.values()]
    plan = build_plan(groups, budget=40)
    assert len(plan.of(0)) > 1
    gate = Gate()
    monkeypatch.setattr(sums_module, "fetch_numbers", gate.fetch)
    with NoCalls(gate), NoReads(gate):
        gradient = compute_gradient(ctx, groups, plan, state.method, step=0)
        update = run_update(state, ctx.parameters, settings, 10, gradient, ctx.parallel)
    assert gate.fetches == 1
    assert update.applied and update.grad_norm > 1e-3 and gradient.figures["loss"] > 0
    assert any(not torch.equal(a, b) for a, b in zip(before, trainable.values(), strict=True))


def test_the_nets_catch_reads() -> None:
    gate = Gate()
    x = torch.ones(3)
    reads = [
        lambda: x.sum().item(),
        lambda: bool(x.sum()),
        lambda: float(x[0]),
        lambda: x.tolist(),
        lambda: x.cpu(),
        lambda: x.numpy(),
        lambda: x.nonzero(),
        lambda: x[x > 0],
        lambda: torch.equal(x, x),
        lambda: x.masked_select(x > 0),
        lambda: torch.unique(x),
        lambda: x.clone().__setitem__(x > 0, 1.0),
    ]
    with NoCalls(gate), NoReads(gate):
        for read in reads:
            with pytest.raises(HostRead):
                read()


@pytest.mark.parametrize("case", CASES)
def test_the_way_of_other_devices_copies_nothing_back(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of a step on the meta device: public attention instead of the CPU's, no fused blocks."""
    policy, method, groups, inside = _build(case)
    ctx, _ = _context(policy.to("meta"), method, inside)
    enabled, autocast = torch.is_autocast_enabled, torch.autocast
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda d="cpu": d != "meta" and enabled(d))
    monkeypatch.setattr(
        torch, "autocast", lambda d, *a, **k: contextlib.nullcontext() if d == "meta" else autocast(d, *a, **k)
    )
    fetched: list[int] = []

    def fetch(tensors: Sequence[Tensor]) -> list[float]:
        assert all(t.device.type == "meta" for t in tensors)
        fetched.append(len(tensors))
        return [1.0] * sum(t.numel() for t in tensors)

    monkeypatch.setattr(sums_module, "fetch_numbers", fetch)
    found = compute_gradient(ctx, groups, build_plan(groups, budget=40), build_initial_state(method), step=0)
    assert len(fetched) == 1 and found.bad == []
    assert all(p.grad is not None for p in ctx.parameters)

"""What several ranks do in the tests of the strategies; each function runs on every rank (`tests.ranks`)."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from burnish.engine.context import StepContext
from burnish.engine.method import arrange_groups, build_initial_state
from burnish.engine.parallel.fsdp2 import Fsdp2
from burnish.engine.parallel.interface import Parallel
from burnish.engine.parallel.replicated import Replicated
from burnish.engine.parallel.single import Single
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import Gradient, compute_gradient
from burnish.models.policy import Policy
from burnish.models.reference import Reference
from tests.engine.tiny import VOCAB, build_groups, build_method, build_policy


def alone() -> Single:
    return Single(Runtime(torch.device("cpu")))


def build_strategy(name: str, runtime: Runtime) -> Parallel:
    if name == "single":
        return alone()
    return Fsdp2(runtime, ordered=True) if name == "fsdp2" else Replicated(runtime, ordered=name == "replicated")


def build_qwen(head: str = "lm", *, seed: int = 0, checkpointing: bool = False, lora: bool = False) -> Policy:
    """A tied Qwen3 in fp32, whose blocks run fused on the CPU."""
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
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = (Qwen3ForCausalLM if head == "lm" else Qwen3ForSequenceClassification)(config)
        if lora:
            from burnish.config.train import LoraSettings
            from burnish.models.adapters import build_lora

            model = build_lora(model, LoraSettings(r=4), head=head, seed=1)
            for name, p in model.named_parameters():  # B starts at 0, and with it half of the gradient
                if "lora_B" in name:
                    torch.nn.init.normal_(p, std=0.1)
    if checkpointing:
        base = model.get_base_model() if lora else model
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return Policy(model, head=head, attention="sdpa")  # type: ignore[arg-type]


def take_step(
    name: str,
    parallel: Parallel,
    build: Any,
    *,
    n: int,
    budget: int,
    shard_reference: bool = True,
    count: Counter | None = None,
) -> tuple[Gradient, dict[str, torch.Tensor]]:
    """(result, name → whole gradient) of one step; a reference, where one is needed, is live and frozen."""
    method, head, k, reference = build_method(name)
    policy = build(head)
    policy.train(True)
    groups = arrange_groups(method, build_groups(n + (method.partners is not None), k=k, reference=reference))[:n]
    stored = reference and "logits" not in method.reference
    frozen = build(head, seed=1) if method.reference and not stored else None
    models = {"policy": policy}
    if frozen is not None:
        frozen.requires_grad_(False).eval()
        if shard_reference:
            models["reference"] = frozen
    if count is not None:
        for label, model in {"policy": policy, "reference": frozen}.items():
            if model is not None:
                watch(label, model, count)
    parallel.prepare(models)
    trained = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    live = Reference(frozen, "copy") if frozen is not None else None
    ctx = StepContext({"policy": policy}, method, parallel, list(trained.values()), seed=0, reference=live)
    plan = build_plan(groups, budget=budget, world=parallel.runtime.world, coupled=method.coupled)
    found = compute_gradient(ctx, groups, plan, build_initial_state(method), step=0)
    grads = {}
    for label, p in trained.items():
        grad: Any = torch.zeros_like(p) if p.grad is None else p.grad
        grads[label] = grad.full_tensor() if hasattr(grad, "full_tensor") else grad
    return found, grads


def watch(label: str, model: Policy, count: Counter) -> None:
    """Count the forwards of a model and the backwards through it."""

    def forward(module: Any, inputs: Any, outputs: Any) -> None:
        count[f"{label} forward"] += 1
        hidden = outputs[0] if isinstance(outputs, tuple) else outputs
        tensor = hidden.last_hidden_state if hasattr(hidden, "last_hidden_state") else hidden
        if tensor.requires_grad:
            tensor.register_hook(lambda grad: count.update([f"{label} backward"]))

    model.backbone.register_forward_hook(forward)


def compare(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest relative difference of a parameter's gradient."""
    assert a.keys() == b.keys()
    top = max(float(g.norm()) for g in a.values())
    return max(float((a[n] - b[n]).norm() / a[n].norm().clamp_min(1e-3 * top)) for n in a)


def check_gradients(runtime: Runtime, argument: dict[str, Any]) -> list[dict[str, Any]]:
    """Each method on all ranks against one process.

    argument: methods; strategy; model ("gpt2": fp64, "qwen": fp32); n: numbers of examples; and options of the model.
    """
    options = argument.get("options", {})

    def build(head: str, seed: int = 0) -> Policy:
        if argument["model"] == "qwen":
            return build_qwen(head, seed=seed, **options)
        return build_policy(head, seed=seed)

    rows = []
    for name in argument["methods"]:
        for n in argument["n"]:
            expected, single = take_step(name, alone(), build, n=n, budget=argument.get("budget", 40))
            count: Counter = Counter()
            found, grads = take_step(
                name,
                build_strategy(argument["strategy"], runtime),
                build,
                n=n,
                budget=argument.get("budget", 40),
                shard_reference=argument.get("shard_reference", True),
                count=count,
            )
            counts = runtime.gather(dict(count))
            bits = runtime.gather({k: v.double().sum().item() for k, v in grads.items()})
            rows.append(
                {
                    "method": name,
                    "n": n,
                    "error": compare(single, grads),
                    "norm": abs(found.norm - expected.norm) / expected.norm,
                    "figures": max(abs(found.figures[k] - v) for k, v in expected.figures.items()),
                    "counts": counts,
                    "alike": all(b == bits[0] for b in bits),
                }
            )
    return rows

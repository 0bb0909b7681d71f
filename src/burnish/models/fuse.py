"""Llama-shaped blocks run as two autograd functions (`core.block`) when they get a packed row on the CPU.

The modules stay what they are: only `forward` of the block's instance is replaced, and it calls the class's own forward for
anything but a packed row (padded batches, generation, other devices). A half of the block whose projections carry adapters,
hooks or quantised weights runs through its modules; so does attention that the C kernels do not take.

The last block returns only the rows that a head reads (`plan.keep`): its feed-forward half is then computed at scored
positions alone.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from burnish.core.attention import PLAN_KWARG
from burnish.core.block import AttentionHalf, MlpHalf
from burnish.core.block_attention import BlockSpec, Turning, has_kernels
from burnish.core.segments import AttentionPlan

# Read in transformers 5.23; the self-check compares the result on a small copy, so that a change there is noticed.
_CLASSES = frozenset({"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"})
_HARMLESS = frozenset({"position_ids", "use_cache", "output_attentions", "output_hidden_states", "return_dict"})


def fuse_blocks(backbone: nn.Module) -> int:
    """Let the blocks of a Llama-shaped backbone run fused; returns how many do (0 for other architectures)."""
    layers = [m for m in backbone.modules() if type(m).__name__ in _CLASSES]
    if not layers or not all(_fits(layer) for layer in layers):
        return 0
    for layer in layers:
        layer.__dict__["forward"] = _Fused(layer)
        layer.__dict__["_burnish_last"] = layer is layers[-1]
    return len(layers)


def split_blocks(backbone: nn.Module) -> None:
    """Undo `fuse_blocks`."""
    for module in backbone.modules():
        if module.__dict__.pop("_burnish_last", None) is not None:
            del module.__dict__["forward"]


def is_fused(backbone: nn.Module) -> bool:
    """Whether the blocks of this backbone run fused."""
    return any(m.__dict__.get("_burnish_last") for m in backbone.modules())


def _fits(layer: Any) -> bool:
    attention, mlp = layer.self_attn, layer.mlp
    config = attention.config
    names = {name for name, _ in attention.named_children()}
    known = names <= {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"} and len(names) in (4, 6)
    activation = getattr(config, "hidden_act", None) == "silu"
    return (
        known and activation and {n for n, _ in mlp.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    )


class _Fused:
    """`forward` of a fused block; an object, so that models can be copied and pickled with it."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self.layer, *args, **kwargs)


def _forward(
    layer: Any,
    hidden_states: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    past_key_values: Any = None,
    use_cache: bool | None = False,
    position_embeddings: tuple[Tensor, Tensor] | None = None,
    **kwargs: Any,
) -> Tensor:
    """Forward of a block whose instance was fused; the library's signature."""
    plan = kwargs.get(PLAN_KWARG)
    odd = any(v is not None and v is not False and k not in _HARMLESS for k, v in kwargs.items() if k != PLAN_KWARG)
    if (
        not isinstance(plan, AttentionPlan)
        or position_embeddings is None
        or attention_mask is not None
        or past_key_values is not None
        or odd
        or hidden_states.device.type != "cpu"
        or hidden_states.dtype == torch.float64
    ):
        return type(layer).forward(
            layer,
            hidden_states,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            past_key_values=past_key_values,
            position_embeddings=position_embeddings,
            **kwargs,
        )
    run = partial(_run, layer, plan=plan, positions=position_ids, rotation=position_embeddings)
    if layer.gradient_checkpointing and layer.training:
        return layer._gradient_checkpointing_func(run, hidden_states)
    return run(hidden_states)


def _run(layer: Any, hidden: Tensor, *, plan: AttentionPlan, positions: Tensor | None, rotation: Any) -> Tensor:
    keep = plan.keep if layer._burnish_last else None
    x = hidden[0]
    x = _attend(layer, x, keep, plan, positions, rotation)
    norm, mlp = layer.post_attention_layernorm, layer.mlp
    plain = is_stock(mlp) and is_stock(norm) and _are_plain(mlp.gate_proj, mlp.up_proj, mlp.down_proj)
    if plain and mlp.gate_proj.bias is None:
        spec = _spec(layer, norm, x, mlp.gate_proj.weight)
        x = MlpHalf.apply(x, norm.weight, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight, spec)
    else:
        x = x + mlp(norm(x[None]))[0]
    if keep is not None:
        plan.kept = True
    return x[None]


def _attend(
    layer: Any, x: Tensor, keep: Tensor | None, plan: AttentionPlan, positions: Tensor | None, rotation: Any
) -> Tensor:
    a, norm = layer.self_attn, layer.input_layernorm
    cos, sin = rotation
    plain = is_stock(a) and is_stock(norm) and _are_plain(a.q_proj, a.k_proj, a.v_proj, a.o_proj)
    dropout = layer.training and a.attention_dropout > 0
    if dropout or not plain or cos.shape[-1] != a.head_dim or _has_window(layer, plan):
        return _attend_by_modules(layer, x, keep, plan, positions, rotation)
    spec = _spec(layer, norm, x, a.q_proj.weight)
    head_norms = (a.q_norm.weight, a.k_norm.weight) if hasattr(a, "q_norm") else (None, None)
    turning = Turning(*head_norms, cos[0].to(spec.wide), sin[0].to(spec.wide))
    if not has_kernels(turning, plan, spec):
        return _attend_by_modules(layer, x, keep, plan, positions, rotation)
    plan.calls += 1
    out: Any = AttentionHalf.apply(
        x,
        norm.weight,
        a.q_proj.weight,
        a.k_proj.weight,
        a.v_proj.weight,
        a.q_proj.bias,
        a.k_proj.bias,
        a.v_proj.bias,
        *head_norms,
        a.o_proj.weight,
        a.o_proj.bias,
        turning.cos,
        turning.sin,
        keep,
        plan,
        spec,
    )
    return out


def _attend_by_modules(
    layer: Any, x: Tensor, keep: Tensor | None, plan: AttentionPlan, positions: Tensor | None, rotation: Any
) -> Tensor:
    given = {PLAN_KWARG: plan, "position_ids": positions, "position_embeddings": rotation}
    normed = layer.input_layernorm(x[None])
    x = x + layer.self_attn(hidden_states=normed, attention_mask=None, **given)[0][0]
    return x if keep is None else x.index_select(0, keep)


def _has_window(layer: Any, plan: AttentionPlan) -> bool:
    """Whether a sliding window of this layer hides a key of the row."""
    mistral = type(layer).__name__.removeprefix("FSDP") == "MistralDecoderLayer"  # `fully_shard` renames the class
    owner = layer.self_attn.config if mistral else layer.self_attn
    window = getattr(owner, "sliding_window", None)
    return window is not None and window < plan.longest


def _spec(layer: Any, norm: Any, x: Tensor, weight: Tensor) -> BlockSpec:
    a = layer.self_attn
    if torch.is_autocast_enabled("cpu"):
        low = torch.get_autocast_dtype("cpu")
    else:
        low = torch.promote_types(x.dtype, weight.dtype)
    return BlockSpec(
        heads=a.config.num_attention_heads,
        kv_heads=a.config.num_key_value_heads,
        head_size=a.head_dim,
        scale=float(a.scaling),
        eps=norm.variance_epsilon,
        head_eps=a.q_norm.variance_epsilon if hasattr(a, "q_norm") else norm.variance_epsilon,
        low=low,
        keeps=torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad),
    )


def _are_plain(*linears: Any) -> bool:
    """Linear layers that may be read instead of called: no adapter, hook, quantisation or sharding."""
    return all(type(m) is nn.Linear and type(m.weight) is nn.Parameter and is_stock(m) for m in linears)


def is_stock(module: Any) -> bool:
    """Nobody has replaced the module's forward or hooked into it."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return "forward" not in module.__dict__ and not any(hooks)

"""A tiny random model of the same architecture as a given configuration: every kind of layer kept, sizes cut.

Windows and chunks become 4, so that a row of ten tokens shows them; weights are random and large enough that an error in
attention moves the result.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96
_HEAD_SIZE = 16

# Field → tiny value. Applied where the configuration has the field with an integer in it; the value is an upper bound.
_SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "n_embd": 64, "d_model": 64, "embed_dim": 64, "intermediate_size": 96,
    "n_inner": 96, "ffn_dim": 96, "ffn_hidden_size": 96, "moe_intermediate_size": 32, "expert_ffn_hidden_size": 32,
    "shared_expert_intermediate_size": 32, "shared_intermediate_size": 32, "intermediate_size_mlp": 96, "dense_intermediate_size": 96,
    "head_dim": _HEAD_SIZE, "global_head_dim": _HEAD_SIZE, "swa_head_dim": _HEAD_SIZE, "v_head_dim": _HEAD_SIZE,
    "swa_v_head_dim": _HEAD_SIZE, "kv_channels": _HEAD_SIZE, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
    "qk_head_dim": 16, "num_local_experts": 4, "num_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4,
    "num_experts_per_tok": 2, "num_experts_per_token": 2, "moe_k": 2, "moe_topk": 2, "top_k_experts": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "sliding_window": 4, "attention_chunk_size": 4,
    "floor_scale": 4, "rotary_dim": 8, "word_embed_proj_dim": 64, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 16,
    "dim_model_base": 64, "max_position_embeddings": 64, "n_positions": 64, "max_seq_len": 64, "n_ctx": 64,
    "embedding_size": 64, "num_kv_shared_layers": 0, "first_k_dense_replace": 1, "local_attention": 4, "window_size": 4,
    "lru_width": 64, "attention_window_size": 4, "altup_num_inputs": 2, "laurel_rank": 8,
}  # fmt: skip
_GROUPS = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_global_key_value_heads", "swa_num_key_value_heads")
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_PER_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "layers_block_type", "layer_pattern", "attn_types", "attention_layers")


def build_twin(model: nn.Module, seed: int = 0) -> Any:
    """A tiny fp32 model of `model`'s class and configuration on the CPU, in eval mode, dropout-free.

    The global generator's state is as before afterwards.
    """
    config = copy.deepcopy(model.config)
    for part in _each_config(config):
        _shrink(part)
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float32)
        try:
            twin = type(model)(config)
        finally:
            torch.set_default_dtype(before)
        twin = twin.float().eval()
        generator = torch.Generator().manual_seed(seed)
        _randomise(twin, generator)
    return twin


def _each_config(config: Any) -> Iterator[Any]:
    yield config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None:
            yield from _each_config(inner)


def _shrink(config: Any) -> None:
    """Cut one configuration in place."""
    heads_before = next((getattr(config, n) for n in ("num_attention_heads", "n_head", "n_heads") if _is_int(config, n)), 1)
    for name, value in _SIZES.items():
        if _is_int(config, name) and getattr(config, name) > value:
            setattr(config, name, value)
    for name in _GROUPS:
        if _is_int(config, name):
            groups = getattr(config, name)
            setattr(config, name, 1 if groups == 1 else 4 if groups >= heads_before else 2)
    _cut_layers(config)
    for name in [n for n in vars(config) if n.endswith("_token_id") or n.endswith("_token_index")]:
        if getattr(config, name) is not None:  # the probe never draws the last token
            setattr(config, name, VOCABULARY - 1)
    _cut_rope(config)
    for name in list(vars(config)):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)


def _is_int(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return isinstance(value, int) and not isinstance(value, bool)


def _cut_layers(config: Any) -> None:
    """As few layers as show every kind, at least 2."""
    name = next((n for n in _LAYERS if _is_int(config, n)), None)
    if name is None:
        return
    depth = getattr(config, name)
    keep = 2
    lists = {n: list(getattr(config, n)) for n in _PER_LAYER if _is_layer_list(config, n, depth)}
    for values in lists.values():
        keep = max(keep, 1 + max(values.index(v) for v in set(map(_hashable, values))))
    keep = min(max(keep, _first_dense(config) + 1), depth)
    for n, values in lists.items():
        with contextlib.suppress(AttributeError):  # some configurations derive the list from other fields
            setattr(config, n, values[:keep])
    setattr(config, name, keep)
    if isinstance(getattr(config, "max_window_layers", None), int):
        config.max_window_layers = min(config.max_window_layers, 1)


def _first_dense(config: Any) -> int:
    return getattr(config, "first_k_dense_replace", None) or 0


def _hashable(value: Any) -> Any:
    return value


def _is_layer_list(config: Any, name: str, depth: int) -> bool:
    values = getattr(config, name, None)
    return isinstance(values, list | tuple) and len(values) == depth


def _cut_rope(config: Any) -> None:
    """Per-dimension factors (long-rope) are cut to the tiny head size."""
    for name in ("rope_parameters", "rope_scaling"):
        rope = getattr(config, name, None)
        for part in _rope_parts(rope):
            share = float(part.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", 1.0)) or 1.0)
            heads = getattr(config, "num_attention_heads", 4)
            size = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 64) // heads
            for key in ("short_factor", "long_factor"):
                if isinstance(part.get(key), list):
                    part[key] = part[key][: int(size * share) // 2]
            if isinstance(part.get("original_max_position_embeddings"), int):
                part["original_max_position_embeddings"] = min(part["original_max_position_embeddings"], 64)


def _rope_parts(rope: Any) -> list[dict[str, Any]]:
    if not isinstance(rope, dict):
        return []
    return [rope] + [part for part in rope.values() if isinstance(part, dict)]


def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights with a gain of about 1.5, vectors spread around what they are."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.empty_like(parameter).normal_(generator=generator)
            if parameter.ndim < 2:
                parameter += 0.2 * noise if "sink" not in name else noise
            else:
                parameter.copy_(noise * _spread(name, parameter))


def _spread(name: str, parameter: Tensor) -> float:
    return 1.0 if "embed" in name or "wte" in name or "wpe" in name else 1.5 * parameter.shape[-1] ** -0.5

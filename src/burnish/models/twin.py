"""A tiny random model of the same architecture as a given configuration: every kind of layer kept, sizes cut.

Windows and chunks become 4, so that a row of ten tokens shows them; weights are random and large enough that an error in
attention moves the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY = 96

_VOCABULARIES = ("vocab_size", "vocab_size_per_layer_input")  # always VOCABULARY: the probe draws from all of it
# Tiny value → fields that are cut to it where the configuration has more.
_SIZES = {
    96: "intermediate_size n_inner ffn_dim ffn_hidden_size intermediate_size_mlp dense_intermediate_size",
    64: "word_embed_proj_dim dim_model_base embedding_size lru_width max_position_embeddings n_positions max_seq_len n_ctx "
    "original_max_position_embeddings",
    32: "moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size shared_intermediate_size",
    16: "v_head_dim swa_v_head_dim q_lora_rank kv_lora_rank qk_head_dim hidden_size_per_layer_input mamba_d_head",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim mamba_n_heads laurel_rank",
    4: "num_local_experts num_experts n_routed_experts moe_num_experts "
    "sliding_window attention_window_size window_size local_attention attention_chunk_size floor_scale index_topk",
    2: "num_experts_per_tok num_experts_per_token moe_k moe_topk top_k_experts altup_num_inputs",
    1: "n_shared_experts n_group topk_group first_k_dense_replace",
    0: "num_kv_shared_layers",
}
# Tiny value → fields that are set to it whatever they were, so that heads always divide the hidden size evenly.
_EXACT = {
    64: "hidden_size n_embd d_model embed_dim",
    16: "head_dim global_head_dim swa_head_dim kv_channels",
    4: "num_attention_heads n_head n_heads num_heads",
}
_GROUPS = (
    "num_key_value_heads",
    "num_kv_heads",
    "multi_query_group_num",
    "num_global_key_value_heads",
    "swa_num_key_value_heads",
)
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads")
_NOT_PER_LAYER = ("architectures", "rope_parameters")


def build_twin(model: nn.Module, seed: int = 0) -> Any:
    """A tiny fp32 model of `model`'s class and configuration on the CPU, in eval mode, dropout-free.

    The global generator's state is as before afterwards.
    """
    config: Any = model.config
    fields = config.to_dict()
    _shrink(fields)
    config = type(config).from_dict(fields, attn_implementation="eager")
    before = torch.get_default_dtype()
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        torch.set_default_dtype(torch.float32)
        try:
            twin = type(model)(config)
        finally:
            torch.set_default_dtype(before)
        twin = twin.float().eval()
        _randomise(twin, torch.Generator().manual_seed(seed))
    return twin


def _shrink(fields: dict[str, Any]) -> None:
    """Cut one configuration (as a dictionary) and those inside it, in place."""
    heads = next((fields[n] for n in _HEADS if _is_int(fields.get(n))), 1)
    for name in ("torch_dtype", "dtype", "transformers_version", "quantization_config"):
        fields.pop(name, None)
    _cut_sizes(fields)
    for name in _GROUPS:
        if _is_int(fields.get(name)):
            fields[name] = 1 if fields[name] == 1 else 4 if fields[name] >= heads else 2
    _cut_layers(fields)
    _cut_rope(fields)
    for name, value in fields.items():
        if isinstance(value, dict) and "model_type" in value:
            _shrink(value)
        elif name.endswith(("_token_id", "_token_index")) and value is not None:
            fields[name] = VOCABULARY - 1  # the probe never draws the last token
        elif "drop" in name and isinstance(value, float):
            fields[name] = 0.0


def _cut_sizes(fields: dict[str, Any]) -> None:
    for value, names in _SIZES.items():
        for name in names.split():
            if _is_int(fields.get(name)) and fields[name] > value:
                fields[name] = value
    for value, names in _EXACT.items():
        fields.update({name: value for name in names.split() if _is_int(fields.get(name))})
    fields.update({name: VOCABULARY for name in _VOCABULARIES if _is_int(fields.get(name))})
    if _is_int(fields.get("qk_rope_head_dim")) and "head_dim" in fields:  # latent attention rotates this part alone
        fields["head_dim"] = fields["qk_rope_head_dim"]


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _cut_layers(fields: dict[str, Any]) -> None:
    """As few layers as show every kind, at least 2."""
    name = next((n for n in _LAYERS if _is_int(fields.get(n))), None)
    if name is None:
        return
    depth = fields[name]
    lists = {n: v for n, v in fields.items() if isinstance(v, list) and len(v) == depth and n not in _NOT_PER_LAYER}
    overrides = {int(layer): part for layer, part in (fields.get("per_layer_config") or {}).items()}
    lists["per_layer_config"] = [str(overrides.get(i)) for i in range(depth)] if overrides else []
    firsts = [values.index(value) for values in lists.values() for value in values]
    firsts.append(fields.get("first_k_dense_replace") or 0)
    keep = min(max(2, 1 + max(firsts)), depth)
    fields.update({n: values[:keep] for n, values in lists.items() if values})
    if overrides:
        for part in overrides.values():
            _cut_sizes(part)
        fields["per_layer_config"] = {i: part for i, part in overrides.items() if i < keep}
    fields[name] = keep
    if _is_int(fields.get("max_window_layers")):
        fields["max_window_layers"] = min(fields["max_window_layers"], 1)


def _cut_rope(fields: dict[str, Any]) -> None:
    """Per-dimension factors (long-rope) are cut to the tiny head size."""
    heads, hidden = fields.get("num_attention_heads") or 4, fields.get("hidden_size") or 64
    size = fields.get("head_dim") or hidden // heads
    for name in ("rope_parameters", "rope_scaling"):
        for part in _rope_parts(fields.get(name)):
            share = float(part.get("partial_rotary_factor") or fields.get("partial_rotary_factor") or 1.0)
            for key in ("short_factor", "long_factor"):
                if isinstance(part.get(key), list):
                    part[key] = part[key][: int(size * share) // 2]
            if _is_int(part.get("original_max_position_embeddings")):
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

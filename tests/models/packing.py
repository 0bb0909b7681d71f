"""Tiny models of many families, ragged groups, and log-probabilities computed the plain way: one pass per completion."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor, nn

from burnish.core.batch import PackedBatch, build_packed_batch
from burnish.core.group import Completion, Group

VOCABULARY = 97

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}
_GPT2 = {
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
_HYBRID = _LLAMA | {"num_hidden_layers": 4}

# Family → (prefix of the classes, fields of the configuration).
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3": ("Qwen3", _LLAMA),
    "llama": ("Llama", _LLAMA),
    "mistral": ("Mistral", _LLAMA | {"sliding_window": None}),
    "mistral_window": ("Mistral", _LLAMA | {"sliding_window": 5}),
    "gpt2": ("GPT2", _GPT2),
    "gpt_neox": (
        "GPTNeoX",
        {
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 128,
        },
    ),
    "phi3": ("Phi3", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"sliding_window": None}),
    "phi3_window": ("Phi3", {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"sliding_window": 6}),
    "qwen2_window": (
        "Qwen2",
        {k: v for k, v in _LLAMA.items() if k != "head_dim"}
        | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "gemma2": ("Gemma2", _HYBRID | {"sliding_window": 4, "query_pre_attn_scalar": 8, "final_logit_softcapping": 3.0}),
    "gemma3": ("Gemma3", _HYBRID | {"sliding_window": 4, "query_pre_attn_scalar": 8, "_sliding_window_pattern": 2}),
    "gpt_oss": (
        "GptOss",
        _HYBRID | {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.0},
    ),
    "stablelm": ("StableLm", {k: v for k, v in _LLAMA.items() if k != "head_dim"}),
    "granite": (
        "Granite",
        {k: v for k, v in _LLAMA.items() if k != "head_dim"} | {"logits_scaling": 3.0, "attention_multiplier": 0.2},
    ),
    "bloom": ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": ("Falcon", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}),
    "gptj": ("GPTJ", _GPT2 | {"rotary_dim": 4}),
    "rwkv": ("Rwkv", {"hidden_size": 32, "num_hidden_layers": 2, "context_length": 64}),
    "mamba": ("Mamba", {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4}),
    "bamba": (
        "Bamba",
        _LLAMA
        | {
            "attn_layer_indices": [1],
            "mamba_n_heads": 8,
            "mamba_d_head": 8,
            "mamba_d_state": 8,
            "mamba_n_groups": 1,
            "mamba_expand": 2,
            "mamba_chunk_size": 16,
        },
    ),
}

PACKED = ("qwen3", "llama", "mistral", "mistral_window", "gpt2", "gpt_neox", "phi3")
PACKED_SPECIAL = ("phi3_window", "qwen2_window", "gemma2", "gemma3", "gpt_oss", "stablelm", "granite")
PADDED = ("bloom", "falcon", "gptj", "rwkv", "mamba", "bamba")

_LM = {"GPT2": "GPT2LMHeadModel"}


def build_model(
    family: str, *, head: str = "lm", seed: int = 0, dtype: torch.dtype = torch.float32, **fields: Any
) -> Any:
    """A random model of a family in train mode, with weights large enough that a wrong mask shows."""
    prefix, config_fields = FAMILIES[family]
    text = "Text" if prefix == "Gemma3" else ""
    ids = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1, "num_labels": 1}
    config = getattr(transformers, f"{prefix}{text}Config")(**(ids | config_fields | fields))
    name = _LM.get(prefix, f"{prefix}ForCausalLM") if head == "lm" else f"{prefix}{text}ForSequenceClassification"
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, name)(config)
        with torch.no_grad():
            for key, p in model.named_parameters():
                noise = torch.randn_like(p)
                if p.ndim < 2:
                    p += 0.1 * noise
                else:
                    p.copy_(noise * (0.5 if "embed" in key or "wte" in key else 1.2 * p.shape[-1] ** -0.5))
    return model.to(dtype).train()


def draw_fields(family: str, seed: int) -> dict[str, Any]:
    """A random shape for a family: depth, heads, shared keys, sizes, tied embeddings."""
    rng = np.random.default_rng([seed, len(family)])
    heads = int(rng.choice([2, 4, 6]))
    size = 2 * int(rng.integers(2, 6))
    shared = {"num_hidden_layers": int(rng.integers(1, 4)), "hidden_size": heads * size, "num_attention_heads": heads}
    if family == "gpt2":
        return {"n_layer": shared["num_hidden_layers"], "n_embd": heads * size, "n_head": heads}
    shared["intermediate_size"] = int(rng.integers(9, 60))
    if family == "gpt_neox":
        return shared | {"use_parallel_residual": bool(rng.integers(2)), "rotary_pct": float(rng.choice([0.5, 1.0]))}
    shared["num_key_value_heads"] = int(rng.choice([n for n in (1, 2, 3, 4, 6) if heads % n == 0]))
    shared["tie_word_embeddings"] = bool(rng.integers(2))
    if family != "phi3":  # the others may have heads of any size
        shared["head_dim"] = 2 * int(rng.integers(2, 8))
    if family == "mistral_window":
        shared["sliding_window"] = int(rng.integers(1, 12))
    return shared


def draw_group(rng: np.random.Generator, name: str, prompt: int, lengths: list[int]) -> Group:
    """A group with some unscored tokens."""
    completions = []
    for n in lengths:
        mask = rng.random(n) < 0.75
        mask[-1] = True
        completions.append(Completion(rng.integers(2, VOCABULARY, n).astype(np.int32), mask))
    return Group(name, rng.integers(2, VOCABULARY, prompt).astype(np.int32), tuple(completions))


def draw_groups(seed: int = 0) -> list[Group]:
    """Four groups with K = 1, 2 and 3, prompts from one token on."""
    rng = np.random.default_rng(seed)
    sizes = [(7, 2), (1, 1), (12, 3), (int(rng.integers(1, 9)), 2)]
    return [draw_group(rng, f"g{i}", p, [int(n) for n in rng.integers(1, 9, k)]) for i, (p, k) in enumerate(sizes)]


def draw_batch(seed: int = 0) -> PackedBatch:
    return build_packed_batch(draw_groups(seed))


def run_separately(model: Any, groups: list[Group]) -> Tensor:
    """(S,) log-probabilities of the scored tokens, one eager pass per prompt + completion, by `log_softmax` of logits."""
    implementation = model.config._attn_implementation
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    parts = []
    for group in groups:
        for c in group.completions:
            ids = torch.from_numpy(np.concatenate((group.prompt, c.ids)).astype(np.int64))[None]
            logits = model(ids, use_cache=False).logits[0]
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            logp = torch.log_softmax(logits[:-1], -1).gather(1, ids[0, 1:, None])[:, 0]
            parts.append(logp[len(group.prompt) - 1 :][torch.from_numpy(c.mask)])
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation(implementation)
    return torch.cat(parts)


def weigh(values: Tensor) -> Tensor:
    """A fixed weighted sum, so that every value has a gradient of its own."""
    weights = torch.linspace(-1.0, 2.0, values.numel(), dtype=torch.float64).to(values.dtype)
    return (values * weights).sum()


def take_gradients(model: nn.Module) -> Tensor:
    """All gradients as one vector; they are cleared."""
    parts = []
    for p in model.parameters():
        if p.requires_grad:
            parts.append(torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten())
            p.grad = None
    return torch.cat(parts)


def relative(found: Tensor, expected: Tensor) -> float:
    """‖found − expected‖ / ‖expected‖."""
    return float((found.double() - expected.double()).norm() / expected.double().norm())

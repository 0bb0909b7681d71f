"""Tiny models and tokenizers of many architectures, made on the spot."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from burnish.core.group import Completion, Group
from burnish.models.load import quiet

VOCAB = 320
TEXT = ["the quick brown fox jumps over the lazy dog", "post-training makes a model polite", "ÿ is a letter of French"]

LLAMA_LIKE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
}
NEOX_LIKE = {k: v for k, v in LLAMA_LIKE.items() if k not in ("num_key_value_heads", "head_dim")}
GPT2_LIKE = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 96}
SIZES: dict[str, dict[str, Any]] = {
    "llama": LLAMA_LIKE,
    "mistral": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE,
    "gemma": LLAMA_LIKE,
    "gemma2": LLAMA_LIKE | {"query_pre_attn_scalar": 8},
    "phi3": NEOX_LIKE | {"num_key_value_heads": 4},
    "phi": NEOX_LIKE,
    "gpt_neox": NEOX_LIKE,
    "gpt2": GPT2_LIKE,
    "granite": LLAMA_LIKE,
    "bloom": {"hidden_size": 32, "n_layer": 3, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "new_decoder_architecture": True},
    "opt": NEOX_LIKE | {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "qwen3_moe": LLAMA_LIKE | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "helium": LLAMA_LIKE,
}


def build_config(name: str, **changes: Any) -> Any:
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None, "vocab_size": VOCAB}
    return AutoConfig.for_model(name, **(ids | SIZES[name] | changes))


def save_small(
    folder: Path,
    name: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: Any = None,
    spread: float = 4.0,
    **changes: Any,
) -> Path:
    """A random model of an architecture, with weights large enough that mistakes show."""
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(build_config(name, **changes))
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.data.mul_(spread)
        model.to(dtype).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


def build_tokenizer(
    specials: Sequence[str] = ("<s>", "</s>", "<pad>"),
    *,
    vocab: int = 300,
    bos: str | None = "<s>",
    eos: str = "</s>",
    pad: str | None = "<pad>",
    template: str | None = None,
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer; ids of `specials` from 0."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(specials),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT, trainer)
    names = {"bos_token": bos, "eos_token": eos, "pad_token": pad}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **{k: v for k, v in names.items() if v is not None})
    tokenizer.chat_template = template
    return tokenizer


def build_groups(count: int = 6, *, seed: int = 0, last: int | None = None, low: int = 3, k: int = 2) -> list[Group]:
    """Random groups of K completions; `last` is the last token of each completion (an end token)."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.integers(low, VOCAB - 40, n).astype(np.int32)

    groups = []
    for i in range(count):
        completions = []
        for _ in range(k):
            ids = draw(int(rng.integers(2, 9)))
            if last is not None:
                ids[-1] = last
            mask = rng.random(len(ids)) < 0.8
            mask[-1] = True
            completions.append(Completion(ids, mask))
        groups.append(Group(f"g{i}", draw(int(rng.integers(2, 7))), tuple(completions)))
    return groups


def shake(parameters: Any, scale: float = 0.05, seed: int = 1) -> None:
    """Move parameters as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter.dtype))


def edit_json(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in found.items() if v is not ...}))

"""A tiny random model in a folder, with pocket's tokenizer, and small files of rows."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import torch

from burnish.data.bundled import resolve_data, resolve_model

TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
)


def build_model_folder(folder: Path, *, seed: int = 0, hidden: int = 32, layers: int = 2) -> Path:
    """A random Qwen3 of hidden size `hidden` that plain transformers loads."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    source = resolve_model("pocket")
    assert source is not None
    base = json.loads((source / "config.json").read_text())
    config = Qwen3Config(
        vocab_size=base["vocab_size"],
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=base["pad_token_id"],
        eos_token_id=base["eos_token_id"],
        bos_token_id=base.get("bos_token_id"),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        Qwen3ForCausalLM(config).save_pretrained(str(folder))
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copy(source / name, folder / name)
    return folder


def write_rows(file: Path, name: str, count: int, split: str = "train") -> Path:
    """The first `count` rows of a bundled set as a plain JSON Lines file."""
    found = resolve_data(name)
    assert found is not None
    with gzip.open(Path(found) / f"{split}.jsonl.gz", "rt") as source:
        file.write_text("".join(line for _, line in zip(range(count), source, strict=False)))
    return file

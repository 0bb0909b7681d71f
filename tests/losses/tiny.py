"""Tiny models whose weights any machine can rebuild, and the inputs of the golden values.

The weights come from numpy's PCG64 stream, parameter by parameter in sorted order, so that they depend neither on
torch's generator nor on the order in which transformers initialises its layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from burnish.core.group import Completion, Group

CONFIG: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}

PROMPTS = [[10, 20, 30], [40, 50], [11, 12, 13, 14], [70], [5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
CHOSEN = [[60, 70, 80, 1], [90, 1], [20, 21, 1], [30, 31, 32, 33, 1], [41, 42, 43, 44, 45, 46, 47, 48, 49, 50, 1]]
REJECTED = [[61, 1], [91, 92, 93, 94, 1], [22, 23, 24, 1], [34, 1], [51, 52, 53, 54, 55, 56, 57, 1]]
MARGINS = [0.5, 1.0, 0.0, 2.0, 0.25]


def build_model(kind: str, seed: int, dtype: torch.dtype = torch.float32) -> Any:
    """A Qwen3 of about 20,000 parameters; "lm" or "score". Norm weights lie around 1, matrices have std 0.2."""
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        if kind == "lm":
            model: Any = Qwen3ForCausalLM(Qwen3Config(**CONFIG))
        else:
            model = Qwen3ForSequenceClassification(Qwen3Config(**CONFIG, num_labels=1))
    rng = np.random.Generator(np.random.PCG64(seed))
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            noise = torch.from_numpy(rng.standard_normal(tuple(parameter.shape)))
            parameter.copy_(1 + 0.1 * noise if parameter.ndim == 1 else 0.2 * noise)
    return model.to(dtype).eval()


def sum_weights(model: Any) -> float:
    """Σ |w| in fp64: tells whether a rebuilt model is the one that the golden values were taken from."""
    return float(sum(p.detach().double().abs().sum() for p in model.parameters()))


def build_completion(ids: Sequence[int], **token_columns: Sequence[float]) -> Completion:
    """A completion of which every token is scored."""
    columns = {name: np.asarray(values, np.float32) for name, values in token_columns.items()}
    return Completion(np.asarray(ids, np.int32), np.ones(len(ids), bool), token_columns=columns)


def build_pairs(margins: Sequence[float] | None = None) -> list[Group]:
    """The golden prompts with their chosen and rejected completions."""
    groups = []
    for i, (p, c, r) in enumerate(zip(PROMPTS, CHOSEN, REJECTED, strict=True)):
        columns = {} if margins is None else {"margin": margins[i]}
        pair = (build_completion(c), build_completion(r))
        groups.append(Group(f"golden:{i}", np.asarray(p, np.int32), pair, columns=columns))
    return groups


def build_texts() -> list[Group]:
    """The golden prompts with their chosen completions only."""
    rows = enumerate(zip(PROMPTS, CHOSEN, strict=True))
    return [Group(f"golden:{i}", np.asarray(p, np.int32), (build_completion(c),)) for i, (p, c) in rows]

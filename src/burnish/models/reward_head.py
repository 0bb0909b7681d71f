"""Reward models in transformers' own layout: a backbone, and `score`, one linear output without bias.

Plain transformers reads the score at the rightmost token that is not `config.pad_token_id`. burnish reads it at the
completion's last token. Both agree, under padding on either side, exactly when no completion can end in the padding
token; `choose_pad_token` finds one for which that holds by construction, and never takes an end-of-sequence token.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.errors import ConfigError

HEAD = "score"
NEW_PAD = "<|pad|>"
_PAD_NAME = re.compile(r"^[<\[(]\W*[\w|-]*pad\w*\W*[>\])]$", re.IGNORECASE)
_RESERVED_NAME = re.compile(r"^[<\[]\W*(reserved|unused|placeholder|extra_id)\w*\W*[>\]]$", re.IGNORECASE)
# Bytes that no UTF-8 text contains; byte-level vocabularies write them as these characters.
_IMPOSSIBLE_BYTES = [chr(b) for b in (0xFF, 0xFE, 0xFD, 0xFC, 0xFB, 0xFA, 0xF9, 0xF8, 0xF7, 0xF6, 0xF5, 0xC1, 0xC0)]


def derive_seed(seed: int, purpose: str) -> int:
    """A seed of its own for each purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{purpose}".encode()).digest()[:8], "little") >> 1


def check_reward_support(config: Any, where: str) -> None:
    """Raise a ConfigError if transformers has no sequence-classification class for this architecture."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    )

    name = str(config.get("model_type"))
    if name in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES or "auto_map" in config:
        return
    both = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) & set(MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES))
    raise ConfigError(
        f"transformers has no sequence-classification class for {name!r}, so it cannot become a reward model",
        where=where,
        found=name,
        remedy=f"use one of these architectures: {', '.join(both)}",
    )


def find_score(model: nn.Module) -> nn.Linear:
    """The scalar head of a sequence-classification model.

    Raises:
        ConfigError: It has none in the layout that burnish scores with.
    """
    head = getattr(model, HEAD, None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ConfigError(
            f"{type(model).__name__} has no linear `score` head with one output",
            where="model",
            found=type(head).__name__,
            remedy="use a reward model that a stage of kind reward trained",
        )
    return head


def init_score_head(model: PreTrainedModel, *, seed: int, std: float) -> None:
    """Draw the head's weights from N(0, std²), from a generator of its own."""
    head = find_score(model)
    generator = torch.Generator().manual_seed(derive_seed(seed, "score head"))
    values = torch.empty(head.weight.shape, dtype=torch.float32).normal_(0.0, std, generator=generator)
    with torch.no_grad():
        head.weight.copy_(values)
        if head.bias is not None:
            head.bias.zero_()


@dataclass(frozen=True, slots=True)
class PadToken:
    """The padding token of a reward model.

    Attributes:
        id: Its id.
        token: Its text; None where the model came without a tokenizer.
        how: "own" (the tokenizer's), "vocabulary" (an unused special token), "new" (a free embedding row), "renamed" (a
            byte that no text holds), "bos", or "unchecked" (no tokenizer to check against).
    """

    id: int
    token: str | None
    how: str

    @property
    def changes_tokenizer(self) -> bool:
        return self.how not in ("own", "unchecked")


def end_ids(config: Any, generation: dict[str, Any] | None, tokenizer: Any) -> set[int]:
    """Every id that ends a text, by the model's configuration, its generation settings or the tokenizer."""
    found: set[Any] = set()
    text = config.get_text_config()
    for value in (text.eos_token_id, (generation or {}).get("eos_token_id"), getattr(tokenizer, "eos_token_id", None)):
        found |= set(value) if isinstance(value, (list, tuple)) else {value}
    return {i for i in found if isinstance(i, int)}


def choose_pad_token(
    model: PreTrainedModel, tokenizer: Any | None, generation: dict[str, Any] | None = None
) -> PadToken:
    """A padding token that no completion can end in.

    In this order: the tokenizer's own, if it is no end token and no part of the chat template; an unused padding or
    reserved token of the vocabulary; a new token in a free row of the embedding; the begin-of-text token, if it ends
    nothing; a vocabulary entry for a byte that valid text never contains.

    Raises:
        ConfigError: There is none.
    """
    config: Any = model.config
    embedding: Any = model.get_input_embeddings()
    rows = embedding.weight.shape[0]
    ends = end_ids(config, generation, tokenizer)
    if tokenizer is None:
        own = config.get_text_config().pad_token_id
        if own is not None and own not in ends:
            return PadToken(int(own), None, "unchecked")
        free = next((i for i in (0, *range(rows - 1, 0, -1)) if i not in ends), None)
        return PadToken(int(free or 0), None, "unchecked")
    template = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
    vocabulary: dict[str, int] = tokenizer.get_vocab()

    def is_safe(token: str | None) -> bool:
        if token is None or not 0 <= vocabulary.get(token, -1) < rows:
            return False
        return vocabulary[token] not in ends and token not in template

    may_be_text = tokenizer.pad_token == tokenizer.unk_token and not _spells_bytes(tokenizer)
    if is_safe(tokenizer.pad_token) and not may_be_text:
        return PadToken(vocabulary[tokenizer.pad_token], tokenizer.pad_token, "own")
    special = sorted((i, t.content) for i, t in tokenizer.added_tokens_decoder.items() if t.special)
    for pattern in (_PAD_NAME, _RESERVED_NAME):
        for i, token in special:
            if pattern.match(token) and is_safe(token):
                return PadToken(i, token, "vocabulary")
    if len(tokenizer) < rows and NEW_PAD not in vocabulary and max(vocabulary.values()) == len(tokenizer) - 1:
        return PadToken(len(tokenizer), NEW_PAD, "new")
    if is_safe(tokenizer.bos_token):
        return PadToken(vocabulary[tokenizer.bos_token], tokenizer.bos_token, "bos")
    renamed = _find_impossible_byte(tokenizer)
    if renamed is not None:
        return PadToken(renamed, NEW_PAD, "renamed")
    raise ConfigError(
        "no padding token can be found that a completion never ends in: nothing in the vocabulary is unused",
        where="model",
        remedy="add a padding token to the tokenizer and a row to the embedding, and save both",
    )


def _backend(tokenizer: Any) -> dict[str, Any] | None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return None if backend is None else json.loads(backend.to_str())


def _is_byte_level(found: dict[str, Any]) -> bool:
    return "ByteLevel" in json.dumps([found.get("pre_tokenizer"), found.get("decoder")])


def _spells_bytes(tokenizer: Any) -> bool:
    """Whether the tokenizer writes unknown characters as bytes, so that no text gives the unknown token."""
    found = _backend(tokenizer)
    return found is not None and (bool(found["model"].get("byte_fallback")) or _is_byte_level(found))


def _find_impossible_byte(tokenizer: Any) -> int | None:
    """The id of a byte-level token that no valid text produces and that no merge uses."""
    found = _backend(tokenizer)
    if found is None or found["model"].get("type") != "BPE" or not _is_byte_level(found):
        return None
    body = found["model"]
    merged = {
        part for merge in body.get("merges", []) for part in (merge.split(" ") if isinstance(merge, str) else merge)
    }
    taken = {t["content"] for t in found.get("added_tokens", [])}
    for token in _IMPOSSIBLE_BYTES:
        if token in body["vocab"] and token not in merged and token not in taken:
            return int(body["vocab"][token])
    return None


def set_pad_token(model: PreTrainedModel, pad: PadToken) -> None:
    """Write the padding token into the model's configuration."""
    config: Any = model.config
    config.pad_token_id = pad.id
    config.get_text_config().pad_token_id = pad.id


def save_tokenizer_with_pad(tokenizer: Any, folder: Path, pad: PadToken) -> None:
    """Write the tokenizer with `pad` as its padding token; every other text is tokenised as before."""
    if pad.how == "new":
        tokenizer.add_special_tokens({"pad_token": pad.token})
        if tokenizer.pad_token_id != pad.id:
            raise RuntimeError(f"the new padding token got id {tokenizer.pad_token_id}, not {pad.id}")
    elif pad.how != "renamed":
        tokenizer.pad_token = pad.token
    tokenizer.save_pretrained(str(folder))
    if pad.how == "renamed":
        _rename_entry(folder, pad)


def _rename_entry(folder: Path, pad: PadToken) -> None:
    file = folder / "tokenizer.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    old = next(t for t, i in found["model"]["vocab"].items() if i == pad.id)
    found["model"]["vocab"] = {(pad.token if t == old else t): i for t, i in found["model"]["vocab"].items()}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    entries = [*found["added_tokens"], {"id": pad.id, "content": pad.token, **flags}]
    found["added_tokens"] = sorted(entries, key=lambda t: t["id"])
    file.write_text(json.dumps(found, ensure_ascii=False, indent=2), encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(
        json.dumps(settings | {"pad_token": pad.token}, ensure_ascii=False, indent=2) + "\n", encoding="utf-8"
    )

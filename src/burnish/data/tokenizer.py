"""Tokenizers without transformers: tokenizer.json through `tokenizers`, special tokens and limits from its folder."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from burnish.data.bundled import list_models, resolve_model
from burnish.errors import DataError, ServiceError

_NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")
_HUB_FILES = [
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
    "config.json",
    "generation_config.json",
]
_UNLIMITED = 10**9


@dataclass(frozen=True, eq=False)
class TextTokenizer:
    """A tokenizer: text to ids and back, its special tokens, its chat template.

    Attributes:
        path: The folder that it was read from.
        backend: The `tokenizers` object.
        special_tokens: Name ("bos_token") to text, those that are set.
        bos_id: Begin-of-sequence id, or None.
        eos_id: End-of-sequence id, or None.
        eos_ids: All ids that end generation (tokenizer, model and generation config).
        vocab_size: Ids are below this number (added tokens included).
        chat_template: The tokenizer's own template, or None.
        chat_templates: Further named templates (tool_use …).
        model_max_length: Tokens that the model takes at most, or None when nothing says so.
        adds_bos: The tokenizer itself prepends BOS to a text.
        fingerprint: SHA-256 over all that changes ids or rendering.
    """

    path: str
    backend: Tokenizer
    special_tokens: dict[str, str]
    bos_id: int | None
    eos_id: int | None
    eos_ids: frozenset[int]
    vocab_size: int
    chat_template: str | None
    chat_templates: dict[str, str]
    model_max_length: int | None
    adds_bos: bool
    fingerprint: str
    special_texts: frozenset[str] = field(default=frozenset(), repr=False)
    _anchor: tuple[str, tuple[int, ...]] | None = field(default=None, repr=False)

    @classmethod
    def load(cls, path_or_id: str, *, revision: str | None = None) -> TextTokenizer:
        """Load from a folder, a bundled name or a hub id (its tokenizer files only).

        Raises:
            DataError: There is no usable tokenizer there.
            ServiceError: The hub cannot be reached.
        """
        folder = _find_folder(path_or_id, revision)
        return _build(folder)

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Ids of a text; special tokens spelled out in it are recognised."""
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def encode_many(self, texts: Sequence[str], *, continues: Sequence[bool] | None = None) -> list[list[int]]:
        """Ids of many texts at once (in parallel), without special tokens added.

        Args:
            texts: The texts.
            continues: True = the text goes on from an earlier one, so that a tokenizer which puts a space before
                each text must not do so here.
        """
        anchor = self._anchor
        if anchor is None or continues is None or not any(continues):
            return [e.ids for e in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]
        word, ids = anchor
        joined = [word + text if goes_on else text for text, goes_on in zip(texts, continues)]
        encoded = [e.ids for e in self.backend.encode_batch_fast(joined, add_special_tokens=False)]
        for i, goes_on in enumerate(continues):
            if goes_on and tuple(encoded[i][: len(ids)]) == ids:
                encoded[i] = encoded[i][len(ids) :]
            elif goes_on:
                encoded[i] = self.encode(texts[i])
        return encoded

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of ids."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=skip_special_tokens)

    def token_id(self, text: str) -> int | None:
        """Id of one token's text, or None."""
        return self.backend.token_to_id(text)


def _find_folder(path_or_id: str, revision: str | None) -> Path:
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    bundled = resolve_model(path_or_id)
    if bundled is not None:
        return bundled
    if path.is_absolute() or path_or_id.startswith((".", "~")) or path_or_id.count("/") > 1:
        raise DataError(
            f"there is no folder {path_or_id!r}", where="tokenizer", remedy="give a folder that holds tokenizer.json"
        )
    return _hub_folder(path_or_id, revision)


def _hub_folder(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError

    known = ", ".join(list_models()) or "none"
    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(
            f"{repo!r} is neither a folder, a bundled model ({known}) nor a repository on the hub",
            where="tokenizer",
            remedy="check the spelling; a gated repository needs `hf auth login`",
        ) from error
    except (LocalEntryNotFoundError, OSError) as error:
        offline = os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0")
        raise ServiceError(
            f"{repo!r} is not in the local cache and the hub {'is switched off' if offline else 'cannot be reached'}",
            where="tokenizer",
            remedy="unset HF_HUB_OFFLINE, download the model first, or give a local folder",
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise DataError(
            f"this is not valid JSON: {error}", where=str(path), remedy="download the file again"
        ) from error
    return value if isinstance(value, dict) else {}


def _load_backend(folder: Path) -> Tokenizer:
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            return Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise DataError(
                f"the tokenizer cannot be read: {error}", where=str(file), remedy="download the file again"
            ) from error
    if (folder / "tokenizer.model").is_file() or (folder / "vocab.json").is_file():
        return _convert_slow(folder)
    raise DataError(
        "there is no tokenizer.json in this folder",
        where=str(folder),
        remedy="give the folder or hub id of a model with a fast tokenizer, or save one there with save_pretrained()",
    )


def _convert_slow(folder: Path) -> Tokenizer:
    """Fall back on transformers for folders that hold only a slow tokenizer's files."""
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=False, local_files_only=True
        ).backend_tokenizer
    except Exception as error:
        raise DataError(
            f"there is no tokenizer.json, and the slow tokenizer cannot be converted: {error}",
            where=str(folder),
            remedy="save a fast tokenizer there with AutoTokenizer.from_pretrained(…).save_pretrained()",
        ) from error


def _text_of(token: Any) -> str | None:
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def _special_tokens(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    merged = {**_read_json(folder / "special_tokens_map.json"), **config}
    found = {name: _text_of(merged.get(name)) for name in _NAMES}
    return {name: text for name, text in found.items() if text is not None}


def _templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    found: dict[str, str] = {}
    own = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(own, str):
        found["default"] = own
    elif isinstance(own, list):
        found |= {str(t["name"]): str(t["template"]) for t in own if isinstance(t, dict) and "template" in t}
    if (folder / "chat_template.jinja").is_file():
        found["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for file in sorted((folder / "additional_chat_templates").glob("*.jinja")):
        found[file.stem] = file.read_text(encoding="utf-8")
    return found


def _ids_in(value: Any) -> list[int]:
    values = value if isinstance(value, list) else [value]
    return [v for v in values if isinstance(v, int) and not isinstance(v, bool)]


def _max_length(config: dict[str, Any], model: dict[str, Any]) -> int | None:
    text_model = model.get("text_config") if isinstance(model.get("text_config"), dict) else {}
    limits = [
        config.get("model_max_length"),
        model.get("max_position_embeddings"),
        (text_model or {}).get("max_position_embeddings"),
        model.get("n_positions"),
        model.get("max_sequence_length"),
    ]
    usable = [int(v) for v in limits if isinstance(v, int | float) and 0 < v < _UNLIMITED]
    return min(usable) if usable else None


def _find_anchor(backend: Tokenizer) -> tuple[str, tuple[int, ...]] | None:
    """A word after which a text is tokenised as a continuation, if the tokenizer changes the start of texts."""

    def ids(text: str) -> list[int]:
        return backend.encode(text, add_special_tokens=False).ids

    for word in ("\n", "\n\n", "|", "a"):
        head = ids(word)
        if all(ids(word + probe)[: len(head)] == head for probe in ("x", " x", "Hello", "7")):
            plain = all(ids(word + probe)[len(head) :] == ids(probe) for probe in ("x", " x", "Hello", "7"))
            return None if plain else (word, tuple(head))
    return None


def _build(folder: Path) -> TextTokenizer:
    backend = _load_backend(folder)
    backend.no_padding()
    backend.no_truncation()
    config = _read_json(folder / "tokenizer_config.json")
    model, generation = _read_json(folder / "config.json"), _read_json(folder / "generation_config.json")
    special = _special_tokens(folder, config)
    ids = {name: backend.token_to_id(text) for name, text in special.items()}
    model_eos = _ids_in(generation.get("eos_token_id")) + _ids_in(model.get("eos_token_id"))
    eos = ids.get("eos_token")
    if eos is None and model_eos:
        eos = model_eos[0]
    if eos is not None and "eos_token" not in special:
        special["eos_token"] = backend.id_to_token(eos) or ""
    probe = backend.encode("a", add_special_tokens=True).ids
    bos = ids.get("bos_token")
    templates = _templates(folder, config)
    added = dict(backend.get_added_tokens_decoder())
    size = max([backend.get_vocab_size(with_added_tokens=True), *(i + 1 for i in added)])
    digest = hashlib.sha256()
    for part in (backend.to_str(), special, templates, sorted({*model_eos, *([eos] if eos is not None else [])})):
        digest.update(json.dumps(part, sort_keys=True).encode("utf-8", "surrogatepass"))
    return TextTokenizer(
        path=str(folder),
        backend=backend,
        special_tokens=special,
        bos_id=bos,
        eos_id=eos,
        eos_ids=frozenset([*model_eos, *([eos] if eos is not None else [])]),
        vocab_size=size,
        chat_template=templates.get("default"),
        chat_templates={name: text for name, text in templates.items() if name != "default"},
        model_max_length=_max_length(config, model),
        adds_bos=bos is not None and bool(probe) and probe[0] == bos,
        fingerprint=digest.hexdigest(),
        special_texts=frozenset(str(token.content) for token in added.values() if token.special),
        _anchor=_find_anchor(backend),
    )

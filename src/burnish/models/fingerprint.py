"""What a model's content is, as one hash; without torch.

Two folders have the same fingerprint if they hold the same weights, configuration and tokenizer, whatever their names
and dates. Generation settings, notes and records of training do not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from burnish.errors import ConfigError
from burnish.models.folder import find_adapter_base

CONFIGS = ("config.json", "adapter_config.json", "quantization_config.json")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "sentencepiece.bpe.model",
    "spiece.model",
    "chat_template.jinja",
    "chat_template.json",
)

_KNOWN: dict[tuple[str, int, int, int], str] = {}


def fingerprint_model(folder: str | Path) -> str:
    """SHA-256 (hexadecimal) over the weights, configuration and tokenizer of a model folder.

    An adapter's includes that of its base where the base is a local folder, else the base's name: the same adapter on
    another base is another model. Hashes of files are remembered by path, size and time of change.

    Raises:
        ConfigError: The folder holds no weights.
    """
    path = Path(folder).expanduser().resolve()
    weights = sorted(p for p in path.glob("*.safetensors") if p.is_file()) if path.is_dir() else []
    if not weights:
        raise ConfigError("no safetensors weights here", where=str(path), remedy="give a model folder")
    small = [path / n for n in (*CONFIGS, *TOKENIZER_FILES) if (path / n).is_file()]
    total = hashlib.sha256(b"burnish model 1\n")
    for file, digest in zip([*weights, *small], hash_files([*weights, *small]), strict=True):
        if file.name == "adapter_config.json":
            digest = _adapter_digest(file)
        total.update(f"{file.name} {digest}\n".encode())
    return total.hexdigest()


def _adapter_digest(file: Path) -> str:
    """Of an adapter's settings, with its base by content instead of by path."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    base = find_adapter_base(file.parent, settings)
    settings["base_model_name_or_path"] = fingerprint_model(base) if Path(base).is_dir() else base
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def hash_files(files: list[Path]) -> list[str]:
    """SHA-256 of each file, several at a time (hashing releases the interpreter's lock)."""
    if len(files) <= 1:
        return [_hash(f) for f in files]
    with ThreadPoolExecutor(min(len(files), os.cpu_count() or 1, 8)) as pool:
        return list(pool.map(_hash, files))


def _hash(file: Path) -> str:
    at = file.stat()
    key = (str(file), at.st_size, at.st_mtime_ns, at.st_ino)
    if key not in _KNOWN:
        with file.open("rb") as stream:
            _KNOWN[key] = hashlib.file_digest(stream, "sha256").hexdigest()
    return _KNOWN[key]

"""What lies in a model folder, read without torch: its kind, weight files and their type; nothing is run or unpickled.

Pickled weights are refused, safetensors headers are checked against the file before any tensor is mapped.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from burnish.data import bundled
from burnish.errors import ConfigError

Kind = Literal["lm", "score", "adapter"]

LM_SUFFIXES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
CONVERT = (
    "convert it once where you trust the file: "
    "AutoModelForCausalLM.from_pretrained(...).save_pretrained(folder, safe_serialization=True)"
)
RIGHT_BASE = "set base_model_name_or_path in adapter_config.json to the model it was trained on"
MAX_HEADER = 100 * 2**20
ITEM_BITS = {
    "BOOL": 8,
    "U8": 8,
    "I8": 8,
    "U16": 16,
    "I16": 16,
    "F16": 16,
    "BF16": 16,
    "U32": 32,
    "I32": 32,
    "F32": 32,
    "U64": 64,
    "I64": 64,
    "F64": 64,
    "C64": 64,
}


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A folder that holds a model.

    Attributes:
        path: The folder, absolute.
        kind: "lm" (language model), "score" (sequence classification, a reward model) or "adapter" (PEFT).
        config: config.json, or adapter_config.json of an adapter.
        weights: Its safetensors files, in name order.
        dtype: The type most of its weights are stored in, as safetensors names it ("BF16", "F32").
        tensors: Names of all stored tensors.
    """

    path: Path
    kind: Kind
    config: dict[str, Any]
    weights: tuple[Path, ...]
    dtype: str
    tensors: frozenset[str]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or a ConfigError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise ConfigError(
            f"{path.name} cannot be read: {e}", where=str(path.parent), remedy="fetch or export the model again"
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path.name} is no JSON object", where=str(path.parent), remedy="fetch the model again")
    return found


def inspect_model_folder(folder: str | Path) -> ModelFolder:
    """Look into a model folder and check it as far as that is possible without loading it.

    Raises:
        ConfigError: No model, an unknown kind of model, pickled, missing or damaged weights.
    """
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise ConfigError(f"{path} is no folder", where="model", found=str(folder), remedy="give a model folder")
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        config = read_json(path / "adapter_config.json")
        if not config.get("base_model_name_or_path"):
            raise ConfigError(
                "adapter_config.json names no base model", where=str(path), remedy="set base_model_name_or_path in it"
            )
        return _with_weights(path, "adapter", config, [path / "adapter_model.safetensors"])
    if not (path / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        raise ConfigError(
            f"no config.json here, so this is no model folder (found: {there})",
            where=str(path),
            remedy="give the folder with config.json and the weights (a stage's result is its final/)",
        )
    config = read_json(path / "config.json")
    return _with_weights(path, find_kind(config, path), config, _find_weight_files(path))


def find_adapter_base(adapter: Path, config: dict[str, Any]) -> str:
    """What an adapter's base_model_name_or_path means: a folder as an absolute path, or a name as it stands.

    A relative path is looked for beside the adapter first; a bundled model whose package has moved is found again.
    """
    name = str(config.get("base_model_name_or_path"))
    for place in (adapter / name, Path(name).expanduser()):
        if place.is_dir():
            return str(place.resolve())
    parts = Path(name).parts
    if parts[-3:-1] == ("assets", "models"):
        moved = bundled.resolve_model(parts[-1])
        return str(moved.resolve()) if moved else name
    return name


def read_base_config(folder: str | Path) -> dict[str, Any]:
    """config.json of a model folder; of an adapter's, that of its base, which must be local or in the hub's cache."""
    found = inspect_model_folder(folder)
    if found.kind != "adapter":
        return found.config
    base = find_adapter_base(found.path, found.config)
    if Path(base).is_dir():
        return inspect_model_folder(base).config
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        file = try_to_load_from_cache(base, "config.json", revision=found.config.get("revision"))
    except HFValidationError:
        file = None
    if not isinstance(file, str):
        raise ConfigError(
            f"the base of this adapter, {base}, is not on this machine",
            where=str(found.path),
            found=base,
            remedy=f"give it as model once while online, or {RIGHT_BASE}",
        )
    return read_json(Path(file))


def read_text_config(folder: str | Path) -> dict[str, Any]:
    """The language part of `read_base_config`."""
    config = read_base_config(folder)
    return config.get("text_config", config)


def read_context(folder: str | Path) -> int | None:
    """Tokens that the model takes at most; None where its configuration does not say."""
    config = read_text_config(folder)
    found = config.get("max_position_embeddings") or config.get("n_positions")
    return int(found) if found else None


def read_hidden_size(folder: str | Path) -> int:
    """Width of the model's hidden states; 4096, that of a large one, where its configuration does not say."""
    config = read_text_config(folder)
    return int(config.get("hidden_size") or config.get("n_embd") or config.get("d_model") or 4096)


def is_reward_model(folder: str | Path) -> bool:
    """Whether the model has a trained score head."""
    found = inspect_model_folder(folder)
    return found.config.get("task_type") == "SEQ_CLS" if found.kind == "adapter" else found.kind == "score"


def find_kind(config: dict[str, Any], path: Path) -> Kind:
    """The kind of a full model, from config.json's architecture."""
    names = [str(n) for n in config.get("architectures") or []]
    if any(n.endswith("ForSequenceClassification") for n in names):
        return "score"
    if not names or any(n.endswith(LM_SUFFIXES) for n in names):
        return "lm"
    raise ConfigError(
        f"{names[0]} is neither a causal language model nor a sequence-classification (reward) model",
        where=str(path / "config.json"),
        found=names,
        remedy="use a decoder such as Llama, Qwen, Mistral or GPT-2",
    )


def _find_weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if not index.is_file():
        return [path / "model.safetensors"]
    shards = read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ConfigError("the index of the weights is empty", where=str(index), remedy="fetch the model again")
    names = sorted({str(n) for n in shards.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ConfigError(
                f"the index names {name!r}, which is no safetensors file of this folder",
                where=str(index),
                found=name,
                remedy="do not use this model; fetch it again from its source",
            )
    return [path / name for name in names]


def _with_weights(path: Path, kind: Kind, config: dict[str, Any], files: list[Path]) -> ModelFolder:
    for file in files:
        if file.is_file():
            continue
        pickles = sorted(p.name for pattern in PICKLES for p in path.glob(pattern) if p.name != "training_info.pt")
        if pickles:
            raise ConfigError(
                f"the weights are pickled ({pickles[0]}); a pickle can run any code, so only safetensors is read",
                where=str(path),
                found=pickles,
                remedy=CONVERT,
            )
        raise ConfigError(
            f"{file.name} is missing", where=str(path), remedy="fetch the model again (the download may be incomplete)"
        )
    sizes: Counter[str] = Counter()
    tensors: set[str] = set()
    for file in files:
        for name, entry in read_safetensors_header(file).items():
            sizes[entry["dtype"]] += entry["data_offsets"][1] - entry["data_offsets"][0]
            tensors.add(name)
    dtype = max(sorted(sizes), key=lambda d: sizes[d]) if sizes else "F32"
    return ModelFolder(path, kind, config, tuple(files), dtype, frozenset(tensors))


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """name → {dtype, shape, data_offsets} of a safetensors file, every bound checked against the file's size.

    Raises:
        ConfigError: The header lies, or the file is cut short.
    """

    def refuse(why: str) -> ConfigError:
        return ConfigError(f"{file.name} is damaged: {why}", where=str(file), remedy="fetch or export the model again")

    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER):
            raise refuse(f"its header claims {length:,} bytes of {size:,}")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError):
            raise refuse("its header is no JSON") from None
    if not isinstance(header, dict):
        raise refuse("its header is no JSON object")
    header.pop("__metadata__", None)
    room = size - 8 - length
    for name, entry in header.items():
        try:
            begin, end = (int(x) for x in entry["data_offsets"])
            shape, bits = [int(n) for n in entry["shape"]], ITEM_BITS.get(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise refuse(f"tensor {name!r} is not described") from None
        if not 0 <= begin <= end <= room:
            raise refuse(f"tensor {name!r} ends at byte {end:,} of {room:,} (cut short?)")
        if bits is not None and (min(shape, default=0) < 0 or math.prod(shape) * bits != 8 * (end - begin)):
            raise refuse(f"tensor {name!r} of shape {shape} does not fill its {end - begin:,} bytes")
    return header

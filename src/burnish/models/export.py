"""Writing a result that plain transformers or PEFT loads: weights, configuration, tokenizer, template; nothing more."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from burnish.errors import ConfigError
from burnish.models.adapters import is_peft, merge_copy, save_adapter
from burnish.models.fingerprint import TOKENIZER_FILES
from burnish.models.folder import inspect_model_folder, read_safetensors_header
from burnish.models.load import BuiltModel, Head, LoadedFrom, load_tokenizer, quiet
from burnish.models.quantise import save_quantization
from burnish.models.reward_head import PadToken, save_tokenizer_with_pad

log = logging.getLogger("burnish")

TRAINING_INFO = ("base_model_path", "training_config", "model_type", "dataset_name", "train_samples", "eval_samples")
WORTH_SAYING = 0.1  # of the change, lost in rounding
ExportDtype = Literal["source", "masters"]
Read = Callable[[nn.Module, Sequence[str]], Iterator[tuple[str, Tensor]]]  # (model, names) → (name, whole tensor), …


def export_model(
    built: BuiltModel,
    folder: Path | None,
    *,
    tokenizer_source: str | Path | None,
    head: Head,
    extra: Mapping[str, Any],
    dtype: ExportDtype | torch.dtype = "source",
    chat_template: str | None = None,
    stop_ids: Sequence[int] = (),
    max_shard_size: str = "5GB",
    read: Read | None = None,
) -> None:
    """Write what inference needs into `folder`, which exists and is empty; the caller seals and renames it.

    Of a sharded model every rank must come here with `read`; those without a folder only send their rows.

    Args:
        built: The model in training.
        tokenizer_source: Folder of the tokenizer; None writes none.
        head: "lm" or "score".
        extra: Goes into training_info.pt; of the keys in TRAINING_INFO those that are missing become None.
        dtype: Type of full weights: "source" = as the base is stored (bf16 stays bf16), "masters" = as trained.
        read: Gives tensors of the model whole, one after the other; default: the model's own.
        chat_template: The template that this stage used; None keeps the tokenizer's own.
        stop_ids: End-of-turn ids that `generate` must stop at, added to the generation settings.
    """
    loaded, reading, chosen = built.loaded, read or _read_own, _choose_dtype(built, dtype)
    earlier = loaded.folder if loaded.merged else None
    if folder is None:
        if is_peft(built.model):
            dict(reading(built.model, list(built.trainable)))
            return
        compute_rounding_loss(built, chosen, read=reading)
        collect_tensors(built.model, reading, chosen)
        return
    if not is_peft(built.model):
        lost = compute_rounding_loss(built, chosen, read=reading)
        if lost > WORTH_SAYING:
            log.warning(
                "storing the weights as %s rounds away %.0f %% of what this stage changed; save_dtype: fp32 keeps it",
                str(chosen).removeprefix("torch."),
                100 * lost,
            )
        _save_full(built.model, built, folder, chosen, max_shard_size, reading)
    else:
        given: dict[str, Any] = {"base_model": loaded.name, "revision": loaded.revision, "earlier": earlier}
        state = None if read is None else dict(reading(built.model, list(built.trainable)))
        if not save_adapter(built.model, folder, state=state, **given):
            _save_full(merge_copy(built.model), built, folder, chosen, max_shard_size, _read_own)
    if is_peft(built.model) and loaded.quantization is not None:
        save_quantization(loaded.quantization, folder)
    for file in folder.glob("*.safetensors"):
        _align(file)
    if head == "lm":
        _save_generation_config(loaded, folder, stop_ids)
    if tokenizer_source is not None:
        save_tokenizer(Path(tokenizer_source), folder, pad=loaded.pad, chat_template=chat_template)
    save_training_info(folder, {"base_model_path": loaded.name, "model_type": head} | dict(extra))
    _set_modes(folder)


def _read_own(model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
    """A model's own tensors."""
    held = model.state_dict(keep_vars=True)
    yield from ((name, held[name].detach()) for name in names)


def compute_rounding_loss(built: BuiltModel, dtype: torch.dtype, *, tensors: int = 16, read: Read = _read_own) -> float:
    """How much of the stage's change of the weights is lost when they are stored as `dtype`: ‖round(w) − w‖ / ‖w − w₀‖.

    w₀ is read from the folder that the stage started from, for at most `tensors` matrices spread over the model. A
    weight that starts on the grid of bf16 and moves by less than half a step is rounded back to where it was: at a
    learning rate of 1e-6 most of the change can vanish. 0 where nothing can be compared.
    """
    loaded, lost, moved = built.loaded, 0.0, 0.0
    if loaded.merged or is_peft(built.model) or dtype not in (torch.bfloat16, torch.float16):
        return 0.0
    stored = {
        name: file for file in inspect_model_folder(loaded.base).weights for name in read_safetensors_header(file)
    }
    names = [n for n, p in built.trainable.items() if n in stored and p.ndim >= 2]
    for name, value in read(built.model, names[:: max(1, len(names) // tensors)]):
        with safe_open(stored[name], framework="pt") as file:
            start = file.get_tensor(name).to(torch.float32)
        now = value.to("cpu", torch.float32)
        if start.shape == now.shape:
            lost += float((now.to(dtype).float() - now).square().sum())
            moved += float((now - start).square().sum())
    return (lost / moved) ** 0.5 if moved else 0.0


def _choose_dtype(built: BuiltModel, dtype: ExportDtype | torch.dtype) -> torch.dtype:
    masters = next(iter(built.trainable.values())).dtype
    if isinstance(dtype, torch.dtype):
        return dtype
    return masters if dtype == "masters" else built.loaded.dtype


def _save_full(
    model: Any, built: BuiltModel, folder: Path, dtype: torch.dtype, max_shard_size: str, read: Read
) -> None:
    generation = getattr(model, "generation_config", None)
    try:
        if generation is not None:  # saving checks it, and many a model's own does not pass; it is copied instead
            model.generation_config = type(generation)()
        with quiet():
            tensors = collect_tensors(model, read, dtype)
            model.save_pretrained(str(folder), state_dict=tensors, max_shard_size=max_shard_size)
    finally:
        if generation is not None:
            model.generation_config = generation
    (folder / "generation_config.json").unlink(missing_ok=True)
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8")) | {"dtype": str(dtype).removeprefix("torch.")}
    for path, rate in built.loaded.dropout.items():  # switched off for training, not for whoever trains this next
        *parts, last = path.split(".")
        part = config
        for name in parts:
            part = part.get(name, {})
        part[last] = rate
    write_json(file, config)


def collect_tensors(model: nn.Module, read: Read, dtype: torch.dtype) -> dict[str, Tensor]:
    """What `state_dict` names, floating-point tensors in `dtype`, on the CPU, each converted as it comes; tied ones stay one.

    Of a sharded model rank 0 gets them, and the others none.
    """
    first: dict[int, str] = {}
    same = {name: first.setdefault(id(t), name) for name, t in model.state_dict(keep_vars=True).items()}
    found = {
        name: tensor.to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
        for name, tensor in read(model, list(first.values()))
    }
    return {name: found[source] for name, source in same.items()} if found else {}


def _align(file: Path, step: int = 64) -> None:
    """Let the tensors of a safetensors file begin at a multiple of `step` bytes (its header may hold blanks).

    Weights are used where the file is mapped, and the last bit of a product with a single column depends on alignment.
    """
    with file.open("rb") as source:
        length = int.from_bytes(source.read(8), "little")
        blanks = -(8 + length) % step
        if not blanks:
            return
        header = source.read(length)
        fresh = file.with_suffix(".aligned")
        with fresh.open("wb") as target:
            target.write((length + blanks).to_bytes(8, "little") + header + b" " * blanks)
            shutil.copyfileobj(source, target, 2**24)
    fresh.replace(file)


def write_json(file: Path, fields: Mapping[str, Any]) -> None:
    """A JSON object with sorted keys: the same bytes for the same content."""
    file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _save_generation_config(loaded: LoadedFrom, folder: Path, stop_ids: Sequence[int]) -> None:
    """The base's own generation settings (an exported adapter has none otherwise), with further ids to stop at."""
    target = folder / "generation_config.json"
    own = next((f for f in (loaded.folder / target.name, loaded.base / target.name) if f.is_file()), None)
    if own is not None:
        shutil.copyfile(own, target)
    if not stop_ids:
        return
    settings = json.loads(target.read_text(encoding="utf-8")) if target.is_file() else {}
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [ends] if ends is not None else []
    settings["eos_token_id"] = [*ends, *(i for i in dict.fromkeys(stop_ids) if i not in ends)]
    write_json(target, settings)


def save_tokenizer(
    source: Path, folder: Path, *, pad: PadToken | None = None, chat_template: str | None = None
) -> None:
    """Copy a tokenizer's files as they are, but for a reward model's new padding token and another chat template."""
    if pad is not None and pad.changes_tokenizer:
        tokenizer = load_tokenizer(source)
        if tokenizer is None:
            raise ConfigError("no tokenizer here", where=str(source), remedy="give the folder of the model's tokenizer")
        save_tokenizer_with_pad(tokenizer, folder, pad)
    else:
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    if chat_template is None:
        return
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "chat_template" in settings:
        write_json(file, settings | {"chat_template": chat_template})


def save_training_info(folder: Path, extra: Mapping[str, Any]) -> None:
    """training_info.pt for those who expect it: a plain dict that loads with weights_only=True. burnish never reads it.

    Raises:
        ConfigError: A value that is no plain number, text, list or dict.
    """
    info = dict.fromkeys(TRAINING_INFO) | {k: _plain(v, k) for k, v in extra.items()}
    torch.save(info, folder / "training_info.pt")


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(v, where) for v in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
    raise ConfigError(
        f"training_info: {where} is a {type(value).__name__}",
        where=where,
        remedy="give numbers, texts, lists and dicts only",
    )


def _set_modes(folder: Path) -> None:
    """Give the files the usual rights: safetensors creates them for the owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.iterdir():
        if file.is_file():
            file.chmod(0o666 & ~mask)

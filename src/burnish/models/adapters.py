"""LoRA adapters: the only file that imports peft."""

from __future__ import annotations

import copy
import difflib
import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.config.train import LoraSettings
from burnish.errors import ConfigError
from burnish.models.bnb import prepare_bitsandbytes
from burnish.models.folder import RIGHT_BASE, ModelFolder, inspect_model_folder
from burnish.models.freeze import is_tied, untie_embeddings

ADAPTER = "default"
TASK_TYPES = {"lm": "CAUSAL_LM", "score": "SEQ_CLS"}

_QKVO = ("q_proj", "k_proj", "v_proj", "o_proj")
ATTENTION_TARGETS: dict[str, tuple[str, ...]] = {
    "bloom": ("query_key_value",),
    "codegen": ("qkv_proj",),
    "falcon": ("query_key_value",),
    "gpt2": ("c_attn",),
    "gpt_bigcode": ("c_attn",),
    "gpt_neox": ("query_key_value",),
    "gptj": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "mpt": ("Wqkv",),
    "opt": ("q_proj", "k_proj", "v_proj", "out_proj"),
    "phi": ("q_proj", "k_proj", "v_proj", "dense"),
    "phi3": ("qkv_proj", "o_proj"),
    **dict.fromkeys(
        (
            "cohere",
            "cohere2",
            "gemma",
            "gemma2",
            "gemma3",
            "gemma3_text",
            "glm",
            "granite",
            "llama",
            "mistral",
            "mixtral",
            "olmo",
            "olmo2",
            "olmo3",
            "qwen2",
            "qwen2_moe",
            "qwen3",
            "qwen3_moe",
            "smollm3",
            "stablelm",
            "starcoder2",
        ),
        _QKVO,
    ),
}


def find_linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    """name → every linear layer of the model except its head."""
    tops = [model.get_output_embeddings(), getattr(model, "score", None)]
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Linear, Conv1D)) and not any(module is top for top in tops)
    }


def find_attention_linears(model: PreTrainedModel) -> list[str]:
    """Names (last parts) of the linear layers inside attention modules, for architectures the table does not list."""
    found = {}
    for name in find_linears(model):
        *path, leaf = name.split(".")
        if any("attn" in part.lower() or "attention" in part.lower() for part in path):
            found[leaf] = None
    return list(found)


def find_targets(model: PreTrainedModel, asked: list[str] | str) -> list[str] | str:
    """The names of the layers that get an adapter, checked against the model.

    Raises:
        ConfigError: A name that matches no linear layer, or the head.
    """
    linears = find_linears(model)
    leaves = sorted({n.rpartition(".")[2] for n in linears})
    if asked == "all-linear":
        return leaves
    if asked == "auto":
        listed = ATTENTION_TARGETS.get(str(model.config.get_text_config().model_type), ())
        targets = [t for t in listed if t in leaves] or find_attention_linears(model)
        if not targets:
            raise ConfigError(
                f"no attention layers found in {type(model).__name__}",
                where="lora.target_modules",
                remedy=f"name them: target_modules: {leaves[:6]}, or use all-linear",
            )
        return targets
    head_names = {
        n.rpartition(".")[2]
        for n, m in model.named_modules()
        if m is model.get_output_embeddings() or m is getattr(model, "score", None)
    } | {"lm_head", "score"}
    for target in asked:
        if target.rpartition(".")[2] in head_names:
            raise ConfigError(
                f"an adapter on the head ({target}) is not supported",
                where="lora.target_modules",
                found=target,
                remedy="leave it out (a reward model's score head is trained in full anyway), or train it with top_k",
            )
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no linear layer of {type(model).__name__} is called {target!r}",
                where="lora.target_modules",
                found=target,
                remedy=f"{hint}Its linear layers: {', '.join(leaves)}",
            )
    return list(asked)


def build_lora(model: PreTrainedModel, lora: LoraSettings, *, head: str, seed: int) -> nn.Module:
    """Put a fresh adapter on a frozen model; a reward model's score head trains with it and is saved with it.

    The initial values come from `seed` alone; the global random state is left as it was.
    """
    prepare_bitsandbytes()
    import peft

    targets = find_targets(model, lora.target_modules)
    chosen = [m for n, m in find_linears(model).items() if any(n == t or n.endswith(f".{t}") for t in targets)]
    conv = [isinstance(m, Conv1D) for m in chosen]
    if any(conv) and not all(conv):
        raise ConfigError(
            "target_modules mixes Conv1D and Linear layers, which one adapter cannot hold",
            where="lora.target_modules",
            found=lora.target_modules,
            remedy="name layers of one type only",
        )
    config = peft.LoraConfig(
        task_type=TASK_TYPES[head],
        r=lora.r,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType] (peft divides it by r, whole or not)
        lora_dropout=lora.dropout,
        bias=lora.bias,
        use_rslora=lora.use_rslora,
        use_dora=lora.use_dora,
        target_modules=targets,
        fan_in_fan_out=bool(conv) and all(conv),
        modules_to_save=["score"] if head == "score" else None,
    )
    with seeded(seed), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        warnings.simplefilter("ignore", FutureWarning)  # PEFT reads what transformers will rename
        wrapped = peft.get_peft_model(model, config, adapter_name=ADAPTER)
    _check_single(wrapped)
    return wrapped


def _check_single(model: nn.Module) -> None:
    names = list(getattr(model, "peft_config", {}))
    if names != [ADAPTER]:
        raise RuntimeError(f"expected one adapter, found {names}")


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run a block under its own CPU random state."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def is_peft(model: nn.Module) -> bool:
    """Whether the model carries an adapter."""
    return hasattr(model, "peft_config")


def base_of(model: nn.Module) -> PreTrainedModel:
    """The transformers model, under its adapter if it has one."""
    return model.get_base_model() if is_peft(model) else model  # pyright: ignore[reportCallIssue, reportReturnType]


def find_head_parameters(model: nn.Module) -> frozenset[str]:
    """Names of the trainable parameters of a reward model's score head."""
    return frozenset(n for n, p in model.named_parameters() if p.requires_grad and ".score." in f".{n}")


@contextmanager
def adapter_off(model: nn.Module) -> Iterator[None]:
    """The base model alone, for the length of the block; what trains is the same afterwards."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        with model.disable_adapter():  # pyright: ignore[reportCallIssue]
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def merge_adapter(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add a saved adapter to the weights of `model` (in the model's type; load it in fp32 to lose nothing).

    Raises:
        ConfigError: The adapter is no LoRA, or does not fit the model.
    """
    return merge_attached(attach_adapter(model, folder))


def merge_attached(wrapped: nn.Module) -> PreTrainedModel:
    """The transformers model with the adapter that `attach_adapter` put on it added to its weights.

    Raises:
        ConfigError: The sum is not finite.
    """
    try:
        merged = wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    except ValueError as e:
        raise ConfigError(
            f"the adapter cannot be added to the weights: {str(e).splitlines()[0]}",
            where="adapter",
            remedy="take an earlier checkpoint of it, or train it again",
        ) from None
    return merged.requires_grad_(True)


def attach_adapter(model: PreTrainedModel, folder: Path) -> nn.Module:
    """Put a saved adapter on `model`, whose weights stay as they are; the result is a PEFT model.

    A head that is the embedding too becomes a matrix of its own where the adapter changes one of the two.

    Raises:
        ConfigError: The adapter is no LoRA, or does not fit the model.
    """
    found, config = _read_lora(folder)
    import peft

    if is_tied(model) and _touches_embeddings(model, found):
        untie_embeddings(model)
    config.task_type = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # what it says is checked below
            warnings.simplefilter("ignore", FutureWarning)
            wrapped = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, config=config)
    except (ValueError, RuntimeError, KeyError) as e:
        raise ConfigError(
            f"the adapter does not fit {type(model).__name__}: {str(e).splitlines()[0]}",
            where=str(folder),
            remedy=RIGHT_BASE,
        ) from None
    expected = set(_adapter_tensors(wrapped))
    stored = {_stored_name(n) for n in found.tensors}
    copies = {n for n in stored if n.endswith(".base_layer.weight")}  # PEFT adds one of an embedding with an adapter
    odd = sorted(expected ^ (stored - copies))
    if odd:
        raise ConfigError(
            f"the adapter does not fit {type(model).__name__}: {odd[0]} is on one side only ({len(odd)} such tensors)",
            where=str(folder),
            found=odd[:8],
            remedy=RIGHT_BASE,
        )
    return wrapped


def _read_lora(folder: Path) -> tuple[ModelFolder, Any]:
    """(the folder, its LoraConfig), checked before PEFT acts on it."""
    prepare_bitsandbytes()
    import peft

    found = inspect_model_folder(folder)
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(
            f"{found.config.get('peft_type')} adapters cannot be merged into the weights",
            where=str(folder),
            remedy="give a LoRA adapter or a full model",
        )
    if config.megatron_config:
        raise ConfigError(
            f"this adapter asks for the module {config.megatron_core}, code from elsewhere, which burnish does not run",
            where=str(folder / "adapter_config.json"),
            found=config.megatron_core,
            remedy="remove megatron_config from it",
        )
    return found, config


def _touches_embeddings(model: PreTrainedModel, adapter: ModelFolder) -> bool:
    """Whether an adapter holds something of the input embedding or the head."""
    tops = (model.get_input_embeddings(), model.get_output_embeddings())
    names = [name for name, module in model.named_modules() if any(module is top for top in tops)]
    return any(f".{name}." in f"{tensor}." for tensor in adapter.tensors for name in names)


def read_low_rank(folder: Path, model: PreTrainedModel) -> dict[str, tuple[Tensor, Tensor]]:
    """layer name → (A (r, in), s·B (out, r)) of a saved plain LoRA adapter; a saved score head goes into `model`.

    Raises:
        ConfigError: Anything else is saved in it: it cannot lie beneath another adapter.
    """
    found, config = _read_lora(folder)
    tensors = load_file(folder / "adapter_model.safetensors")
    linears, pairs = find_linears(model), {}
    for tensor, value in tensors.items():
        name = tensor.removeprefix("base_model.model.")
        layer = name.removesuffix(".lora_A.weight")
        if name == "score.weight" and hasattr(model, "score"):
            model.get_submodule("score").load_state_dict({"weight": value})
        elif layer != name and layer in linears:
            pairs[layer] = (value.float(), _scale(config) * tensors[tensor.replace(".lora_A.", ".lora_B.")].float())
    used = 2 * len(pairs) + any(n.endswith("score.weight") for n in tensors)
    if not _is_plain(config) or used != len(found.tensors):
        raise ConfigError(
            "this adapter is no plain LoRA of linear layers, and cannot lie under another one over a quantised base",
            where=str(folder),
            remedy="fold it in first (burnish merge), or set quantize: none",
        )
    return pairs


def merge_copy(model: nn.Module) -> PreTrainedModel:
    """A copy of the model with its adapter added to the weights (in fp32 at least); `model` is left as it is."""
    merged = copy.deepcopy(model)
    for parameter in merged.parameters():
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
    return merged.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]


def save_adapter(
    model: nn.Module,
    folder: Path,
    *,
    base_model: str,
    revision: str | None = None,
    earlier: Path | None = None,
    state: Mapping[str, Tensor] | None = None,
) -> bool:
    """Write adapter_config.json and adapter_model.safetensors of the one adapter; the same bytes for the same weights.

    Args:
        base_model: What a script loads under the adapter.
        earlier: An adapter folder that was added to the base before this adapter was made: the two are written as one
            adapter of the base, of the sum of their ranks, W + s₁B₁A₁ + s₂B₂A₂ = W + [s₁B₁ s₂B₂][A₁; A₂].
        state: What the model trains, whole, where it is sharded.

    Returns:
        False, and nothing is written, if the earlier adapter cannot be joined (DoRA, biases, other saved modules).
    """
    import peft

    _check_single(model)
    config: Any = model.peft_config[ADAPTER]  # pyright: ignore[reportArgumentType, reportIndexIssue]
    fields = config.to_dict() | {"base_model_name_or_path": base_model, "revision": revision, "inference_mode": True}
    tensors = _adapter_tensors(model, state)
    if earlier is not None:
        before: Any = peft.PeftConfig.from_pretrained(str(earlier))
        joined = _join(load_file(earlier / "adapter_model.safetensors"), before, tensors, config)
        if joined is None:
            return False
        tensors, rank = joined
        targets = sorted({*_as_names(before.target_modules), *_as_names(config.target_modules)})
        fields |= {"r": rank, "lora_alpha": rank, "use_rslora": False, "target_modules": targets}
    save_file(dict(sorted(tensors.items())), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    plain = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in fields.items()}
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")
    return True


def _stored_name(name: str) -> str:
    """DoRA's magnitudes under the name that both PEFT and transformers find (PEFT alone accepts the shorter one)."""
    return f"{name}.weight" if name.endswith(".lora_magnitude_vector") else name


def _adapter_tensors(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    import peft

    given: Any = None if state is None else dict(state)
    found = peft.get_peft_model_state_dict(model, state_dict=given, adapter_name=ADAPTER, save_embedding_layers=False)
    return {_stored_name(n): t.detach().to("cpu").contiguous() for n, t in found.items()}


def _as_names(targets: Any) -> set[str]:
    return {targets} if isinstance(targets, str) else set(targets or ())


def _scale(config: Any) -> float:
    return config.lora_alpha / (math.sqrt(config.r) if config.use_rslora else config.r)


def _is_plain(config: Any) -> bool:
    """One rank and scale for all layers, their names given, nothing but A and B."""
    odd = config.use_dora or config.rank_pattern or config.alpha_pattern or config.bias != "none"
    return not odd and not isinstance(config.target_modules, str)


def check_exportable(lora: LoraSettings, earlier: Path) -> None:
    """An adapter in shards over one that was added to the base: the two must be writable as one (`save_adapter`).

    Raises:
        ConfigError: They are not.
    """
    before = _read_lora(earlier)[1]
    if lora.use_dora or lora.bias != "none" or not _is_plain(before):
        raise ConfigError(
            "this adapter and the earlier one cannot be written as one, and sharded weights cannot be merged",
            where="distributed.strategy",
            remedy="fold the earlier adapter in first (burnish merge), or use strategy: replicated",
        )


def _join(
    old: dict[str, Tensor], before: Any, new: dict[str, Tensor], now: Any
) -> tuple[dict[str, Tensor], int] | None:
    """Two LoRA adapters of one model as one (see `save_adapter`), or None if that cannot be exact."""
    if not (_is_plain(before) and _is_plain(now)):
        return None
    rest = {n: t for n, t in new.items() if ".lora_" not in n}
    if any(".lora_" not in n and n not in rest for n in old):
        return None
    rank = before.r + now.r
    for key in {n for n in (*old, *new) if n.endswith(".lora_A.weight")}:
        other = key.replace(".lora_A.", ".lora_B.")
        inside = next(t[key] for t in (old, new) if key in t).shape[1]
        outside = next(t[other] for t in (old, new) if other in t).shape[0]
        a, b = torch.zeros(rank, inside), torch.zeros(outside, rank)
        for tensors, config, part in ((old, before, slice(0, before.r)), (new, now, slice(before.r, rank))):
            if key in tensors:
                a[part], b[:, part] = tensors[key].float(), _scale(config) * tensors[other].float()
        rest[key], rest[other] = a, b
    return rest, rank


def check_joinable(lora: LoraSettings, *, quantised: bool, merged: bool) -> None:
    """Over a quantised base an earlier adapter and the new one are written as one (`adapters.save_adapter`).

    Raises:
        ConfigError: The new one is of a kind that cannot be joined.
    """
    if quantised and merged and (lora.use_dora or lora.bias != "none"):
        what = "use_dora" if lora.use_dora else f"bias {lora.bias}"
        raise ConfigError(
            f"{what} over an earlier adapter on a quantised base cannot be written as one adapter",
            where="lora",
            found=what,
            remedy="leave it out, or fold the earlier adapter in first (burnish merge)",
        )

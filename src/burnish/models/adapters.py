"""LoRA adapters: the only file that imports peft."""

from __future__ import annotations

import difflib
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.config.train import LoraSettings
from burnish.errors import ConfigError
from burnish.models.folder import inspect_model_folder

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
            "cohere", "cohere2", "gemma", "gemma2", "gemma3", "gemma3_text", "glm", "granite", "llama", "mistral",
            "mixtral", "olmo", "olmo2", "olmo3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "smollm3", "stablelm",
            "starcoder2",
        ),
        _QKVO,
    ),
}  # fmt: skip


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
                where="lora.target_modules", remedy=f"name them: target_modules: {leaves[:6]}, or use all-linear",
            )  # fmt: skip
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
                where="lora.target_modules", found=target,
                remedy="leave it out (a reward model's score head is trained in full anyway), or train it with top_k",
            )  # fmt: skip
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            near = difflib.get_close_matches(target, leaves, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ConfigError(
                f"no linear layer of {type(model).__name__} is called {target!r}",
                where="lora.target_modules", found=target, remedy=f"{hint}Its linear layers: {', '.join(leaves)}",
            )  # fmt: skip
    return list(asked)


def build_lora(model: PreTrainedModel, lora: LoraSettings, *, head: str, seed: int) -> nn.Module:
    """Put a fresh adapter on a frozen model; a reward model's score head trains with it and is saved with it.

    The initial values come from `seed` alone; the global random state is left as it was.
    """
    import peft

    targets = find_targets(model, lora.target_modules)
    chosen = [m for n, m in find_linears(model).items() if any(n == t or n.endswith(f".{t}") for t in targets)]
    conv = [isinstance(m, Conv1D) for m in chosen]
    if any(conv) and not all(conv):
        raise ConfigError(
            "target_modules mixes Conv1D and Linear layers, which one adapter cannot hold",
            where="lora.target_modules", found=lora.target_modules, remedy="name layers of one type only",
        )  # fmt: skip
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
    import peft

    found = inspect_model_folder(folder)
    config = peft.PeftConfig.from_pretrained(str(folder))
    if not isinstance(config, peft.LoraConfig):
        raise ConfigError(
            f"{found.config.get('peft_type')} adapters cannot be merged into the weights",
            where=str(folder), remedy="give a LoRA adapter or a full model",
        )  # fmt: skip
    config.task_type = None
    try:
        wrapped = peft.PeftModel.from_pretrained(model, str(folder), adapter_name=ADAPTER, config=config)
    except (ValueError, RuntimeError, KeyError) as e:
        raise ConfigError(
            f"the adapter does not fit {type(model).__name__}: {str(e).splitlines()[0]}",
            where=str(folder), remedy="set base_model_name_or_path in adapter_config.json to the model it was trained on",
        ) from None  # fmt: skip
    expected = set(peft.get_peft_model_state_dict(wrapped, adapter_name=ADAPTER, save_embedding_layers=False))
    if expected != found.tensors:
        odd = sorted(expected ^ found.tensors)
        raise ConfigError(
            f"the adapter does not fit {type(model).__name__}: {odd[0]} is on one side only ({len(odd)} such tensors)",
            where=str(folder), found=odd[:8],
            remedy="set base_model_name_or_path in adapter_config.json to the model it was trained on",
        )  # fmt: skip
    merged = wrapped.merge_and_unload(safe_merge=True)  # pyright: ignore[reportCallIssue]
    return merged.requires_grad_(True)


def save_adapter(model: nn.Module, folder: Path, *, base_model: str, revision: str | None = None) -> None:
    """Write adapter_config.json and adapter_model.safetensors of the one adapter; the same bytes for the same weights."""
    import peft
    from safetensors.torch import save_file

    _check_single(model)
    config: Any = model.peft_config[ADAPTER]  # pyright: ignore[reportIndexIssue]
    tensors = peft.get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    tensors = {n: t.detach().to("cpu").contiguous() for n, t in sorted(tensors.items())}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    fields = config.to_dict() | {"base_model_name_or_path": base_model, "revision": revision, "inference_mode": True}
    plain = {k: sorted(v) if isinstance(v, (set, frozenset)) else v for k, v in fields.items()}
    if isinstance(plain.get("target_modules"), list):
        plain["target_modules"] = sorted(plain["target_modules"])
    text = json.dumps(plain, indent=2, sort_keys=True, default=str) + "\n"
    (folder / "adapter_config.json").write_text(text, encoding="utf-8")

"""What of a model trains: everything, or its last K blocks, final norm and head; found by structure, not by name."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel

from burnish.errors import ConfigError
from burnish.models.bnb import count_elements


@dataclass(frozen=True, slots=True)
class Share:
    """How many parameters train; a tied parameter counts once."""

    trainable: int
    total: int

    @property
    def value(self) -> float:
        return self.trainable / self.total if self.total else 0.0

    def __str__(self) -> str:
        percent = 100 * self.value
        digits = f"{percent:.1f}" if percent >= 1 or percent == 0 else f"{percent:.2g}"
        return f"trainable: {self.trainable:,} of {self.total:,} parameters ({digits} %)"


def compute_share(model: nn.Module) -> Share:
    """Trainable and all parameters; the frozen original that PEFT keeps of a saved module is not counted."""
    seen = {id(p): p for n, p in model.named_parameters() if ".original_module." not in f".{n}"}
    trainable = sum(p.numel() for p in seen.values() if p.requires_grad)
    return Share(trainable, sum(count_elements(p) for p in seen.values()))


def find_blocks(model: PreTrainedModel) -> tuple[str, nn.Module, nn.ModuleList]:
    """(name of the list, its parent, the list) of the transformer blocks: the module list as long as the model is deep.

    Raises:
        ConfigError: The model has no such list.
    """
    backbone = model.base_model
    depth = int(model.config.get_text_config().num_hidden_layers)
    found = [
        (name, module)
        for name, module in backbone.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == depth and any(True for _ in module.parameters())
    ]
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no list of {depth} blocks that burnish recognises",
            where="top_k",
            remedy="remove top_k: train the whole model (top_k: 0) or an adapter (lora: {})",
        )
    name, blocks = min(found, key=lambda item: (item[0].count("."), item[0]))
    return name, backbone.get_submodule(name.rpartition(".")[0]), blocks


def list_blocks(module: nn.Module) -> list[nn.Module]:
    """The transformer blocks of the transformers model inside a module; none where there is no such list."""
    inner = next((m for m in module.modules() if isinstance(m, PreTrainedModel)), None)
    if inner is None:
        return []
    try:
        return list(find_blocks(inner)[2])
    except ConfigError:
        return []


def find_final_norms(parent: nn.Module, blocks: nn.ModuleList) -> dict[str, nn.Module]:
    """The norms beside the blocks that act after them (a norm of the embedding is none)."""
    return {
        name: module
        for name, module in parent.named_children()
        if module is not blocks and "norm" in type(module).__name__.lower() and "emb" not in name.lower()
    }


def find_head(model: PreTrainedModel, head: str) -> nn.Module:
    """The module on top: the output embedding of a language model, or `score` of a reward model."""
    found = model.get_output_embeddings() if head == "lm" else getattr(model, "score", None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} has no {'output embedding' if head == 'lm' else 'score head'}",
            where="model",
            remedy="use a decoder model such as Llama, Qwen, Mistral or GPT-2",
        )
    return found


def is_tied(model: PreTrainedModel) -> bool:
    """Whether input embedding and output embedding are one parameter."""
    out = model.get_output_embeddings()
    return out is not None and out.weight is model.get_input_embeddings().weight


def untie_embeddings(model: PreTrainedModel) -> list[str]:
    """Give the head its own copy of the embedding's weight, in a way that saving and loading keep."""
    if not is_tied(model):
        return ["the embeddings are not tied; untie_embeddings changes nothing"]
    out = model.get_output_embeddings()
    assert out is not None
    out.weight = nn.Parameter(out.weight.detach().clone())
    model.config.tie_word_embeddings = False
    model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
    return ["input embedding and head are untied: each has its own weights from here on"]


def freeze_all_but_top(model: PreTrainedModel, top_k: int, *, head: str) -> list[str]:
    """Set requires_grad on exactly the last `top_k` blocks, the final norm and the head; 0 = on everything.

    Returns:
        Notes for the user.

    Raises:
        ConfigError: More blocks asked for than there are.
    """
    if top_k == 0:
        model.requires_grad_(True)
        return []
    _, parent, blocks = find_blocks(model)
    if top_k > len(blocks):
        raise ConfigError(
            f"top_k is {top_k}, but the model has {len(blocks)} layers",
            where="top_k",
            found=top_k,
            remedy=f"set top_k to 1 … {len(blocks)}, or 0 to train everything",
        )
    model.requires_grad_(False)
    norms = find_final_norms(parent, blocks)
    for module in (*blocks[-top_k:], *norms.values(), find_head(model, head)):
        module.requires_grad_(True)
    notes = [
        f"top_k {top_k}: the last {top_k} of {len(blocks)} blocks, {', '.join(norms) or 'no norm'} and the head train"
    ]
    if head == "lm" and is_tied(model):
        notes.append(
            "the input embedding is tied to the head and trains too (untie_embeddings: true gives the head its own)"
        )
    return notes


def find_no_decay(model: nn.Module, names: list[str]) -> frozenset[str]:
    """Of these parameters those that weight decay leaves alone: biases, norms, whatever has one dimension."""
    parameters = dict(model.named_parameters())
    norms = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if "norm" in type(module).__name__.lower()
        for name, _ in module.named_parameters(recurse=False)
    }
    return frozenset(n for n in names if parameters[n].ndim <= 1 or n in norms or n.endswith(".bias"))


def cast_trainable(model: nn.Module, dtype: torch.dtype) -> None:
    """Trainable parameters become `dtype` masters in place; frozen ones keep their type."""
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)

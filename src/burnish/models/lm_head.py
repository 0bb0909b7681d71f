"""How a causal model turns hidden states into logits: the closed table that the chunked head honours."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from burnish.core.logits import HeadInput, LogitTransform

# Configuration fields that change logits after the head's matrix product, found by reading every causal model of
# transformers 5.23. The load-time self-check compares the result with the model's own logits.
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_MULTIPLIERS = ("logit_scale", "lm_head_multiplier", "output_multiplier")


def get_backbone(inner: Any) -> nn.Module:
    """The transformers model below its head."""
    base = inner.base_model
    return inner.model if base is inner else base


def read_transform(config: Any) -> LogitTransform:
    """What the model of this configuration does to its logits.

    `logits_scaling` divides (Granite; MiniCPM3 divides the hidden states, which is the same) except in HyperCLOVA X.
    """
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    scale, softcap = 1.0, None
    for name in _MULTIPLIERS:
        scale *= float(getattr(config, name, None) or 1.0)
    scaling = float(getattr(config, "logits_scaling", None) or 1.0)
    scale = scale * scaling if str(config.model_type).startswith("hyperclovax") else scale / scaling
    for name in _SOFTCAPS:
        value = getattr(config, name, None)
        softcap = float(value) if value else softcap
    return LogitTransform(scale, softcap)


def build_head_input(inner: Any, hidden: Tensor) -> HeadInput:
    """Hidden states joined with the head of a causal model.

    A plain linear head (also one that PEFT trains whole) is read by its weight; anything else (an adapter, quantised
    weights) is called.
    """
    head = inner.get_output_embeddings()
    transform = read_transform(inner.config)
    if has_plain_head(inner):
        return HeadInput(hidden, head.weight, head.bias, transform)
    return HeadInput(hidden, transform=transform, module=head)


def has_plain_head(inner: Any) -> bool:
    """Whether the head is a matrix that may be read, not an adapter on one."""
    head = inner.get_output_embeddings()
    kept = getattr(head, "modules_to_save", None)  # PEFT's wrapper of a module that is trained whole
    if kept is not None:
        return all(type(m) is nn.Linear for m in (head.original_module, *kept.values()))
    return type(head) is nn.Linear

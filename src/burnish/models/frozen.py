"""Models that only answer: loaded without anything to train, in the type that the device computes in."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from burnish.models.load import load_model
from burnish.models.policy import Policy
from burnish.models.precision import PrecisionPlan
from burnish.models.quantise import Quantization


def load_frozen(
    folder: Path,
    *,
    head: Literal["lm", "score"],
    precision: PrecisionPlan,
    device: torch.device,
    attention: Any,
    quantization: Quantization | None = None,
    trust_remote_code: bool = False,
    place: bool = True,
) -> Policy:
    """A model in evaluation mode, without gradients and with every dropout off.

    Args:
        head: "score" refuses a model whose score head was never trained.
        precision: See `resolve_precision`, not for training.
        quantization: Store the base's linear layers in few bits, an adapter exactly beside them.
        place: Move it to the device now.

    Raises:
        ConfigError: The folder holds another kind of model, or none that can be loaded.
    """
    model, _ = load_model(
        str(folder),
        head=head,
        dtype=precision.frozen if precision.compute else torch.float32,
        disable_dropout=True,
        trust_remote_code=trust_remote_code,
        need_trained_head=head == "score",
        quantization=quantization,
        attach=quantization is not None,
    )
    module: Any = model
    if place:
        module.to(device)
    policy = Policy(model, head=head, attention=attention, compute_dtype=precision.compute, device=device).eval()
    policy.requires_grad_(False)
    return policy

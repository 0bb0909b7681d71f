"""Which number types a stage computes in, always said aloud."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from burnish.errors import ConfigError

SMALL_HIDDEN = 96
SMALL_HIDDEN_EVALUATION = 256  # generation with small models is bound by calls, not by products


@dataclass(frozen=True, slots=True)
class PrecisionPlan:
    """The types of a stage.

    Attributes:
        compute: The type of matrix products under autocast; None = no autocast (fp32).
        frozen: The type in which frozen weights are kept. Trainable ones keep fp32 masters.
        why: One line for the log.
    """

    compute: torch.dtype | None
    frozen: torch.dtype
    why: str

    @property
    def fp16(self) -> bool:
        return self.compute == torch.float16

    @property
    def name(self) -> str:
        return {None: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.compute]


def has_fast_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bf16 matrices faster than fp32 ones."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    flags = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(flags.get("avx512_bf16") or flags.get("amx_bf16") or flags.get("amx_tile"))


def resolve_precision(wanted: str, device: torch.device, hidden_size: int, *, training: bool = True) -> PrecisionPlan:
    """`auto|fp32|bf16|fp16` → types. auto: bf16 where it is fast and the model large enough to be bound by products.

    Args:
        training: Training, where products are three times as many; else evaluation and generation.

    Raises:
        ConfigError: The device cannot compute in the wanted type.
    """
    if wanted == "fp32":
        return PrecisionPlan(None, torch.float32, "fp32, as set")
    if wanted == "bf16":
        return PrecisionPlan(torch.bfloat16, torch.bfloat16, "bf16 autocast with fp32 masters, as set")
    if wanted == "fp16":
        if device.type == "cpu":
            raise ConfigError(
                "fp16 is slow and inexact on a CPU", where="precision", found=wanted, remedy="use bf16 or fp32"
            )
        return PrecisionPlan(torch.float16, torch.float16, "fp16 autocast with fp32 masters and a loss scale, as set")
    if not has_fast_bf16(device):
        return PrecisionPlan(None, torch.float32, f"fp32 (auto: {device.type} has no fast bf16)")
    if device.type == "cpu" and hidden_size < (SMALL_HIDDEN if training else SMALL_HIDDEN_EVALUATION):
        return PrecisionPlan(
            None, torch.float32, f"fp32 (auto: hidden size {hidden_size} is too small to gain from bf16)"
        )
    return PrecisionPlan(
        torch.bfloat16, torch.bfloat16, f"bf16 autocast with fp32 masters (auto: fast on this {device.type})"
    )

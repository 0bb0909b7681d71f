"""From the device to the host: the one place of an optimizer step that waits for the device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def fetch_numbers(tensors: Sequence[Tensor]) -> list[float]:
    """Numbers on the device as Python floats, one after the other, by one copy and one wait.

    Everything that a step wants to know on the host (terms, metrics, whether the numbers are finite, the gradient's norm) goes
    through here once, before the optimizer. fp64 stays fp64; anything else travels as fp32.
    """
    if not tensors:
        return []
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    return torch.cat([t.detach().reshape(-1).to(wide) for t in tensors]).tolist()

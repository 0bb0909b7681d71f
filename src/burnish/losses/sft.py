"""The loss of supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_nll(logprobs: Tensor) -> Tensor:
    """−log π(y_t): the negative log-likelihood of each scored token.

    Args:
        logprobs: (S,) log-probs of the scored tokens, nats.

    Returns:
        (S,) losses in nats, at least fp32. The engine divides their sum by the scored tokens of the whole step, so
        every token weighs the same, whatever the lengths and the split into micro-batches.
    """
    return -logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))

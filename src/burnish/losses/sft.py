"""The loss of supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.losses.pairs import PairLoss, Pairs


def compute_nll(logprobs: Tensor) -> Tensor:
    """−log π(y_t): the negative log-likelihood of each scored token.

    Args:
        logprobs: (S,) log-probs of the scored tokens, nats.

    Returns:
        (S,) losses in nats, at least fp32. The engine divides their sum by the scored tokens of the whole step, so
        every token weighs the same, whatever the lengths and the split into micro-batches.
    """
    return -logprobs.to(torch.promote_types(logprobs.dtype, torch.float32))


def compute_chosen_nll(pairs: Pairs) -> PairLoss:
    """−Σ_t log π(y_t) of the chosen completion: the supervised part of RPO, CPO and ORPO.

    Source: iterative RPO, Pang et al. 2024 (arXiv 2404.19733). The engine divides the sum by the chosen
    completions' scored tokens of the whole step, as TRL's `sft` does, not by each answer's own length as the paper does.
    It compares nothing: the rewards are the sums of log-probs.

    Args:
        pairs: (G,) tensors.
    """
    return PairLoss(-pairs.chosen, pairs.chosen, pairs.rejected)

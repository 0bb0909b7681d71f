"""Weighted preference optimisation: off-policy pairs weigh by how likely the policy itself is to write them."""

from __future__ import annotations

import torch
from torch import Tensor

from burnish.core.batch import Table


def compute_pair_weights(logprobs: Tensor, log_square_sum: Tensor, table: Table) -> Tensor:
    """(G,): the product over both completions of exp(mean_t (log π(y_t) − log Σ_v π(v)²)), without gradient.

    Source: WPO, Zhou et al. 2024 (arXiv 2406.11827), eq. 2, with its alignment of weights: π/Σπ² has the mean 1 under the
    policy's own sampling, whatever the entropy.

    Args:
        logprobs: (S,) log-probs of the scored tokens under the policy, nats.
        log_square_sum: (S,) log Σ_v π(v)² at the same positions.
        table: Its groups are pairs.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    aligned = table.sum_tokens((logprobs - log_square_sum).detach().to(dtype))
    mean = aligned / table.completion_scored.to(dtype).clamp(min=1)
    return torch.exp(table.slot(mean, 0) + table.slot(mean, 1))

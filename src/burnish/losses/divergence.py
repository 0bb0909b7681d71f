"""Divergences from the reference: from a log-ratio to the implicit reward behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.losses.pairs import Pairs


def compute_divergence_scores(
    pairs: Pairs, f_divergence_type: str = "reverse_kl", f_alpha_divergence_coef: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(f′(e^a), f′(e^z)): what takes the place of the log-ratios a and z under another divergence than the reverse KL.

    reverse_kl: x; forward_kl: 1 − e^−x; js_divergence: log 2 + log σ(x); alpha_divergence of order α:
    (e^((α−1)x) − 1)/(α − 1), at α = 1 x itself.

    Source: f-DPO, Wang et al. 2023 (arXiv 2309.16240), table 1; constants cancel between the two answers,
    which is why only losses of a difference can be read so. α as in TRL: 0 is the forward KL; the paper's α is 1 minus this.
    Exponents are cut at 80 (fp64: 700), where e^x still is a number; beyond that the gradient is 0.

    Args:
        pairs: (G,) tensors.

    Returns:
        Two (G,) tensors, equal to a and z to first order around 0 (js_divergence: half of them).
    """
    return (
        _compute_score(pairs.chosen_ratio, f_divergence_type, f_alpha_divergence_coef),
        _compute_score(pairs.rejected_ratio, f_divergence_type, f_alpha_divergence_coef),
    )


def _compute_score(x: Tensor, divergence: str, alpha: float) -> Tensor:
    if divergence == "js_divergence":
        return math.log(2) + logsigmoid(x)
    order = {"reverse_kl": 1.0, "forward_kl": 0.0, "alpha_divergence": alpha}[divergence]
    if abs(order - 1) < 1e-6:
        return x
    limit = 700.0 if x.dtype == torch.float64 else 80.0
    return torch.expm1(((order - 1) * x).clamp(max=limit)) / (order - 1)

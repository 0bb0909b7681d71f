"""The odds-ratio loss: preference pairs without a reference model."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.losses.pairs import PairLoss, Pairs


def compute_odds_ratio_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """−β log σ(log odds(y_c) − log odds(y_r)), odds(y) = p/(1 − p) with p = e^(mean log-prob a token of y).

    Source: ORPO, Hong et al. 2024 (arXiv 2403.07691), eq. 4 and 7; β is its λ, 0.1 by default. The other part of
    ORPO, the chosen answer's NLL, is a term of its own. The rewards are the log odds.

    Args:
        pairs: (G,) tensors.
        beta: λ > 0, weight of this term.
    """
    chosen = _compute_log_odds(pairs.chosen / pairs.chosen_tokens.clamp(min=1))
    rejected = _compute_log_odds(pairs.rejected / pairs.rejected_tokens.clamp(min=1))
    return PairLoss(-beta * logsigmoid(chosen - rejected), chosen, rejected)


def _compute_log_odds(mean: Tensor) -> Tensor:
    """m − log(1 − e^m) for mean log-probs m ≤ 0; an answer of probability 1 counts as 1 − 2⁻²⁴ (fp64: 1 − 2⁻⁵³)."""
    mean = mean.clamp(max=-torch.finfo(mean.dtype).eps / 2)
    return mean - torch.log(-torch.expm1(mean))

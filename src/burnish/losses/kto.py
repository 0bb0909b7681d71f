"""Losses on single answers that are good or bad, without pairs: the loss types of `kind: kto`.

Notation: r = Σ_t (log π − log π_ref) of an answer, nats; z its KL baseline; σ the logistic function; D the desirable rows
(label 1), U the undesirable ones (label 0). All tensors are (G,), one number a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def compute_kl_baseline(partner_ratio: Tensor) -> Tensor:
    """max(0, mean of log π(y′|x) − log π_ref(y′|x)) over mismatched pairs: a cheap estimate of KL(π ‖ π_ref), no gradient.

    Source: KTO, Ethayarajh et al. 2024 (arXiv 2402.01306), section 4.1. y′ answers another prompt than x, so that the estimate
    is low in variance but biased; the paper clamps it at 0.

    Args:
        partner_ratio: (G,) log-ratios of the partners, over the whole optimizer step and all processes.

    Returns:
        () nats, at least fp32; 0 without partners.
    """
    ratio = partner_ratio.detach().to(torch.promote_types(partner_ratio.dtype, torch.float32))
    return (ratio.sum() / max(ratio.shape[0], 1)).clamp(min=0)


def compute_kto_loss(
    ratio: Tensor, label: Tensor, baseline: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """λ_D (1 − σ(β(r − z))) for a desirable row, λ_U (1 − σ(β(z − r))) for an undesirable one.

    Source: KTO (arXiv 2402.01306), eq. 8 (the constant λ_y of the paper's λ_y − v is left in: losses lie in [0, λ]).

    Args:
        ratio: (G,) r, with the policy's gradient.
        label: (G,) 1 = desirable, 0 = undesirable.
        baseline: () z.
        beta: β > 0, 1/nats: how fast a gain saturates.
        desirable_weight: λ_D. undesirable_weight: λ_U.

    Returns:
        (G,) losses.
    """
    desirable = label > 0.5
    sign, weight = _weigh(ratio, desirable, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * sign * (ratio - baseline.to(ratio.dtype)))


def compute_apo_zero_unpaired_loss(
    ratio: Tensor, label: Tensor, *, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """λ_D (1 − σ(βr)) for a desirable row, λ_U σ(βr) for an undesirable one: KTO without its baseline.

    Source: anchored preference optimisation (APO-zero), D'Oosterlinck et al. 2024 (arXiv 2408.06266), taken row by row.

    Args:
        ratio: (G,) r, with the policy's gradient.
        label: (G,) 1 = desirable, 0 = undesirable.
        beta: β > 0, 1/nats.
        desirable_weight: λ_D. undesirable_weight: λ_U.

    Returns:
        (G,) losses.
    """
    sign, weight = _weigh(ratio, label > 0.5, desirable_weight, undesirable_weight)
    return weight * torch.sigmoid(-beta * sign * ratio)


def _weigh(
    ratio: Tensor, desirable: Tensor, desirable_weight: float, undesirable_weight: float
) -> tuple[Tensor, Tensor]:
    """(G,) +1 or −1, and (G,) weights."""
    one = torch.ones_like(ratio)
    return torch.where(desirable, one, -one), torch.where(desirable, desirable_weight * one, undesirable_weight * one)

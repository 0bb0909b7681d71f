"""Margin-adaptive preference optimisation: a fixed reward model says how much a pair still has to teach."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

COLUMN = "reward_margin"  # the group column that holds h


def compute_coefficient(size: Tensor, *, c_max: float, c_min: float, steepness: float, tau: float) -> Tensor:
    """c(|h|) = c_min + (c_max − c_min) / (1 + (c_max − 1)/(1 − c_min) · exp(λ(|h| − τ))), in the shape of `size`.

    It falls from c_max (hard pairs) to c_min (easy ones) and is 1 at τ. Written as a logistic function, so that no
    exponential can overflow.

    Args:
        size: |h|.
        steepness: λ.
    """
    at_tau = math.log(c_max - 1) - math.log(1 - c_min)
    return c_min + (c_max - c_min) * torch.sigmoid(-(steepness * (size - tau) + at_tau))


def compute_margin_weights(margin: Tensor, *, c_max: float, c_min: float, steepness: float, tau: float) -> Tensor:
    """(G,) weights w(h) = σ(c(|h|) h) / σ(h) where h > −τ, else 1; at least fp32, without gradient.

    Source: MADPO, Rho 2025 (arXiv 2510.05342), in the form of the author's code. The quotient is formed from logarithms:
    it is exact where both sigmoids are nearly 0.

    Args:
        margin: (G,) h = r(chosen) − r(rejected), scores of a fixed reward model.
        c_max, c_min: Coefficients of the hardest and the easiest pairs, above 1 and between 0 and 1.
        steepness: λ > 0, how fast the one goes over into the other.
        tau: τ > 0, the size of h at which the weight is 1; below −τ, where the label contradicts the reward model, too.
    """
    h = margin.detach().to(torch.promote_types(margin.dtype, torch.float32))
    c = compute_coefficient(h.abs(), c_max=c_max, c_min=c_min, steepness=steepness, tau=tau)
    return torch.where(h <= -tau, torch.ones_like(h), torch.exp(logsigmoid(c * h) - logsigmoid(h)))

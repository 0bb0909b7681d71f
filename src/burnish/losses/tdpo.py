"""Token-level losses on pairs: what the policy does to the whole distribution at each token, not only to the token.

Notation: a, z = Σ_t (log π − log π_ref) of the chosen and the rejected completion; R_c, R_r their divergences, summed over the
scored tokens t; d_v = log π_ref(v) − log π(v) for each token v of the vocabulary; σ the logistic function. All tensors are (G,)
unless said otherwise. The reference runs live: nothing of size (tokens, vocabulary) is stored.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.core.logits import Functional
from burnish.losses.pairs import PairLoss, Pairs

SEQUENTIAL_KL = "sequential_kl"


def compute_sequential_kl(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    """(B, V), (B, V) → (B,): KL(π_ref ‖ π) = Σ_v π_ref(v) d_v of each position, nats."""
    weight, gap = _compare(logits, against)
    return (weight * gap).sum(-1)


def _pull_sequential_kl(p: Tensor, targets: Tensor, against: Tensor | None, grad: Tensor) -> Tensor:
    """d/d logits of `compute_sequential_kl`: π − π_ref."""
    assert against is not None
    return torch.sub(p, torch.softmax(against.to(p.dtype), -1)).mul_(grad[:, None])


def build_risk(confidence: float) -> Functional:
    """Σ_v π_ref(v) d_v over the tokens v whose d_v exceeds the (1 − c)-quantile of d over the vocabulary.

    Source: Ra-DPO (arXiv 2505.20359), its risk ratio as its authors' code computes it: a quantile over the vocabulary without
    weights, no factor 1/(1 − c). The quantile is interpolated linearly and carries no gradient.

    Args:
        confidence: c in (0, 1]. At 1 all but the smallest entry count: the sequential KL up to that entry.
    """

    def compute_risk(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
        weight, gap = _compare(logits, against)
        risky = gap.detach() > compute_quantile(gap.detach(), 1 - confidence)[:, None]
        return (weight * gap * risky).sum(-1)

    return Functional(name_risk(confidence), compute_risk, needs_against=True)


def name_risk(confidence: float) -> str:
    """The functional's name in `pairs.sums`."""
    return f"risk_{confidence:g}"


def _compare(logits: Tensor, against: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, V) π_ref without gradient, and (B, V) d with it."""
    assert against is not None
    reference = torch.log_softmax(against.to(logits.dtype), dim=-1).detach()
    return reference.exp(), reference - torch.log_softmax(logits, dim=-1)


def compute_quantile(values: Tensor, q: float) -> Tensor:
    """(B, V) → (B,) the q-quantile of each row, interpolated linearly; of any size (`torch.quantile` has a limit)."""
    place = q * (values.shape[-1] - 1)
    low = math.floor(place + 1e-9)
    share = min(max(place - low, 0.0), 1.0)
    floor, ceiling = _find_neighbours(values, low)
    return floor if share < 1e-9 else torch.lerp(floor, ceiling, share)


def _find_neighbours(values: Tensor, low: int) -> tuple[Tensor, Tensor]:
    """(B, V) → two (B,): the entries number `low` and `low` + 1 (the last one again, if there is none) in ascending order."""
    if values.device.type == "cpu" and values.dtype in (torch.float32, torch.float64):  # NumPy selects faster
        parted = torch.from_numpy(np.partition(values.numpy(), low, axis=-1))
        floor, above = parted[:, low], parted[:, low + 1 :]
        return floor, above.amin(-1) if above.shape[1] else floor
    ordered = values.sort(dim=-1).values  # `kthvalue` has no deterministic form on CUDA
    return ordered[:, low], ordered[:, min(low + 1, values.shape[-1] - 1)]


def build_tdpo(settings: Any) -> tuple[Functional, ...]:
    """What tdpo1 and tdpo2 read."""
    return (Functional(SEQUENTIAL_KL, compute_sequential_kl, needs_against=True, pull=_pull_sequential_kl),)


def build_radpo(settings: Any) -> tuple[Functional, ...]:
    """What radpo1 and radpo2 read, for the setting `radpo_confidence`."""
    return (build_risk(settings.radpo_confidence),)


def compute_tdpo1_loss(pairs: Pairs, *, beta: float) -> PairLoss:
    """−log σ(β(a − z) − β(R_r − R_c)), R the sequential KL(π_ref ‖ π).

    Source: TDPO, Zeng et al. 2024 (arXiv 2404.11999), eq. 13.

    Args:
        pairs: (G,) tensors; `sums["sequential_kl"]`.
        beta: β > 0, 1/nats.
    """
    return _compare_first(pairs, SEQUENTIAL_KL, beta)


def compute_tdpo2_loss(pairs: Pairs, *, beta: float, tdpo_alpha: float) -> PairLoss:
    """−log σ(β(a − z) − αβ(R_r − sg(R_c))), R the sequential KL(π_ref ‖ π), sg: no gradient.

    Source: TDPO, Zeng et al. 2024 (arXiv 2404.11999), eq. 17; α = 0.5 there.

    Args:
        pairs: (G,) tensors; `sums["sequential_kl"]`.
        beta: β > 0, 1/nats.
        tdpo_alpha: α ≥ 0; 0 is DPO.
    """
    return _compare_second(pairs, SEQUENTIAL_KL, beta, tdpo_alpha)


def compute_radpo1_loss(pairs: Pairs, *, beta: float, radpo_confidence: float) -> PairLoss:
    """−log σ(β(a − z) − β(R_r − R_c)), R the sequential risk ratio of `build_risk`.

    Source: Ra-DPO (arXiv 2505.20359), its first variant.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        radpo_confidence: c in (0, 1].
    """
    return _compare_first(pairs, name_risk(radpo_confidence), beta)


def compute_radpo2_loss(pairs: Pairs, *, beta: float, radpo_confidence: float, tdpo_alpha: float) -> PairLoss:
    """−log σ(β(a − z) − αβ(R_r − sg(R_c))), R the sequential risk ratio of `build_risk`, sg: no gradient.

    Source: Ra-DPO (arXiv 2505.20359), its second variant; α = 0.5 there.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        radpo_confidence: c in (0, 1].
        tdpo_alpha: α ≥ 0; 0 is DPO.
    """
    return _compare_second(pairs, name_risk(radpo_confidence), beta, tdpo_alpha)


def _compare_first(pairs: Pairs, name: str, beta: float) -> PairLoss:
    chosen, rejected = pairs.sums[name]
    return _finish(beta * (pairs.chosen_ratio + chosen), beta * (pairs.rejected_ratio + rejected), chosen, rejected)


def _compare_second(pairs: Pairs, name: str, beta: float, alpha: float) -> PairLoss:
    chosen, rejected = pairs.sums[name]
    return _finish(
        beta * (pairs.chosen_ratio + alpha * chosen.detach()),
        beta * (pairs.rejected_ratio + alpha * rejected),
        chosen,
        rejected,
    )


def _finish(chosen_reward: Tensor, rejected_reward: Tensor, chosen: Tensor, rejected: Tensor) -> PairLoss:
    loss = -logsigmoid(chosen_reward - rejected_reward)
    return PairLoss(
        loss, chosen_reward, rejected_reward, {"divergence/chosen": chosen, "divergence/rejected": rejected}
    )

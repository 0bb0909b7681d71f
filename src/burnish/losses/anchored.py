"""Losses on preference pairs that pull each answer's own reward, not only the difference of the two.

Notation as in `burnish.losses.dpo`: a, z the log-ratios of the chosen and the rejected completion, σ the logistic
function; all tensors are (G,). They have no reading under another divergence: a constant of the prompt, which the
difference of two answers loses, would stay in each reward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from burnish.losses.pairs import PairLoss, Pairs


def compute_nca_pair_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """−log σ(βa) − ½ log σ(−βa) − ½ log σ(−βz): noise-contrastive alignment; the chosen answer's likelihood cannot sink.

    Source: NCA, Chen et al. 2024 (arXiv 2402.05369), for pairs as in its section 4.1; β = 0.01 there.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(-logsigmoid(chosen) - (logsigmoid(-chosen) + logsigmoid(-rejected)) / 2, chosen, rejected)


def compute_sppo_hard_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """(a − 1/(2β))² + (z + 1/(2β))²: self-play preference optimisation with the labels as hard win rates.

    Source: SPPO, Wu et al. 2024 (arXiv 2405.00675), eq. 4.7 with P = 1 for the chosen and 0 for the rejected answer;
    1/β is the paper's η, 1,000 there.

    Args:
        pairs: (G,) tensors.
        beta: β > 0; ±1/(2β) nats is the aim of either answer.
    """
    a, z = pairs.chosen_ratio, pairs.rejected_ratio
    aim = 1 / (2 * beta)
    return PairLoss((a - aim) ** 2 + (z + aim) ** 2, a, z)


def compute_apo_zero_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """1 − σ(βa) + σ(βz): raises the chosen and lowers the rejected answer; for chosen answers better than the model's own.

    Source: APO, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 7; β = 0.1 there.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


def compute_apo_down_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """σ(βa) + 1 − σ(β(a − z)): lowers both, the rejected answer more; for chosen answers worse than the model's own.

    Source: APO, D'Oosterlinck et al. 2024 (arXiv 2408.06266), eq. 8; β = 0.1 there.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected)


class RewardShift:
    """BCO's running shift δ: the mean of all implicit rewards, chosen and rejected, over the steps so far.

    State: `rewards`, how many were seen, and `mean`.
    """

    @staticmethod
    def initial() -> dict[str, Any]:
        """Nothing seen: δ = 0."""
        return {"rewards": 0, "mean": 0.0}

    @staticmethod
    def move(pairs: Pairs, state: Mapping[str, Any], beta: float | Tensor) -> tuple[int, Tensor]:
        """(rewards seen with these, () fp64 their mean); no gradient."""
        rewards = torch.cat((beta * pairs.chosen_ratio, beta * pairs.rejected_ratio)).detach().double()
        seen = int(state["rewards"]) + rewards.numel()
        return seen, (rewards.sum() + state["rewards"] * state["mean"]) / max(seen, 1)

    @classmethod
    def advance(cls, pairs: Pairs, state: Mapping[str, Any], *, beta: float | Tensor) -> dict[str, Any]:
        """The state after a step with these pairs."""
        seen, mean = cls.move(pairs, state, beta)
        return {"rewards": seen, "mean": float(mean)}


def compute_bco_pair_loss(
    pairs: Pairs, *, beta: float | Tensor, state: Mapping[str, Any], evaluating: bool = False
) -> PairLoss:
    """−log σ(βa − δ) − log σ(−(βz − δ)) with the running shift δ, this step's rewards included.

    Source: BCO, Jung et al. 2024 (arXiv 2404.04656), section 4; β = 0.01 there. δ is the mean of all rewards since
    the stage began, as in the authors' code. TRL 1.16's `bco_pair` is this with δ = 0.

    Args:
        pairs: (G,) tensors, those of the whole step.
        beta: β > 0, 1/nats.
        state: Of `RewardShift`.
        evaluating: δ is that of the state, without these rewards.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    shift = state["mean"] if evaluating else RewardShift.move(pairs, state, beta)[1].to(chosen.dtype)
    return PairLoss(-logsigmoid(chosen - shift) - logsigmoid(shift - rejected), chosen, rejected)

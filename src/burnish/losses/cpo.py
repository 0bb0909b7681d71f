"""Losses on preference pairs without a reference model, on sums or means of log-probs: CPO and SimPO.

Notation: c, r = Σ log π of the chosen and the rejected completion (`pairs.chosen`, `pairs.rejected`), n_c, n_r their
scored tokens, ε = label_smoothing, σ the logistic function. All tensors are (G,).
"""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu

from burnish.losses.dpo import compute_smoothed_logistic
from burnish.losses.pairs import PairLoss, Pairs


def compute_cpo_sigmoid_loss(pairs: Pairs, *, beta: float | Tensor, label_smoothing: float = 0.0) -> PairLoss:
    """−(1−ε) log σ(β(c − r)) − ε log σ(−β(c − r)): DPO with a uniform reference.

    Source: CPO, Xu et al. 2024 (arXiv 2401.08417), eq. 3; ε as in cDPO. The paper's second term, the chosen answer's
    NLL, is a term of its own (`cpo_alpha`).

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        label_smoothing: ε in [0, ½).
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return PairLoss(compute_smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def compute_cpo_hinge_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """max(0, 1 − β(c − r)): SLiC's calibration loss on sums of log-probs.

    Source: SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), scaled so that its margin is 1/β nats.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
    """
    chosen, rejected = beta * pairs.chosen, beta * pairs.rejected
    return PairLoss(relu(1 - (chosen - rejected)), chosen, rejected)


def compute_cpo_ipo_loss(pairs: Pairs, *, beta: float | Tensor) -> PairLoss:
    """(c/n_c − r/n_r − 1/(2β))²: IPO with a uniform reference, on means over tokens.

    Source: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17, with CPO's uniform reference, as TRL has it.

    Args:
        pairs: (G,) tensors.
        beta: τ of IPO; the margin is pulled to 1/(2β) nats a token.
    """
    chosen, rejected = _compute_means(pairs)
    return PairLoss((chosen - rejected - 1 / (2 * beta)) ** 2, chosen, rejected)


def compute_simpo_loss(
    pairs: Pairs, *, beta: float | Tensor, simpo_gamma: float, label_smoothing: float = 0.0
) -> PairLoss:
    """−(1−ε) log σ(x) − ε log σ(−x) with x = β(c/n_c − r/n_r) − γ: SimPO.

    Source: Meng et al. 2024 (arXiv 2405.14734), eq. 6; β = 2 and γ = 1 are those of its Llama-3-Base models. ε as in the
    authors' code. The margin that is logged is x + γ.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, tokens/nat.
        simpo_gamma: γ ≥ 0, the margin that a pair should reach, on the scale of β times the mean log-probs.
        label_smoothing: ε in [0, ½).
    """
    c, r = _compute_means(pairs)
    chosen, rejected = beta * c, beta * r
    return PairLoss(compute_smoothed_logistic(chosen - rejected - simpo_gamma, label_smoothing), chosen, rejected)


def _compute_means(pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(c/n_c, r/n_r); 0 for a completion without scored tokens."""
    return pairs.chosen / pairs.chosen_tokens.clamp(min=1), pairs.rejected / pairs.rejected_tokens.clamp(min=1)

"""Losses on preference pairs against a reference that are functions of one margin.

A loss type is a function `f(pairs, *, beta, …) -> PairLoss`. Its keyword-only parameters are the settings that it
reads; one that no loss type of a stage names cannot be set there. Your own function with this signature is
`loss_type: module:function`. `beta` may be a number, a () tensor or a (G,) tensor, one β a pair.

Notation: a, z = Σ_t (log π − log π_ref) of the chosen and the rejected completion (`pairs.chosen_ratio`,
`pairs.rejected_ratio`), under another divergence than the reverse KL f(a), f(z) in their place (see
`burnish.losses.divergence`); n_c, n_r their scored tokens; Δ = a − z; ε = label_smoothing; σ the logistic function. All
tensors are (G,), one number a pair.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from burnish.losses.divergence import compute_divergence_scores
from burnish.losses.pairs import PairLoss, Pairs


def compute_sigmoid_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO, and with ε > 0 conservative DPO (cDPO).

    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO", eq. 3. TRL's `sigmoid` ignores label_smoothing; this one does not.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, strength of the pull towards the reference, 1/nats.
        label_smoothing: ε in [0, ½), the share of labels believed to be flipped.
    """
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    return PairLoss(compute_smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def compute_smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """−(1−ε) log σ(x) − ε log σ(−x).

    Args:
        margin: (G,) x.
        label_smoothing: ε in [0, ½).
    """
    loss = -logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin)
    return loss


def compute_robust_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float = 0.1,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """(−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε): robust DPO, unbiased when a share ε of the labels is flipped.

    Source: Chowdhury et al. 2024 (arXiv 2403.00409), section 3.1; ε = 0.1 and β = 0.01 are those of its experiments. Its
    expectation over flips is the loss of the clean labels; it has no lower bound. At ε = 0 it is `sigmoid`.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        label_smoothing: ε in (0, ½), the share of flipped labels.
    """
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    margin = chosen - rejected
    flipped = label_smoothing * logsigmoid(-margin)
    return PairLoss(
        (flipped - (1 - label_smoothing) * logsigmoid(margin)) / (1 - 2 * label_smoothing), chosen, rejected
    )


def compute_hinge_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """max(0, 1 − βΔ): the hinge of SLiC with the reference-corrected margin.

    Source: SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), with DPO's margin as in RSO, Liu et al. 2023 (arXiv
    2309.06657). Differs from SLiC: the margin is measured against the reference, and there is no regression term.

    Args:
        pairs: (G,) tensors.
        beta: β > 0; 1/β nats is the distance at which a pair is taken as learnt.
    """
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    return PairLoss(relu(1 - (chosen - rejected)), chosen, rejected)


def compute_ipo_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """(a/n_c − z/n_r − 1/(2β))²: IPO on length-averaged log-ratios.

    Source: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17. Differs from the paper: the log-ratios are means over
    tokens, not sums, as its authors advised for language models (and as TRL computes); so β is on another scale than
    in `sigmoid`.

    Args:
        pairs: (G,) tensors.
        beta: τ of the paper; the margin is pulled to 1/(2β) nats a token, from both sides.
    """
    chosen, rejected = _compute_mean_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    return PairLoss((chosen - rejected - 1 / (2 * beta)) ** 2, chosen, rejected)


def compute_sigmoid_norm_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """−(1−ε) log σ(x) − ε log σ(−x) with x = β(a/n_c − z/n_r): length-normalised DPO.

    Source: Tülu 3, Lambert et al. 2024 (arXiv 2411.15124), there with β = 5. ε as in `sigmoid`; TRL has none here.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, tokens/nat.
        label_smoothing: ε in [0, ½).
    """
    a, z = _compute_mean_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    return PairLoss(compute_smoothed_logistic(chosen - rejected, label_smoothing), chosen, rejected)


def compute_exo_pair_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    label_smoothing: float = 1e-3,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """σ(βΔ) (log σ(βΔ) − log(1−ε)) + σ(−βΔ) (log σ(−βΔ) − log ε): the reverse KL from the policy's choice to the label's.

    Source: EXO, Ji et al. 2024 (arXiv 2402.00856), eq. 16 for pairs. It is least, 0, at βΔ = log((1−ε)/ε).

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        label_smoothing: ε in (0, ½); the paper's 1e-3.
    """
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    win, lose = logsigmoid(chosen - rejected), logsigmoid(rejected - chosen)
    loss = win.exp() * (win - math.log1p(-label_smoothing)) + lose.exp() * (lose - math.log(label_smoothing))
    return PairLoss(loss, chosen, rejected)


def compute_discopop_loss(
    pairs: Pairs,
    *,
    beta: float | Tensor,
    discopop_tau: float = 0.05,
    f_divergence_type: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
) -> PairLoss:
    """(1 − σ(x/τ)) · (−log σ(x)) + σ(x/τ) · e^−x with x = βΔ: the blend that DiscoPOP found.

    Source: Lu et al. 2024 (arXiv 2406.08414), eq. 5, there with β = τ = 0.05. It is not convex: between its two minima
    it rises, and at x = 0, where training begins, its slope is positive, so that a small step lowers the margin.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, 1/nats.
        discopop_tau: τ in (0, 1), the width of the blend.
    """
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    chosen, rejected = beta * a, beta * z
    x = chosen - rejected
    # σ(x/τ) e^−x as one exponential: for large negative x the product is 0 · ∞.
    exponential = (logsigmoid(x / discopop_tau) - x).exp()
    logistic = -logsigmoid(x) * logsigmoid(-x / discopop_tau).exp()
    return PairLoss(logistic + exponential, chosen, rejected)


def _compute_mean_scores(pairs: Pairs, f_divergence_type: str, f_alpha_divergence_coef: float) -> tuple[Tensor, Tensor]:
    """(f(a)/n_c, f(z)/n_r); 0 for a completion without scored tokens."""
    a, z = compute_divergence_scores(pairs, f_divergence_type, f_alpha_divergence_coef)
    return a / pairs.chosen_tokens.clamp(min=1), z / pairs.rejected_tokens.clamp(min=1)

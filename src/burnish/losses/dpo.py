"""Losses on preference pairs against a reference: the loss types of `kind: dpo`.

A loss type is a function `f(pairs, *, beta, …) -> PairLoss`. Its keyword-only parameters are the settings that it
reads; one that it does not name cannot be set beside it. Your own function with this signature is
`loss_type: module:function`.

Notation: a, z = Σ_t (log π − log π_ref) of the chosen and the rejected completion (`pairs.chosen_ratio`,
`pairs.rejected_ratio`); n_c, n_r their scored tokens; Δ = a − z; σ the logistic function. All tensors are (G,), one
number a pair.
"""

from __future__ import annotations

import torch
from torch.nn.functional import logsigmoid, relu

from burnish.losses.pairs import PairLoss, Pairs


def compute_sigmoid_loss(pairs: Pairs, *, beta: float, label_smoothing: float = 0.0) -> PairLoss:
    """−(1−ε) log σ(βΔ) − ε log σ(−βΔ): DPO, and with ε > 0 conservative DPO (cDPO).

    Source: DPO, Rafailov et al. 2023 (arXiv 2305.18290), eq. 7; cDPO: Mitchell 2023, "A note on DPO with noisy
    preferences & relationship to IPO", eq. 3. TRL's `sigmoid` ignores label_smoothing; this one does not.

    Args:
        pairs: (G,) tensors.
        beta: β > 0, strength of the pull towards the reference, 1/nats.
        label_smoothing: ε in [0, ½), the share of labels believed to be flipped.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    margin = chosen - rejected
    loss = -logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * logsigmoid(-margin)
    return PairLoss(loss, chosen, rejected)


def compute_hinge_loss(pairs: Pairs, *, beta: float) -> PairLoss:
    """max(0, 1 − βΔ): the hinge of SLiC with the reference-corrected margin.

    Source: SLiC-HF, Zhao et al. 2023 (arXiv 2305.10425), with DPO's margin as in RSO, Liu et al. 2023 (arXiv
    2309.06657). Differs from SLiC: the margin is measured against the reference, and there is no regression term.

    Args:
        pairs: (G,) tensors.
        beta: β > 0; 1/β nats is the distance at which a pair is taken as learnt.
    """
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(relu(1 - (chosen - rejected)), chosen, rejected)


def compute_ipo_loss(pairs: Pairs, *, beta: float) -> PairLoss:
    """(a/n_c − z/n_r − 1/(2β))²: IPO on length-averaged log-ratios.

    Source: IPO, Azar et al. 2023 (arXiv 2310.12036), eq. 17. Differs from the paper: the log-ratios are means over
    tokens, not sums, as its authors advised for language models (and as TRL computes); so β is on another scale than
    in `sigmoid`.

    Args:
        pairs: (G,) tensors.
        beta: τ of the paper; the margin is pulled to 1/(2β) nats a token, from both sides.
    """
    chosen = pairs.chosen_ratio / torch.clamp(pairs.chosen_tokens, min=1)
    rejected = pairs.rejected_ratio / torch.clamp(pairs.rejected_tokens, min=1)
    return PairLoss((chosen - rejected - 1 / (2 * beta)) ** 2, chosen, rejected)

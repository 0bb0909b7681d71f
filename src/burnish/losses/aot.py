"""Alignment via optimal transport: the chosen side's distribution should dominate the rejected one's.

Both losses sort over the optimizer step, so that number g of their result belongs to the g-th smallest values and to no
single pair: they see the whole step at once, whatever the micro-batches, and know no weight or β of single pairs. In
evaluation they sort over all held-out rows.

Source: AOT, Melnyk et al. 2024 (arXiv 2406.05882). Notation as in `burnish.losses.dpo`.
"""

from __future__ import annotations

from torch import Tensor

from burnish.losses.dpo import compute_smoothed_logistic
from burnish.losses.pairs import PairLoss, Pairs


def compute_aot_loss(pairs: Pairs, *, beta: float | Tensor, label_smoothing: float = 0.0) -> PairLoss:
    """ℓ(β(sort(c − r) − sort(c₀ − r₀))): the policy's margins dominate the reference's, ℓ(x) = −(1−ε)log σ(x) − ε log σ(−x).

    c, r and c₀, r₀ are the sums of log-probs of both answers under policy and reference. Source: AOT for paired data,
    Melnyk et al. 2024 (arXiv 2406.05882), section 3. The rewards are those of each pair itself, βa and βz.

    Args:
        pairs: (G,) tensors, those of the whole step.
        beta: β > 0, 1/nats; a number or a () tensor.
        label_smoothing: ε in [0, ½).
    """
    a, z = pairs.chosen_ratio, pairs.rejected_ratio
    gap = (pairs.reference_gap + (a - z)).sort().values - pairs.reference_gap.sort().values
    return PairLoss(compute_smoothed_logistic(beta * gap, label_smoothing), beta * a, beta * z)


def compute_aot_unpaired_loss(pairs: Pairs, *, beta: float | Tensor, label_smoothing: float = 0.0) -> PairLoss:
    """ℓ(β(sort(a) − sort(z))): the chosen answers' log-ratios dominate the rejected ones', across pairs; ℓ as in `aot`.

    Source: AOT for unpaired data, Melnyk et al. 2024 (arXiv 2406.05882), section 3.

    Args:
        pairs: (G,) tensors, those of the whole step.
        beta: β > 0, 1/nats; a number or a () tensor.
        label_smoothing: ε in [0, ½).
    """
    a, z = pairs.chosen_ratio, pairs.rejected_ratio
    gap = a.sort().values - z.sort().values
    return PairLoss(compute_smoothed_logistic(beta * gap, label_smoothing), beta * a, beta * z)

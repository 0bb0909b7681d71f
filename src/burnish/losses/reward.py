"""Losses of a reward model on preference pairs; all tensors are (G,), one number a pair."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid


def compute_bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor | None = None) -> Tensor:
    """−log σ(r_c − r_r − m): the negative log-likelihood of the preference.

    Source: Bradley & Terry 1952; for language models Ouyang et al. 2022 (arXiv 2203.02155), eq. 1; the margin m from
    Llama 2, Touvron et al. 2023 (arXiv 2307.09288), eq. 2.

    Args:
        chosen: (G,) scores of the chosen completions.
        rejected: (G,) scores of the rejected completions.
        margin: (G,) by how much the chosen one should at least be better; None = 0.

    Returns:
        (G,) losses in nats, at least fp32.
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    difference = chosen.to(dtype) - rejected.to(dtype)
    if margin is not None:
        difference = difference - margin.to(dtype)
    return -logsigmoid(difference)


def compute_centering_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """(r_c + r_r)²: keeps scores around 0, which Bradley–Terry leaves free.

    Source: Eisenstein et al. 2023 (arXiv 2312.09244), the regulariser of the pairwise reward model.

    Args:
        chosen: (G,) scores of the chosen completions.
        rejected: (G,) scores of the rejected completions.

    Returns:
        (G,) penalties, at least fp32.
    """
    dtype = torch.promote_types(chosen.dtype, torch.float32)
    return (chosen.to(dtype) + rejected.to(dtype)) ** 2

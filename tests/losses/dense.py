"""Losses over whole distributions, computed the plain way: every logit of every token at once, in fp64.

Nothing here is shared with the package: the model is called on one sequence at a time, without packing, blocks or functionals.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.group import Group

Dense = tuple[Tensor, Tensor, Tensor]  # policy (n, V), reference (n, V), targets (n,)


def compute_dense(policy: Any, reference: Any, group: Group, slot: int) -> Dense:
    """Logits of both models at the scored tokens of a completion, and the tokens."""
    completion = group.completions[slot]
    ids = torch.from_numpy(np.concatenate([group.prompt, completion.ids]).astype(np.int64))
    where = torch.from_numpy(np.flatnonzero(completion.mask)) + len(group.prompt)
    with policy.unpacked() as model:
        own = model(ids[None]).logits[0, where - 1]
    with torch.no_grad(), reference.unpacked() as model:
        other = model(ids[None]).logits[0, where - 1]
    return own, other, ids[where]


def probabilities(logits: Tensor) -> Tensor:
    """Softmax, written out."""
    powers = torch.exp(logits - logits.max(-1, keepdim=True).values)
    return powers / powers.sum(-1, keepdim=True)


def log_sum(logits: Tensor, targets: Tensor) -> Tensor:
    """Σ_t log p(y_t)."""
    return torch.log(probabilities(logits)[torch.arange(len(targets)), targets]).sum()


def sequential_kl(dense: Dense) -> Tensor:
    """Σ_t Σ_v π_ref(v) log(π_ref(v) / π(v))."""
    p, q = probabilities(dense[1]), probabilities(dense[0])
    return (p * torch.log(p / q)).sum()


def risk(dense: Dense, confidence: float) -> Tensor:
    """Σ_t Σ_{v: d_v > quantile} π_ref(v) d_v, the quantile by numpy."""
    p, q = probabilities(dense[1]), probabilities(dense[0])
    gap = torch.log(p / q)
    bound = np.quantile(gap.detach().numpy(), 1 - confidence, axis=-1)
    return (p * gap)[gap.detach() > torch.from_numpy(bound)[:, None]].sum()

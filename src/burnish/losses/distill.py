"""Divergences between a student's and a teacher's distribution over the vocabulary, token by token.

p is the teacher's, q the student's distribution, both with logits divided by the temperature T. Each divergence is scaled by T²,
so that the size of its gradient does not fall with T (Hinton et al. 2015, arXiv 1503.02531, section 2).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from burnish.core.logits import Functional


def build_divergence(loss_type: str, *, jsd_beta: float = 0.5, temperature: float = 1.0) -> Functional:
    """The divergence as a functional: fn(student's logits (B, V), targets, teacher's logits (B, V)) → (B,) nats.

    Args:
        loss_type: "forward_kl": KL(p ‖ q) = Σ p log(p/q), covers all that the teacher does. "reverse_kl": KL(q ‖ p), keeps to
            what the teacher does most. "jsd": β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = β p + (1 − β) q.
        jsd_beta: β in (0, 1) of "jsd"; near 0 it is β · forward KL, near 1 (1 − β) · reverse KL, up to higher orders.
        temperature: T > 0.

    Source: generalised Jensen–Shannon: GKD, Agarwal et al. 2023 (arXiv 2306.13649), eq. 1. Differs from TRL: scaled by T².
    """

    def compute_divergence(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
        assert against is not None
        teacher = torch.log_softmax(against.to(logits.dtype) / temperature, dim=-1).detach()
        student = torch.log_softmax(logits / temperature, dim=-1)
        if loss_type == "forward_kl":
            found = _compute_kl(teacher, student)
        elif loss_type == "reverse_kl":
            found = _compute_kl(student, teacher)
        else:
            mixed = torch.logaddexp(teacher + math.log(jsd_beta), student + math.log1p(-jsd_beta))
            found = jsd_beta * _compute_kl(teacher, mixed) + (1 - jsd_beta) * _compute_kl(student, mixed)
        return found * temperature**2

    return Functional("divergence", compute_divergence, needs_against=True)


def _compute_kl(p: Tensor, q: Tensor) -> Tensor:
    """(B, V) log p, (B, V) log q → (B,) Σ p log(p/q)."""
    return (p.exp() * (p - q)).sum(-1)

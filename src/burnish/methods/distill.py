"""Supervised distillation: the student matches a teacher's distribution on given answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.config.needs import find_needs
from burnish.config.stages import DistillSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.losses.distill import build_divergence
from burnish.losses.sft import compute_nll
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod


class Distill(BaseMethod):
    """α · T² · divergence(teacher, student) + (1 − α) · cross-entropy, over the scored tokens; see `burnish.losses.distill`.

    Unit: token. The teacher runs live, without gradient, and neither model's logits are ever stored.
    Differs from TRL: the answers are those of the data, not sampled; the divergence is scaled by T².
    """

    name = "distill"

    def __init__(self, settings: DistillSettings) -> None:
        self.settings = settings
        self.reference = find_needs(settings).reference
        s = settings
        self.functionals = (build_divergence(s.loss_type, jsd_beta=s.jsd_beta, temperature=s.temperature),)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Scored tokens."""
        tokens = float(sum(c.scored for group in groups for c in group.completions))
        return {"distill": tokens} | ({"ce": tokens} if self.settings.alpha < 1 else {})

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """One term for the divergence, and one for the cross-entropy if it has a weight.

        Args:
            outputs: `logprobs`, (S,), and the functional `divergence`, (S,).
            table: Not read.
            state: Not read.
        """
        if outputs.logprobs is None or "divergence" not in outputs.functionals:
            raise ValueError("distill needs Outputs.logprobs and the functional divergence")
        divergence, nll = outputs.functionals["divergence"], compute_nll(outputs.logprobs)
        n, alpha = float(nll.shape[0]), self.settings.alpha
        terms = [Term("distill", divergence.sum(), n, "token", alpha)]
        if alpha < 1:
            terms.append(Term("ce", nll.sum(), n, "token", 1 - alpha))
        figures = {
            "cross_entropy": nll.detach().sum(),
        }
        return LossResult(tuple(terms), tuple(Metric(name, value, n) for name, value in figures.items()))

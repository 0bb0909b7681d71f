"""Supervised fine-tuning: the mean negative log-likelihood of the scored tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.config.stages import SftSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.losses.sft import compute_nll
from burnish.losses.terms import LossResult, Term
from burnish.methods.base import BaseMethod


class Sft(BaseMethod):
    """Supervised fine-tuning on completions or conversations; the masks of the data decide what is trained.

    Unit: token. The loss is Σ −log π(y_t) / (scored tokens of the whole optimizer step), in nats.
    Differs from TRL: its evaluation loss is a mean of batch means and moves with the batch size; this one does not.
    """

    name = "sft"

    def __init__(self, settings: SftSettings) -> None:
        self.settings = settings

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Scored tokens."""
        return {"sft": float(sum(c.scored for group in groups for c in group.completions))}

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """One term over tokens.

        Args:
            outputs: `logprobs`, (S,).
            table: Not read.
            state: Not read.
        """
        if outputs.logprobs is None:
            raise ValueError("sft needs Outputs.logprobs")
        nll = compute_nll(outputs.logprobs)
        return LossResult((Term("sft", nll.sum(), float(nll.shape[0]), "token"),))

"""Contrastive preference optimisation: losses on pairs without a reference model, and the chosen answer's NLL."""

from __future__ import annotations

from dataclasses import replace

from burnish.losses.mix import LossType, build_loss_type
from burnish.methods.dpo import Dpo


class Cpo(Dpo):
    """DPO with a uniform reference, plus `cpo_alpha` times the chosen answers' mean NLL a token; see `losses/cpo.py`.

    Units: pair, and for the NLL scored token. The NLL is a term of its own, `cpo/nll`, also in the log.
    """

    name = "cpo"

    def build_mix(self) -> tuple[LossType, ...]:
        """The loss types of this stage, and the NLL if it has a weight."""
        weight = self.nll_weight
        if not weight:
            return super().build_mix()
        nll = build_loss_type("dpo", "sft", weight, self.settings)
        return (*super().build_mix(), replace(nll, name="nll"))

    @property
    def nll_weight(self) -> float:
        """Weight of the chosen answers' NLL."""
        return float(getattr(self.settings, "cpo_alpha", 0.0))

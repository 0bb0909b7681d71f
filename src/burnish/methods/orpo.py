"""Odds-ratio preference optimisation: supervised fine-tuning with a log odds ratio, without a reference model."""

from __future__ import annotations

from burnish.methods.cpo import Cpo


class Orpo(Cpo):
    """ORPO: the chosen answers' NLL plus λ times the odds-ratio loss, `losses/orpo.py`.

    Units: scored token for the NLL, pair for the odds ratio. Differs from TRL, where the NLL runs over the prompt too;
    here, as in the paper, over the answer.
    """

    name = "orpo"

    @property
    def nll_weight(self) -> float:
        """The NLL is the loss itself; λ weighs the other term."""
        return 1.0

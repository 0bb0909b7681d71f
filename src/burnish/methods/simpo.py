"""Simple preference optimisation: mean log-probs with a target margin, without a reference model."""

from __future__ import annotations

from burnish.methods.cpo import Cpo


class Simpo(Cpo):
    """SimPO, `losses/cpo.py`; with `cpo_alpha` above 0 also the chosen answers' NLL, as a term of its own (CPO-SimPO).

    Unit: pair. Differs from TRL, where SimPO is a loss type of CPO and keeps CPO's NLL at weight 1 unless told otherwise.
    """

    name = "simpo"

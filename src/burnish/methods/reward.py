"""A reward model from preference pairs: Bradley–Terry on one score a completion."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from burnish.config.stages import RewardSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.losses.pairs import compute_wins
from burnish.losses.reward import compute_bradley_terry_loss, compute_centering_loss
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod
from burnish.methods.pairwise import count_pairs


class Reward(BaseMethod):
    """A scalar score of a completion, trained so that the chosen one scores higher.

    Unit: pair. Reads the group column `margin` where the data have it. The centring term, when its coefficient is not
    0, is a term of its own with the same count. Accuracy compares the scores alone, without the margin of the data; a
    pair of equal scores counts one half, and `ties` tells how many there were.
    """

    name = "reward"
    want: Mapping[str, frozenset[str]] = {"policy": frozenset({"scores"})}

    def __init__(self, settings: RewardSettings) -> None:
        self.settings = settings

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Pairs; the centring term runs over the same ones."""
        pairs = count_pairs(groups)
        return {"reward": pairs} | ({"centering": pairs} if self.settings.center_rewards_coefficient else {})

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """The Bradley–Terry term and, if wanted, the centring term.

        Args:
            outputs: `scores`, (C,).
            table: `group_columns["margin"]`, (G,), is read if it is there.
            state: Not read.
        """
        if outputs.scores is None:
            raise ValueError("reward needs Outputs.scores")
        chosen, rejected = table.slot(outputs.scores, 0), table.slot(outputs.scores, 1)
        n = float(chosen.shape[0])
        loss = compute_bradley_terry_loss(chosen, rejected, table.group_columns.get("margin"))
        terms = [Term("reward", loss.sum(), n, "pair")]
        coefficient = self.settings.center_rewards_coefficient
        if coefficient:
            penalty = compute_centering_loss(chosen, rejected)
            terms.append(Term("centering", penalty.sum(), n, "pair", coefficient))
        chosen, rejected = chosen.detach().to(loss.dtype), rejected.detach().to(loss.dtype)
        wins, ties = compute_wins(chosen - rejected)
        figures = {
            "accuracy": wins,
            "ties": ties,
            "scores/chosen": chosen.sum(),
            "scores/rejected": rejected.sum(),
            "margin": (chosen - rejected).sum(),
        }
        return LossResult(tuple(terms), tuple(Metric(name, value, n) for name, value in figures.items()))

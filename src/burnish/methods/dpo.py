"""Direct preference optimisation and the other losses on pairs against a reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from burnish.config.stages import DpoSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.losses.mix import build_mix
from burnish.losses.pairs import PairLoss, Pairs, compute_pairs, compute_wins
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.pairwise import count_pairs
from burnish.methods.stateless import Stateless


class Dpo(Stateless):
    """Preference optimisation against a reference, by `loss_type`; see `burnish.losses.dpo` for the formulas.

    Unit: pair. Each loss type of a mix is a term of its own, with its weight. Rewards and margins in the metrics are
    those that the loss itself compares (IPO: per-token means), not always β times the log-ratio as in TRL; a tie, which
    is a margin of exactly 0, counts one half in the accuracy and is logged apart.
    """

    name = "dpo"
    head = "lm"
    want = frozenset({"logprobs"})
    needs_reference = True

    def __init__(self, settings: DpoSettings) -> None:
        self.settings = settings
        self.mix = build_mix(settings.loss_type, settings.loss_weights, settings)
        self._single = len(self.mix) == 1

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Pairs, for each loss type of the mix."""
        pairs = count_pairs(groups)
        return {self._term_name(t.name): pairs for t in self.mix}

    def compute_loss(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> LossResult:
        """One term for each loss type.

        Args:
            outputs: `logprobs`, (S,).
            table: `token_columns["ref_logprobs"]`, (S,).
            state: Not read.
        """
        if outputs.logprobs is None:
            raise ValueError("dpo needs Outputs.logprobs")
        pairs = compute_pairs(outputs.logprobs, _get_reference(outputs.logprobs, table), table)
        n = float(pairs.chosen.shape[0])
        terms: list[Term] = []
        metrics: list[Metric] = []
        for number, loss_type in enumerate(self.mix):
            result = loss_type.compute(pairs)
            terms.append(Term(self._term_name(loss_type.name), result.loss.sum(), n, "pair", loss_type.weight))
            metrics += _measure_rewards(result, n, suffix="" if number == 0 else f"/{loss_type.name}")
        return LossResult(tuple(terms), (*metrics, *_measure_logprobs(pairs, n)))

    def _term_name(self, loss_type: str) -> str:
        return "dpo" if self._single else f"dpo/{loss_type}"


def _get_reference(logprobs: Tensor, table: Table) -> Tensor:
    """(S,) reference log-probs; a table without any row has no columns."""
    found = table.token_columns.get("ref_logprobs")
    if found is not None:
        return found
    if logprobs.shape[0]:
        raise ValueError("dpo needs the token column ref_logprobs")
    return logprobs.detach()


def _measure_rewards(result: PairLoss, n: float, suffix: str) -> list[Metric]:
    chosen, rejected, margin = (x.detach() for x in (result.chosen_reward, result.rejected_reward, result.margin))
    wins, ties = compute_wins(margin)
    figures = {
        "rewards/chosen": chosen.sum(),
        "rewards/rejected": rejected.sum(),
        "rewards/margins": margin.sum(),
        "rewards/accuracies": wins,
        "rewards/ties": ties,
    }
    return [Metric(name + suffix, value, n) for name, value in figures.items()]


def _measure_logprobs(pairs: Pairs, n: float) -> list[Metric]:
    figures = {"logps/chosen": pairs.chosen.detach().sum(), "logps/rejected": pairs.rejected.detach().sum()}
    return [Metric(name, value, n) for name, value in figures.items()]

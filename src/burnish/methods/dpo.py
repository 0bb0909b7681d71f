"""Direct preference optimisation and the other losses on pairs; those without a reference derive from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from burnish.config.needs import find_needs
from burnish.config.stages import CpoSettings, DpoSettings, OrpoSettings, SimpoSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.engine.observe import Observed, StepRecord
from burnish.losses.mix import LossType, build_mix, collect_functionals
from burnish.losses.pairs import PairLoss, Pairs, compute_pairs, compute_wins
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod
from burnish.methods.dynamic_beta import BetaControl
from burnish.methods.margins import describe_margins, observe_pairs
from burnish.methods.pair_weights import PairWeights
from burnish.methods.pairwise import count_pairs

PairSettings = DpoSettings | CpoSettings | SimpoSettings | OrpoSettings


class Dpo(BaseMethod):
    """Preference optimisation against a reference, by `loss_type`; the table in docs/methods/dpo.md has the formulas.

    Unit: pair (loss type `sft`: scored tokens of the chosen answers). Each loss type of a mix is a term of its own, with
    its weight. Rewards and margins in the metrics are those that the loss itself compares (IPO: per-token means), not
    always β times the log-ratio as in TRL; a tie, which is a margin of exactly 0, counts one half in the accuracy and is
    logged apart. A mix with a loss that needs the whole step (AOT, BCO) is coupled as a whole.
    """

    name = "dpo"

    def __init__(self, settings: PairSettings) -> None:
        self.settings = settings
        self.mix = self.build_mix()
        self.ld_alpha: float | None = getattr(settings, "ld_alpha", None)
        self.weights = PairWeights(settings)
        self._read = collect_functionals(self.mix, settings)
        self.functionals = (*self._read, *self.weights.functionals)
        needs = find_needs(settings)
        self.coupled = needs.coupled
        live = any(f.needs_against for f in self._read)  # ε-DPO with ε = 0 reads no distribution
        self.reference = needs.reference if live else needs.reference - {"logits"}
        self._single = len(self.mix) == 1
        self.control = BetaControl(settings.dynamic_beta, settings.beta, settings.seed)
        self.control.check_losses(self.mix)
        self.running = tuple(t for t in self.mix if t.entry.state)
        self.state = PairState(self) if self.control.stateful or self.running else None
        self.observer = PairObserver(self)

    def build_mix(self) -> tuple[LossType, ...]:
        """The loss types of this stage."""
        loss_type = getattr(self.settings, "loss_type", self.name)
        return build_mix(self.settings.kind, loss_type, getattr(self.settings, "loss_weights", None), self.settings)

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Pairs, for each loss type of the mix; scored tokens of the chosen completions where that is its unit."""
        units = {"pair": count_pairs(groups), "token": float(sum(g.completions[0].scored for g in groups))}
        return {self._term_name(t.name): units[t.entry.unit] for t in self.mix}

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """One term for each loss type.

        Args:
            outputs: `logprobs`, (S,); with `use_weighting` also the functional `log_square_sum`, (S,), and those of the loss
                types.
            table: `token_columns["ref_logprobs"]`, (S,), if the method has a reference; with `reward_model` also
                `group_columns["reward_margin"]`, (G,).
            state: As `PairState` gives it.
            evaluating: β and running states are read as they are.
        """
        pairs = self.compute_pairs(outputs, table)
        weights, measured = self.weights.compute(outputs, table)
        betas = self.control.find(pairs.margin, table.group_ids, state, evaluating=evaluating)
        n, tokens = float(pairs.chosen.shape[0]), float(table.slot_scored.get(0, 0))
        terms: list[Term] = []
        metrics: list[Metric] = []
        for loss_type in self.mix:
            running = state["losses"][loss_type.name] if loss_type.entry.state else None
            result = loss_type.compute(pairs, running, evaluating=evaluating, **betas.changed)
            name, by_pair = self._term_name(loss_type.name), loss_type.entry.unit == "pair"
            loss = result.loss if weights is None or not by_pair else result.loss * weights
            count = n if by_pair else tokens
            if betas.kept is not None:
                loss = betas.take(loss)
                count = float(loss.shape[0]) if by_pair else float(betas.take(pairs.chosen_tokens).sum())
            terms.append(Term(name, loss.sum(), count, loss_type.entry.unit, loss_type.weight))
            if by_pair:
                metrics += _measure_rewards(result, n, suffix=f"/{loss_type.name}" if metrics else "")
        return LossResult(tuple(terms), (*metrics, *measured, *_measure_logprobs(pairs, n)))

    def compute_pairs(self, outputs: Outputs, table: Table) -> Pairs:
        """The pairs' log-probs, log-ratios and what else the loss types read, (G,) each."""
        if outputs.logprobs is None:
            raise ValueError(f"{self.name} needs Outputs.logprobs")
        reference = _get_reference(outputs.logprobs, table) if "logprobs" in self.reference else None
        read = {f.name: outputs.functionals[f.name] for f in self._read}
        return compute_pairs(outputs.logprobs, reference, table, ld_alpha=self.ld_alpha, functionals=read)

    def _term_name(self, loss_type: str) -> str:
        return self.name if self._single else f"{self.name}/{loss_type}"


class PairState:
    """What moves with each step: the controller of β, and the running states of loss types, by name."""

    def __init__(self, method: Dpo) -> None:
        self.method = method

    def initial(self) -> dict[str, Any]:
        """The controller's part, if β moves, and the running states of loss types that have one."""
        running = self.method.running
        losses = {"losses": {t.name: t.initial_state() for t in running}} if running else {}
        return losses | self.method.control.initial_state()

    def advance(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
        """The same after a step with these rows."""
        method = self.method
        pairs = method.compute_pairs(outputs, table)
        after = method.control.next_state(pairs.margin, table.group_ids, state)
        if method.running:
            changed = method.control.find(pairs.margin, table.group_ids, state).changed
            states = state["losses"]
            after["losses"] = {t.name: t.next_state(pairs, states[t.name], **changed) for t in method.running}
        return after


class PairObserver:
    """The record of each step's margins."""

    def __init__(self, method: Dpo) -> None:
        self.method = method
        self.records = method.settings.margin_records is not None

    def observe(self, outputs: Outputs, table: Table) -> dict[str, Tensor]:
        """(G,) margin, and log-prob, log-ratio and scored tokens of both completions."""
        return observe_pairs(self.method.compute_pairs(outputs, table))

    def describe(self, step: Observed, state: Mapping[str, Any]) -> StepRecord:
        """The step's margins, and where β is."""
        return describe_margins(step, self.method.control.describe(state), self.method.settings.margin_records)


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
    figures |= {name: values.detach().sum() for name, values in result.figures.items()}
    return [Metric(name + suffix, value, n) for name, value in figures.items()]


def _measure_logprobs(pairs: Pairs, n: float) -> list[Metric]:
    figures = {"logps/chosen": pairs.chosen.detach().sum(), "logps/rejected": pairs.rejected.detach().sum()}
    return [Metric(name, value, n) for name, value in figures.items()]

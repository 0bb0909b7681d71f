"""Kahneman–Tversky optimisation: rows that are good or bad, without pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.config.needs import find_needs
from burnish.config.stages import KtoSettings
from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.losses.kto import compute_apo_zero_unpaired_loss, compute_kl_baseline, compute_kto_loss
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod
from burnish.methods.partners import NextPrompts

BALANCE = (1.0, 4 / 3)  # λ_D n_D / (λ_U n_U) that the paper advises, section 4.2


class Kto(BaseMethod):
    """Preference optimisation from rows with a label; see `burnish.losses.kto` for the formulas.

    Unit: sequence. The *partner* of a row is the answer of the next row, in the epoch's order, that has another prompt; from
    the partners' log-probs the KL baseline of the step is estimated. A partner is slot 1 of its group and carries no gradient;
    the baseline couples the rows of a step, over all processes.
    Differs from TRL: the partner is never an answer to the same prompt, nor a row's own; the baseline is that of the optimizer
    step, not of a micro-batch; a non-finite row stops the step instead of being left out.
    """

    name = "kto"

    def __init__(self, settings: KtoSettings) -> None:
        self.settings = settings
        self.has_baseline = settings.loss_type == "kto"
        needs = find_needs(settings)
        self.reference, self.coupled = needs.reference, needs.coupled
        self.partners = NextPrompts() if self.has_baseline else None

    def examine(self, groups: Sequence[Group]) -> list[str]:
        """A warning where the weighted numbers of good and bad rows stand in no ratio that the paper advises."""
        good = sum(group.columns["label"] > 0.5 for group in groups)
        bad = len(groups) - good
        if not good or not bad:
            side = "desirable" if good else "undesirable"
            return [
                f"all {len(groups):,} rows are {side}: the model learns only what to do {'more' if good else 'less'}"
            ]
        left, right = self.settings.desirable_weight * good, self.settings.undesirable_weight * bad
        ratio = left / right if right else math.inf
        if BALANCE[0] * (1 - 1e-9) <= ratio <= BALANCE[1] * (1 + 1e-9):
            return []
        low, high = (share * right / good for share in BALANCE)
        return [
            f"{good:,} desirable and {bad:,} undesirable rows, weighted {left:,.0f} : {right:,.0f} = {ratio:.3g}; KTO's authors "
            f"advise 1 to 4/3: set desirable_weight between {low:.3g} and {high:.3g}"
        ]

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Rows."""
        for group in groups:
            if "label" not in group.columns:
                raise ValueError(f"{group.id}: a row needs a label")
        return {"kto": float(len(groups))}

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """One term over rows.

        Args:
            outputs: `logprobs`, (S,).
            table: `token_columns["ref_logprobs"]`, (S,), and `group_columns["label"]`, (G,).
            state: Not read.
        """
        if outputs.logprobs is None:
            raise ValueError("kto needs Outputs.logprobs")
        logprobs = outputs.logprobs.to(torch.promote_types(outputs.logprobs.dtype, torch.float32))
        sums = table.slot(table.sum_tokens(logprobs), 0)
        ratios = table.sum_tokens(logprobs - _get_column(table, "ref_logprobs", logprobs).detach())
        ratio = table.slot(ratios, 0)
        label = table.group_columns["label"] if len(table.group_ids) else ratio.detach()
        s, n = self.settings, float(ratio.shape[0])
        weights = {"desirable_weight": s.desirable_weight, "undesirable_weight": s.undesirable_weight}
        metrics: list[Metric] = []
        if self.has_baseline:
            baseline = compute_kl_baseline(table.slot(ratios, 1))
            loss = compute_kto_loss(ratio, label, baseline, beta=s.beta, **weights)
            metrics.append(Metric("kl", baseline * n, n))
        else:
            loss = compute_apo_zero_unpaired_loss(ratio, label, beta=s.beta, **weights)
        metrics += _measure(s.beta * ratio.detach(), sums.detach(), label)
        return LossResult((Term("kto", loss.sum(), n, "sequence"),), tuple(metrics))


def _get_column(table: Table, name: str, like: Tensor) -> Tensor:
    """(S,) a token column; a table without any row has none."""
    found = table.token_columns.get(name)
    if found is None and like.shape[0]:
        raise ValueError(f"kto needs the token column {name}")
    return like if found is None else found.to(like.dtype)


def _measure(rewards: Tensor, sums: Tensor, label: Tensor) -> list[Metric]:
    """Means over the desirable ("chosen") and over the undesirable ("rejected") rows of a step."""
    good = (label > 0.5).to(rewards.dtype)
    bad = 1 - good
    figures = {
        "rewards/chosen": (rewards * good, good),
        "rewards/rejected": (rewards * bad, bad),
        "logps/chosen": (sums * good, good),
        "logps/rejected": (sums * bad, bad),
    }
    return [Metric(name, values.sum(), rows.sum()) for name, (values, rows) in figures.items()]

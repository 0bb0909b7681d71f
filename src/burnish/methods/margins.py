"""The record of a step of preference pairs: its margins, what β was, and what became of both answers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from burnish.config.dynamic_beta import MarginRecordSettings
from burnish.engine.observe import Observed, StepRecord
from burnish.losses.pairs import Pairs
from burnish.track.margins import QUIET_STEPS, are_too_many_zeros, find_zero_share, summarise_margins

_MEANS = {
    "chosen": "chosen_logps",
    "rejected": "rejected_logps",
    "chosen_ratio": "chosen_ratio",
    "rejected_ratio": "rejected_ratio",
    "chosen_tokens": "chosen_tokens",
    "rejected_tokens": "rejected_tokens",
}


def observe_pairs(pairs: Pairs) -> dict[str, Tensor]:
    """(G,) each: the margin M, and of both completions log-prob, log-ratio (nats) and scored tokens."""
    return {"margin": pairs.margin, **{name: getattr(pairs, name) for name in _MEANS}}


def describe_margins(
    step: Observed, of_beta: tuple[dict[str, float], dict[str, Any]], records: MarginRecordSettings | None
) -> StepRecord:
    """Figures, row and warnings of a step.

    Args:
        step: With the values of `observe_pairs`.
        of_beta: Figures and fields of the controller of β; no figures when β is constant.
        records: None: no row.
    """
    margins = step.values["margin"]
    share = find_zero_share(margins)
    figures, fields = of_beta
    if figures:
        figures = {**figures, "dpo/margin_mean": float(margins.mean()), "dpo/loss": step.figures["loss"]}
    warnings: dict[str, str] = {}
    if are_too_many_zeros(step.step, share):
        warnings["zero margins"] = (
            f"{100 * share:.0f} % of the margins are 0, though the policy has been trained: it does not differ from the "
            "reference on these pairs. Look at the learning rate, at what is trainable, at the masks of the answers "
            "(`burnish data show`), and whether the reference is another object than the policy"
        )
    if fields.get("held") and not (share == 1 and step.step <= QUIET_STEPS):  # policy and reference begin as the same
        warnings["held beta"] = (
            "the margins of a unit are all equal: they tell the controller of beta nothing, and it holds. Do the pairs "
            "differ, and is the reference another object than the policy?"
        )
    row = None
    if records is not None:
        means = {name: float(step.values[key].mean()) for key, name in _MEANS.items()}
        row = {**summarise_margins(margins, sample=records.sample), **means, **fields}
    vectors = {"margin": margins} if records is not None and records.vectors else {}
    return StepRecord({"margins/zero_share": share, **figures}, row, vectors, warnings)

"""What the losses on preference pairs read and return.

Letters of shapes: S scored tokens, C completions, G groups (pairs).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from burnish.core.batch import Table


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some preference pairs. All fields are (G,) and at least fp32; the log-probs carry the policy's gradient.

    Without a reference model log π_ref is 0: the ratios are the sums themselves.

    Attributes:
        chosen: Σ log π(y_t) over the scored tokens of the chosen completion, nats.
        rejected: The same of the rejected completion.
        chosen_ratio: Σ w_t (log π(y_t) − log π_ref(y_t)) of the chosen completion, nats; w_t is 1, or `ld_alpha` beyond
            the shorter answer's length. Summed from per-token differences: two long sums that nearly cancel would lose
            the digits that matter.
        rejected_ratio: The same of the rejected completion.
        chosen_tokens: Scored tokens of the chosen completion (end of sequence included, prompt excluded).
        rejected_tokens: The same of the rejected completion.
        sums: name → (chosen, rejected), Σ over the scored tokens of a functional that the loss type asks for.
        reference_gap: Σ w_t log π_ref of the chosen completion minus that of the rejected one; no gradient.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    reference_gap: Tensor
    sums: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def margin(self) -> Tensor:
        """(G,) M = Δ: chosen_ratio − rejected_ratio, without β, nats."""
        return self.chosen_ratio - self.rejected_ratio


@dataclass(frozen=True, slots=True)
class PairLoss:
    """What a loss on pairs returns; all fields are (G,).

    Attributes:
        loss: Loss of each pair, with gradient. The engine sums it and divides once, by the pairs (or, where the registry
            says so, by the chosen completions' scored tokens) of the whole step.
        chosen_reward: The implicit reward of the chosen completion on the scale on which *this* loss compares.
        rejected_reward: The same of the rejected completion.
        figures: name → (G,) what else is worth logging, as a mean over pairs.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor
    figures: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def margin(self) -> Tensor:
        """(G,) chosen_reward − rejected_reward: the number that the loss is a function of."""
        return self.chosen_reward - self.rejected_reward


def compute_pairs(
    logprobs: Tensor,
    ref_logprobs: Tensor | None,
    table: Table,
    *,
    ld_alpha: float | None = None,
    functionals: Mapping[str, Tensor] = {},
) -> Pairs:
    """Sums over the tokens of each completion, chosen and rejected side by side.

    Args:
        logprobs: (S,) log-probs of the scored tokens under the policy, nats.
        ref_logprobs: (S,) the same under the reference; no gradient flows there. None = no reference model.
        table: Its groups must have exactly two completions each: slot 0 chosen, slot 1 rejected.
        functionals: name → (S,) numbers a token, to be summed as they are.
        ld_alpha: Weight of the tokens beyond the length of the pair's shorter completion, in policy and reference alike;
            None = 1. Source: LD-DPO, Liu et al. 2024 (arXiv 2409.06411). Lengths count all tokens of a completion.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    reference = torch.zeros_like(logprobs) if ref_logprobs is None else ref_logprobs.detach().to(dtype)
    ratio = logprobs - reference
    if ld_alpha is not None and ld_alpha != 1:
        beyond = _is_beyond_the_shorter(table)
        ratio, reference = (torch.where(beyond, ld_alpha * x, x) for x in (ratio, reference))
    tokens = table.completion_scored.to(dtype)
    chosen, rejected = _split(table, table.sum_tokens(logprobs))
    chosen_ratio, rejected_ratio = _split(table, table.sum_tokens(ratio))
    chosen_reference, rejected_reference = _split(table, table.sum_tokens(reference))
    gap = chosen_reference - rejected_reference
    sums = {name: _split(table, table.sum_tokens(values.to(dtype))) for name, values in functionals.items()}
    return Pairs(chosen, rejected, chosen_ratio, rejected_ratio, *_split(table, tokens), gap, sums)


def _split(table: Table, values: Tensor) -> tuple[Tensor, Tensor]:
    """(C,) → (G,) of the chosen and (G,) of the rejected completions."""
    return table.slot(values, 0), table.slot(values, 1)


def _is_beyond_the_shorter(table: Table) -> Tensor:
    """(S,) bool: the token lies beyond the length of its pair's shorter completion."""
    shorter = torch.minimum(table.slot(table.completion_tokens, 0), table.slot(table.completion_tokens, 1))
    limit = shorter.index_select(0, table.completion_group.index_select(0, table.token_completion))
    return table.token_position >= limit


def compute_wins(margin: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) margins → ((), ()): Σ wins, where a tie (a margin of exactly 0) counts one half, and the number of ties."""
    ties = (margin == 0).to(margin.dtype)
    # Not `(margin > 0)`: a NaN margin must stay NaN instead of being counted as a loss.
    wins = torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype)) + ties / 2
    return wins.sum(), ties.sum()

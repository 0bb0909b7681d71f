"""What the losses on preference pairs read and return.

Letters of shapes: S scored tokens, C completions, G groups (pairs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from burnish.core.batch import Table


@dataclass(frozen=True, slots=True)
class Pairs:
    """Some preference pairs. All fields are (G,) and at least fp32; the log-probs carry the policy's gradient.

    Attributes:
        chosen: Σ log π(y_t) over the scored tokens of the chosen completion, nats.
        rejected: The same of the rejected completion.
        chosen_ratio: Σ (log π(y_t) − log π_ref(y_t)) of the chosen completion, nats. Summed from per-token differences:
            two long sums that nearly cancel would lose the digits that matter.
        rejected_ratio: The same of the rejected completion.
        chosen_tokens: Scored tokens of the chosen completion (end of sequence included, prompt excluded).
        rejected_tokens: The same of the rejected completion.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_ratio: Tensor
    rejected_ratio: Tensor
    chosen_tokens: Tensor
    rejected_tokens: Tensor


@dataclass(frozen=True, slots=True)
class PairLoss:
    """What a loss on pairs returns; all fields are (G,).

    Attributes:
        loss: Loss of each pair, with gradient. The engine sums it and divides once, by the pairs of the whole step.
        chosen_reward: The implicit reward of the chosen completion on the scale on which *this* loss compares.
        rejected_reward: The same of the rejected completion.
    """

    loss: Tensor
    chosen_reward: Tensor
    rejected_reward: Tensor

    @property
    def margin(self) -> Tensor:
        """(G,) chosen_reward − rejected_reward: the number that the loss is a function of."""
        return self.chosen_reward - self.rejected_reward


def compute_pairs(logprobs: Tensor, ref_logprobs: Tensor, table: Table) -> Pairs:
    """Sums over the tokens of each completion, chosen and rejected side by side.

    Args:
        logprobs: (S,) log-probs of the scored tokens under the policy, nats.
        ref_logprobs: (S,) the same under the reference; no gradient flows there.
        table: Its groups must have exactly two completions each: slot 0 chosen, slot 1 rejected.
    """
    dtype = torch.promote_types(logprobs.dtype, torch.float32)
    logprobs = logprobs.to(dtype)
    summed = table.sum_tokens(logprobs)
    ratio = table.sum_tokens(logprobs - ref_logprobs.detach().to(dtype))
    tokens = table.completion_scored.to(dtype)
    return Pairs(
        *(table.slot(values, slot) for values in (summed, ratio, tokens) for slot in (0, 1)),
    )


def compute_wins(margin: Tensor) -> tuple[Tensor, Tensor]:
    """(G,) margins → ((), ()): Σ wins, where a tie (a margin of exactly 0) counts one half, and the number of ties."""
    ties = (margin == 0).to(margin.dtype)
    # Not `(margin > 0)`: a NaN margin must stay NaN instead of being counted as a loss.
    wins = torch.where(margin.isnan(), margin, (margin > 0).to(margin.dtype)) + ties / 2
    return wins.sum(), ties.sum()

"""What multiplies each pair's loss: how likely the policy is to write it, what a reward model says of it, or both."""

from __future__ import annotations

from functools import partial, reduce
from typing import Any

import torch
from torch import Tensor

from burnish.core.batch import Outputs, Table
from burnish.core.logits import LOG_SQUARE_SUM, Functional
from burnish.losses.madpo import COLUMN, compute_margin_weights
from burnish.losses.terms import Metric
from burnish.losses.wpo import compute_pair_weights


class PairWeights:
    """Weights of pairs by a stage's settings; without `use_weighting` and `reward_model` there are none.

    Attributes:
        functionals: What they read of the distribution over the vocabulary.
    """

    functionals: tuple[Functional, ...]

    def __init__(self, settings: Any) -> None:
        self._by_policy = bool(getattr(settings, "use_weighting", False))
        self._by_margin = None
        if getattr(settings, "reward_model", None) is not None:
            c_max, c_min = settings.madpo_c_max, settings.madpo_c_min
            self._by_margin = partial(
                compute_margin_weights,
                c_max=c_max,
                c_min=1 / c_max if c_min is None else c_min,
                steepness=settings.madpo_lambda,
                tau=settings.madpo_tau,
            )
        self.functionals = (LOG_SQUARE_SUM,) if self._by_policy else ()

    def compute(self, outputs: Outputs, table: Table) -> tuple[Tensor | None, list[Metric]]:
        """(G,) the product of all weights, without gradient, or None where there are none; and what to log of them.

        Raises:
            ValueError: The pairs carry no margins of a reward model.
        """
        assert outputs.logprobs is not None
        dtype = torch.promote_types(outputs.logprobs.dtype, torch.float32)
        n = float(len(table.group_ids))
        found: list[Tensor] = []
        metrics: list[Metric] = []
        if self._by_policy:
            found.append(compute_pair_weights(outputs.logprobs, outputs.functionals[LOG_SQUARE_SUM.name], table))
            metrics.append(Metric("wpo_weights", found[-1].sum(), n))
        if self._by_margin is not None:
            margin = _get_margins(outputs.logprobs, table).to(dtype)
            found.append(self._by_margin(margin))
            metrics += [Metric("madpo_weights", found[-1].sum(), n), Metric("madpo_margins", margin.sum(), n)]
        return reduce(torch.mul, found) if found else None, metrics


def _get_margins(logprobs: Tensor, table: Table) -> Tensor:
    """(G,) margins of the reward model; a table without any row has no columns."""
    if not table.group_ids:
        return logprobs.detach().new_zeros(0)
    if COLUMN not in table.group_columns:
        raise ValueError(f"reward_model needs the group column {COLUMN}")
    return table.group_columns[COLUMN]

"""Scores of given answers by a reward model, computed once and kept on disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from burnish.core.batch import build_packed_batch
from burnish.core.group import Group
from burnish.faults import fault_point
from burnish.models.policy import Policy
from burnish.models.stored import Row, StoredNumbers, plan_batches
from burnish.track.whereabouts import enter_phase

WANT = frozenset({"scores"})
ScoreTable = list[Row]  # one array a group: (K,) float32, the score of each completion


@torch.no_grad()
def compute_score_table(
    policy: Policy,
    groups: Sequence[Group],
    *,
    budget: int = 8192,
    on_batch: Callable[[int, int], None] = lambda done, total: None,
    forwards: int = 0,
) -> ScoreTable:
    """The score of every completion.

    Args:
        policy: A frozen reward model, in evaluation mode.
        budget: Tokens in one forward at most (a longer group is alone).
        on_batch: Called after each forward with (groups done, all groups).
        forwards: Forwards at least, the further ones of nothing: a sharded model needs equally many on all ranks.
    """
    found: dict[int, Row] = {}
    for positions in plan_batches(groups, budget, forwards):
        batch = build_packed_batch([groups[i] for i in positions]).to(policy.device)
        enter_phase("scores", batch.input_ids.numel(), batch.last_index.numel())
        fault_point("scores.forward")
        scores = policy(batch, WANT).scores
        assert scores is not None
        values, cursor = scores.float().cpu().numpy(), 0
        for i in positions:
            found[i] = values[cursor : (cursor := cursor + len(groups[i].completions))]
        on_batch(len(found), len(groups))
    return [found[i] for i in range(len(groups))]


class ScoreCache(StoredNumbers):
    """Scores on disk: the numbers of each group are those of its completions."""

    kind, file, what = "scores", "scores.npy", "scores of the reward model"

    def load(self, groups: Sequence[Group]) -> ScoreTable | None:
        """The scores of exactly these groups; None if there are none or they are damaged (said aloud)."""
        return self.load_rows([len(group.completions) for group in groups])

    def save(self, groups: Sequence[Group], table: ScoreTable) -> None:
        """Write the scores, replacing what is there."""
        self.save_rows(table)

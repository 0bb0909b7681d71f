"""Partners: the answer of another row, laid under a row's own prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from burnish.core.group import Completion, Group
from burnish.errors import DataError

PARTNER = "partner"  # completion column: 1 = lent by another row, 0 = the row's own


def find_partners(groups: Sequence[Group]) -> list[int]:
    """For each row the position of the next one, going round, that has another prompt.

    Raises:
        DataError: All rows have the same prompt.
    """
    n = len(groups)
    prompts = [np.ascontiguousarray(group.prompt, dtype=np.int32).tobytes() for group in groups]
    ends = [i for i in range(n) if prompts[i] != prompts[(i + 1) % n]]  # where a stretch of equal prompts ends
    if n and not ends:
        raise DataError(
            f"KTO needs the answer to another prompt for its KL baseline, but all {n:,} rows have the same prompt",
            where=groups[0].id,
            remedy="use data with several prompts, or loss_type: apo_zero_unpaired, which has no baseline",
        )
    found, place = [0] * n, 0
    for i in range(n):
        while place < len(ends) and ends[place] < i:
            place += 1
        found[i] = (ends[place % len(ends)] + 1) % n
    return found


class NextPrompts:
    """A row's partner is the answer of the next row that has another prompt; it becomes slot 1 of the row's group."""

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Each row with its partner, without that row's own columns.

        A partner that would make the sequence longer than the longest row of these data is cut at its end, so that nothing
        needs more room than the rows themselves.
        """
        longest = max((group.longest for group in groups), default=0)
        out = []
        for group, other in zip(groups, find_partners(groups), strict=True):
            (own,) = group.completions
            (lent,) = groups[other].completions
            room = longest - len(group.prompt)
            partner = Completion(lent.ids[:room], lent.mask[:room], {PARTNER: 1.0})
            out.append(replace(group, completions=(replace(own, columns={**own.columns, PARTNER: 0.0}), partner)))
        return out

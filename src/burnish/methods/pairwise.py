"""What the methods on preference pairs share."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.core.group import Group


def count_pairs(groups: Sequence[Group]) -> float:
    """The number of pairs.

    Raises:
        ValueError: A group is no pair.
    """
    for group in groups:
        if len(group.completions) != 2:
            raise ValueError(f"{group.id}: a pair has two completions, not {len(group.completions)}")
    return float(len(groups))

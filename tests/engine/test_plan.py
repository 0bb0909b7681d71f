"""The plan of a step: complete, within its limits, equal on all ranks."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.core.group import Completion, Group
from burnish.engine.plan import build_part, build_plan


def _group(i: int, prompt: int, lengths: list[int]) -> Group:
    completions = tuple(Completion(np.ones(n, np.int32), np.ones(n, bool)) for n in lengths)
    return Group(f"g{i}", np.ones(prompt, np.int32), completions)


rows = st.lists(
    st.tuples(st.integers(1, 30), st.lists(st.integers(1, 30), min_size=1, max_size=4)), min_size=1, max_size=20
)


@settings(max_examples=150, deadline=None)
@given(rows, st.integers(1, 200), st.one_of(st.none(), st.integers(1, 5)), st.integers(1, 4), st.booleans())
def test_every_completion_is_in_exactly_one_micro_batch(shapes, budget, cap, world, coupled):
    groups = [_group(i, p, lengths) for i, (p, lengths) in enumerate(shapes)]
    plan = build_plan(groups, budget=budget, cap=cap, world=world, coupled=coupled)
    assert len(plan.ranks) == world
    assert len({len(r) for r in plan.ranks}) == 1
    assert all([m.coupled for m in r] == [m.coupled for m in plan.ranks[0]] for r in plan.ranks)
    seen: Counter = Counter()
    for micro in (m for r in plan.ranks for m in r):
        assert len(micro.parts) <= (cap or len(groups) * 4)
        assert micro.tokens <= budget or len(micro.parts) == 1
        assert [p.position for p in micro.parts] == sorted(p.position for p in micro.parts)
        for part in micro.parts:
            piece, slots = build_part(groups[part.position], part)
            assert piece.tokens == part.tokens
            assert len(slots) == 1 or part.tokens <= budget or part.slots is None
            seen.update((part.position, s) for s in slots)
    assert seen == Counter((i, s) for i, g in enumerate(groups) for s in range(len(g.completions)))


def test_a_group_over_the_budget_is_cut_and_coupled():
    groups = [_group(0, 10, [10, 10, 10]), _group(1, 2, [3])]
    plan = build_plan(groups, budget=25)
    cut = [m for m in plan.of(0) if m.coupled]
    assert [[p.slots for p in m.parts] for m in cut] == [[(0,)], [(1,)], [(2,)]]
    assert [p.position for m in plan.of(0) if not m.coupled for p in m.parts] == [1]


def test_one_sequence_over_the_budget_is_named():
    plan = build_plan([_group(0, 10, [40]), _group(1, 2, [3])], budget=25)
    assert plan.oversized == (0,)


def test_two_ranks_share_a_small_step():
    plan = build_plan([_group(i, 5, [5, 5]) for i in range(4)], budget=10_000, world=2)
    assert [sum(m.tokens for m in r) for r in plan.ranks] == [30, 30]

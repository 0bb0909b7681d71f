"""How the examples of an optimizer step are cut into micro-batches: a pure function that every rank computes alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from burnish.core.group import Group


@dataclass(frozen=True, slots=True)
class Part:
    """A group of the step, or some of its completions if the whole exceeds the budget.

    Attributes:
        position: Its position in the step (data order).
        slots: The completions it holds; None = all.
        tokens: What a packed forward computes for it.
    """

    position: int
    slots: tuple[int, ...] | None
    tokens: int


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Parts that run through the model together. `coupled`: they need the loss of other micro-batches (two passes)."""

    parts: tuple[Part, ...]
    coupled: bool = False

    @property
    def tokens(self) -> int:
        return sum(p.tokens for p in self.parts)


@dataclass(frozen=True, slots=True)
class StepPlan:
    """For each rank its micro-batches; all ranks have equally many (some empty), coupled ones first."""

    ranks: tuple[tuple[MicroBatch, ...], ...]
    oversized: tuple[int, ...]

    def of(self, rank: int) -> tuple[MicroBatch, ...]:
        return self.ranks[rank]


def _cut(position: int, group: Group, budget: int) -> list[Part]:
    """A group that exceeds the budget, cut by completion with its prompt repeated; else the group whole."""
    if group.tokens <= budget or len(group.completions) == 1:
        return [Part(position, None, group.tokens)]
    parts: list[Part] = []
    slots: list[int] = []
    used = prompt = len(group.prompt)
    for slot, completion in enumerate(group.completions):
        if slots and used + len(completion.ids) > budget:
            parts.append(Part(position, tuple(slots), used))
            slots, used = [], prompt
        slots.append(slot)
        used += len(completion.ids)
    parts.append(Part(position, tuple(slots), used))
    return parts if len(parts) > 1 else [Part(position, None, group.tokens)]


def _fill(parts: Sequence[Part], budget: int, cap: int | None, coupled: bool) -> list[MicroBatch]:
    """Parts into micro-batches within token budget and cap on examples: longest first, each then in data order."""
    batches: list[MicroBatch] = []
    current: list[Part] = []
    used = 0
    for part in sorted(parts, key=lambda p: (-p.tokens, p.position)):
        if current and (used + part.tokens > budget or (cap is not None and len(current) >= cap)):
            batches.append(MicroBatch(tuple(current), coupled))
            current, used = [], 0
        current.append(part)
        used += part.tokens
    if current:
        batches.append(MicroBatch(tuple(current), coupled))
    return [MicroBatch(tuple(sorted(b.parts, key=lambda p: (p.position, p.slots or ()))), coupled) for b in batches]


def _share(batches: Sequence[MicroBatch], world: int, coupled: bool) -> list[list[MicroBatch]]:
    """Micro-batches over ranks, the largest first to the least loaded; padded with empty ones to equal number."""
    ranks: list[list[MicroBatch]] = [[] for _ in range(world)]
    load = [0] * world
    for batch in sorted(batches, key=lambda b: -b.tokens):
        target = min(range(world), key=lambda r: (load[r], r))
        ranks[target].append(batch)
        load[target] += batch.tokens
    longest = max(map(len, ranks))
    return [r + [MicroBatch((), coupled)] * (longest - len(r)) for r in ranks]


def build_plan(
    groups: Sequence[Group], *, budget: int, cap: int | None = None, world: int = 1, coupled: bool = False
) -> StepPlan:
    """Cut a step into micro-batches.

    Args:
        groups: The examples of the step, in data order.
        budget: Tokens in a micro-batch at most. A group over it is cut by completion; a single sequence over it is a
            micro-batch of its own.
        cap: Examples in a micro-batch at most.
        world: Number of ranks.
        coupled: The method's loss is no sum over groups, so all micro-batches take the two-pass route.
    """
    if world > 1:  # spread a small step over all ranks instead of one
        fair = -(-sum(g.tokens for g in groups) // world)
        longest = max((g.tokens for g in groups), default=1)
        budget_for_packing = max(min(budget, fair), min(budget, longest))
    else:
        budget_for_packing = budget
    whole: list[Part] = []
    cut: list[Part] = []
    oversized: list[int] = []
    for position, group in enumerate(groups):
        parts = _cut(position, group, budget)
        (cut if len(parts) > 1 else whole).extend(parts)
        if any(p.tokens > budget for p in parts):
            oversized.append(position)
    if coupled:
        cut, whole = cut + whole, []
    first = _share(_fill(cut, budget_for_packing, cap, True), world, True) if cut else [[] for _ in range(world)]
    second = _share(_fill(whole, budget_for_packing, cap, False), world, False) if whole else [[] for _ in range(world)]
    return StepPlan(tuple(tuple(a + b) for a, b in zip(first, second, strict=True)), tuple(oversized))


def build_part(group: Group, part: Part) -> tuple[Group, tuple[int, ...]]:
    """The group that a part stands for, and the slots of its completions in the whole group."""
    if part.slots is None:
        return group, tuple(range(len(group.completions)))
    return replace(group, completions=tuple(group.completions[s] for s in part.slots)), part.slots

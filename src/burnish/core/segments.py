"""A packed row as attention work: stretches of queries with the keys that they see.

Shapes: T tokens of the row, S segments, M keys of all segments laid end to end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from burnish.core.batch import Layout, move
from burnish.core.kernels import calls

KERNEL_KEYS = 1024  # of a segment at most; the library's blocked products are faster from some 2,000 on
_BLOCK = 256  # queries that share one stretch of keys under a sliding window, at least


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of queries with its own causal keys, all as row positions.

    Attributes:
        start, stop: The queries, and the keys that they see causally.
        prompt: Row positions [prompt, prompt_stop) that every query sees too; empty for a plain causal segment.
    """

    start: int
    stop: int
    prompt: int = 0
    prompt_stop: int = 0

    @property
    def own(self) -> int:
        """Queries of the segment."""
        return self.stop - self.start

    @property
    def before(self) -> int:
        """Keys of the prompt that come before its own."""
        return self.prompt_stop - self.prompt

    def keys(self, first: int, seen: int) -> np.ndarray:
        """Row positions of keys [first, seen) of the segment, counted from the start of its prompt."""
        every = np.r_[self.prompt : self.prompt_stop, self.start : self.stop]
        return every[first:seen]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Queries in row order, cut into pieces; the keys of each piece, one piece after the other.

    The last query of a piece sees its last key (causal, aligned at the lower right).

    Attributes:
        queries, keys: Sizes of each piece.
        index: (M,) int64, row positions of the keys; None where they are the row itself, in its order.
    """

    queries: tuple[int, ...]
    keys: tuple[int, ...]
    index: Tensor | None

    def gather(self, x: Tensor, dim: int) -> Tensor:
        """Keys or values of the row, along `dim`, as the pieces read them."""
        return x if self.index is None else x.index_select(dim, self.index)


@dataclass(frozen=True, slots=True)
class Bounds:
    """Where segments begin in the queries and in the gathered keys, for one launch over all of them.

    Attributes:
        queries, keys: (S + 1,) int32, on the device.
        longest_query, longest_key: The largest segment's.
    """

    queries: Tensor
    keys: Tensor
    longest_query: int
    longest_key: int


@dataclass
class AttentionPlan:
    """The layout of one packed row as attention work, made once per batch and shared by all layers.

    Attributes:
        layout: The packed row.
        segments: In row order: the prompt with the first completion of each group, a plain causal segment; then the further
            completions, each with its prompt.
        longest: The largest position + 1 over the row: a window at least as long hides nothing.
        keep: (K,) int64, the row positions that are read after the last layer; None = all.
        kept: The last layer returned the rows of `keep` only.
        calls: Layers that used this plan (the self-check counts them).
    """

    layout: Layout
    segments: tuple[Segment, ...]
    longest: int
    keep: Tensor | None = None
    kept: bool = False
    calls: int = 0
    _made: dict[tuple, Any] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        return self.layout.total

    def has_kernel(self, low: torch.dtype, *wide: Tensor | None, given: Sequence[Tensor] = ()) -> bool:
        """Whether the attention kernel takes this row and these tensors (`calls.serves`)."""
        return self.total > 0 and self._is_short and calls.serves(low, *wide, given=given)

    @cached_property
    def _is_short(self) -> bool:
        """Every segment sees few enough keys for the attention kernel, whose products are plain fp32."""
        return all(s.own + s.before <= KERNEL_KEYS for s in self.segments)

    @cached_property
    def table(self) -> calls.GroupTable:
        """The segments, group by group, for the kernels."""
        counts = [len(g.completions) for g in self.layout.groups]
        rows = [(s.start, s.stop, s.prompt, s.prompt_stop) for s in self.segments]
        offsets, segments = (torch.tensor(t, dtype=torch.int64, device="cpu") for t in ([0, *accumulate(counts)], rows))
        return calls.GroupTable(offsets, segments.view(-1, 4))

    def cached(self, key: tuple, build: Any) -> Any:
        """What `build()` gave when it was first asked for by this key: all layers read the same tensors."""
        if key not in self._made:
            self._made[key] = build()
        return self._made[key]

    def pieces(self, window: int | None, device: torch.device) -> Pieces:
        """The segments, one piece each; under a sliding window in blocks of queries, with the keys that they can see."""
        return self.cached(("pieces", window, device), lambda: _cut(self.segments, self.total, window, device))

    def bounds(self, device: torch.device) -> Bounds:
        """Of `pieces(None, device)`."""
        return self.cached(("bounds", device), lambda: _find_bounds(self.pieces(None, device), device))

    def visible(self, queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool: what the queries of a piece see of its keys."""
        window = None if window is None or window >= keys else window
        return self.cached(
            ("visible", queries, keys, window, device), lambda: _build_mask(queries, keys, window, device)
        )


def build_attention_plan(layout: Layout) -> AttentionPlan:
    """The attention work of a packed row."""
    segments: list[Segment] = []
    longest = 0
    for group in layout.groups:
        first, *rest = group.completions
        prompt_stop = group.start + group.prompt
        segments.append(Segment(group.start, first.start + first.length))
        segments += [Segment(c.start, c.start + c.length, group.start, prompt_stop) for c in rest]
        longest = max(longest, group.prompt + max(c.length for c in group.completions))
    return AttentionPlan(layout, tuple(segments), longest)


def _cut(segments: Sequence[Segment], total: int, window: int | None, device: torch.device) -> Pieces:
    queries: list[int] = []
    keys: list[np.ndarray] = []
    for s in segments:
        step = s.own if window is None else max(window, _BLOCK)
        for a in range(0, s.own, step):
            b = min(a + step, s.own)
            first = 0 if window is None else max(0, s.before + a - window + 1)
            queries.append(b - a)
            keys.append(s.keys(first, s.before + b))
    index = np.concatenate(keys) if keys else np.zeros(0, dtype=np.int64)
    plain = len(index) == total and bool((index == np.arange(total)).all())
    there = None if plain else move(torch.from_numpy(index.astype(np.int64)), device)
    return Pieces(tuple(queries), tuple(len(k) for k in keys), there)


def _find_bounds(pieces: Pieces, device: torch.device) -> Bounds:
    queries, keys = (
        move(torch.tensor([0, *accumulate(sizes)], dtype=torch.int32, device="cpu"), device)
        for sizes in (pieces.queries, pieces.keys)
    )
    return Bounds(queries, keys, max(pieces.queries, default=0), max(pieces.keys, default=0))


def _build_mask(queries: int, keys: int, window: int | None, device: torch.device) -> Tensor:
    q = torch.arange(keys - queries, keys, device=device)[:, None]
    k = torch.arange(keys, device=device)[None, :]
    return (k <= q) if window is None else (k <= q) & (q - k < window)

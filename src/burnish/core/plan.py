"""The layout of a packed row as attention work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from burnish.core.batch import Layout
from burnish.core.group_attention import GroupedRow
from burnish.core.kernels import calls

KERNEL_KEYS = 1024  # of a segment at most; batched products are faster from some 2,000 on


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
        block_masks: The flex backend's masks, by window and device; cached across layers.
        walk: Take the row segment by segment even where its groups are short (the self-check looks at both ways).
        blocks: The row as blocks of queries (`core.bmm_attention`), by heads and window; cached across layers.
        grouped: The row as batches of short groups (`core.group_attention`), by numbers of heads; cached across layers.
    """

    layout: Layout
    segments: tuple[Segment, ...]
    longest: int
    keep: Tensor | None = None
    kept: bool = False
    calls: int = 0
    block_masks: dict[tuple, Any] = field(default_factory=dict, repr=False)
    walk: bool = False
    blocks: dict[tuple[int, int | None], Any] = field(default_factory=dict, repr=False)
    grouped: dict[tuple[int, int], GroupedRow | None] = field(default_factory=dict, repr=False)
    _masks: dict[tuple, Tensor] = field(default_factory=dict, repr=False)

    @property
    def total(self) -> int:
        return self.layout.total

    def has_kernel(self, low: torch.dtype, *wide: Tensor | None, given: Sequence[Tensor] = ()) -> bool:
        """Whether the attention kernel takes this row and these tensors (`calls.serves`)."""
        return self.total > 0 and self._is_short and not self.walk and calls.serves(low, *wide, given=given)

    @cached_property
    def _is_short(self) -> bool:
        """Every segment sees few enough keys for the attention kernel, whose products are plain fp32."""
        return all(s.stop - s.start + s.prompt_stop - s.prompt <= KERNEL_KEYS for s in self.segments)

    @cached_property
    def table(self) -> calls.GroupTable:
        """The segments, group by group, for the kernels."""
        counts = [len(g.completions) for g in self.layout.groups]
        rows = [(s.start, s.stop, s.prompt, s.prompt_stop) for s in self.segments]
        offsets, segments = (torch.tensor(t, dtype=torch.int64, device="cpu") for t in ([0, *accumulate(counts)], rows))
        return calls.GroupTable(offsets, segments.view(-1, 4))

    def future_penalty(self, size: int, dtype: torch.dtype) -> Tensor:
        """(size, size) on the CPU: −inf where the key comes after the query, else 0; cached across layers."""
        key = ("future", size, dtype)
        if key not in self._masks:
            self._masks[key] = torch.full((size, size), float("-inf"), dtype=dtype).triu_(1)
        return self._masks[key]

    def visible(self, segment: Segment, window: int | None, device: torch.device) -> Tensor:
        """(queries, keys) bool of a segment, keys being its prompt followed by itself; cached across layers."""
        own = segment.stop - segment.start
        before = segment.prompt_stop - segment.prompt
        window = None if window is None or window >= before + own else window
        key = (own, before, window, device)
        if key not in self._masks:
            q = torch.arange(before, before + own, device=device)[:, None]
            k = torch.arange(before + own, device=device)[None, :]
            mask = k <= q
            if window is not None:
                mask &= q - k < window
            self._masks[key] = mask
        return self._masks[key]


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

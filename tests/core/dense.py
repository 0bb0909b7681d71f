"""Packed attention by its definition, over layouts drawn at random: what every way of computing it is compared with."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from burnish.core.batch import CompletionSpan, GroupSpan, Layout


def draw_layout(seed: int, completions: tuple[int, ...], prompts: tuple[int, int], lengths: tuple[int, int]) -> Layout:
    """A layout of groups with these numbers of completions; prompts and completions have (least, most) tokens."""
    draw, at, groups = random.Random(seed), 0, []
    for count in completions:
        start, spans = at, []
        prompt = draw.randint(*prompts)
        at += prompt
        for _ in range(count):
            length = draw.randint(*lengths)
            spans.append(CompletionSpan(at, length))
            at += length
        groups.append(GroupSpan(start, prompt, tuple(spans)))
    return Layout(at, tuple(groups))


def attend_dense(rows: Tensor, layout: Layout, heads: int, kv_heads: int) -> Tensor:
    """(T, H, D) from scaled queries, keys and values (T, H + 2N, D): one mask over the whole row."""
    q, k, v = rows.transpose(0, 1).split((heads, kv_heads, kv_heads))
    k, v = (t.repeat_interleave(heads // kv_heads, 0) for t in (k, v))
    seen = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    for group in layout.groups:
        prompt = range(group.start, group.start + group.prompt)
        for c in group.completions:
            places = [*prompt, *range(c.start, c.start + c.length)]
            for i, query in enumerate(places):
                seen[query, places[: i + 1]] = True
    return ((q @ k.transpose(1, 2)).masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)

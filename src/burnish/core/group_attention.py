"""Attention over many short groups: groups of like length are padded to one shape and computed together.

Walking a row group by group (`core.bmm_attention`) costs some twenty small calls a group and layer, which is most of the time
where groups are short. Here each group, its prompt and all its completions, is one square of scores with a mask; groups of
like length share a few batched products. Only scores are padded: projections and feed-forward see the row as it is.

Queries, keys and values are gathered by (token, head) rows, so that no transposition is copied. The query heads of a key head
lie one after the other as further queries, so that keys are not repeated. All of it is in at least fp32: the products are
small, and PyTorch's bf16 products prepare a kernel for each new shape.

Shapes: T tokens of the row, H query heads, N key/value heads, D head size, B groups of a batch, L its length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from burnish.core.batch import GroupSpan
    from burnish.core.plan import AttentionPlan

LONGEST = 256  # tokens of a group at most
_ROUND = 4  # lengths are rounded up to a multiple of this
_SPREAD = 0.8  # a group shorter than this share of its batch's length begins a new batch
_KEEP = 1 << 21  # numbers a layer may keep for backward instead of computing them again
_AREA = 1 << 20  # scores of a batch at most (more than one group)
_WASTE = 3.0  # padded squares may have so many times the scores that segments have


@dataclass(frozen=True, slots=True)
class GroupBatch:
    """Groups padded to one length.

    Attributes:
        count, length: B, L.
        first: Rows of (token, head) before those of this batch in the gathered tensor.
        mask: (L, L) where all groups have one completion, else (B, 1, L, L): 0, or −inf where a query may not see a key.
    """

    count: int
    length: int
    first: int
    mask: Tensor


@dataclass(frozen=True, slots=True)
class GroupedRow:
    """How a packed row is gathered into batches and back; rows are (token, head) pairs.

    Attributes:
        batches: In the order in which they lie in the gathered tensors.
        gather: Row of (T · (H + 2N), D) for each gathered row: of each batch the queries, keys and values, (B, heads, L) each.
        scatter: Gathered row of each of the T · (H + 2N).
        gather_out: Row of (T · H, D) for each padded query. scatter_out: Padded query of each of the T · H.
        padding: Padded queries that stand for no token.
    """

    batches: tuple[GroupBatch, ...]
    gather: Tensor
    scatter: Tensor
    gather_out: Tensor
    scatter_out: Tensor
    padding: Tensor

    def may_keep(self, heads: int, head_size: int) -> bool:
        """Whether gathered rows and probabilities of a layer are few enough to be kept for backward."""
        scores = sum(b.count * heads * b.length**2 for b in self.batches)
        return scores + self.gather.shape[0] * head_size <= _KEEP


def find_grouped(plan: AttentionPlan, heads: int, kv_heads: int) -> GroupedRow | None:
    """The row as batches of short groups; None where walking its segments is cheaper. Cached across layers."""
    key = (heads, kv_heads)
    if key not in plan.grouped:
        plan.grouped[key] = build_grouped(plan, heads, kv_heads) if not plan.walk and is_worth_it(plan) else None
    return plan.grouped[key]


def is_worth_it(plan: AttentionPlan) -> bool:
    """Whether there are many segments, all groups are short, and their squares waste little."""
    lengths = [g.end - g.start for g in plan.layout.groups]
    if len(plan.segments) < 3 or max(lengths) > LONGEST:
        return False
    exact = sum((s.stop - s.start) * (s.stop - s.start + s.prompt_stop - s.prompt) for s in plan.segments)
    return sum(_round(n) ** 2 for n in lengths) <= _WASTE * exact + _ROUND**2 * len(lengths)


def build_grouped(plan: AttentionPlan, heads: int, kv_heads: int) -> GroupedRow:
    """The indices of `GroupedRow` for a packed row."""
    width = heads + 2 * kv_heads
    gathered, queries, real, batches = [], [], [], []
    first = 0
    for groups in _cut(plan.layout.groups, heads):
        length = _round(max(g.end - g.start for g in groups))
        starts = np.array([g.start for g in groups])
        own = np.array([g.end - g.start for g in groups])
        offset = np.arange(length)
        held = offset < own[:, None]  # (B, L): a token, not padding
        token = np.where(held, starts[:, None] + offset, starts[:, None])
        parts = (range(heads), range(heads, heads + kv_heads), range(heads + kv_heads, width))
        gathered += [(token[:, None] * width + np.array(part)[None, :, None]).ravel() for part in parts]
        queries.append((token[:, None] * heads + np.arange(heads)[None, :, None]).ravel())
        real.append([np.broadcast_to(held[:, None], (len(groups), len(part), length)).ravel() for part in parts])
        batches.append(GroupBatch(len(groups), length, first, _build_mask(groups, length)))
        first += len(groups) * width * length
    gather, gather_out = np.concatenate(gathered), np.concatenate(queries)
    real_out = np.concatenate([of_queries for of_queries, *_ in real])
    scatter = _invert(gather, np.concatenate([x for batch in real for x in batch]), plan.total * width)
    scatter_out = _invert(gather_out, real_out, plan.total * heads)
    padding = np.flatnonzero(~real_out)
    return GroupedRow(
        tuple(batches), *(torch.from_numpy(x) for x in (gather, scatter, gather_out, scatter_out, padding))
    )


def attend_grouped(
    rows: Tensor, row: GroupedRow, heads: int, kv_heads: int, keep: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attention of a layer.

    Args:
        rows: (T · (H + 2N), D): of each token its scaled queries, its keys and its values, at least fp32.
        keep: Return what `attend_grouped_backward` would compute again.

    Returns:
        (T, H, D) of the same type, and the gathered rows and each batch's probabilities if they are to be kept.
    """
    gathered = rows.index_select(0, row.gather)
    out = rows.new_empty(row.gather_out.shape[0], rows.shape[1])
    at = 0
    kept = [gathered]
    with torch.autocast("cpu", enabled=False):
        for batch in row.batches:
            q, k, v = _operands(gathered, batch, heads, kv_heads)
            p = _probabilities(q, k, batch)
            torch.bmm(p, v, out=out[at : at + q.shape[0] * q.shape[1]].view(q.shape))
            at += q.shape[0] * q.shape[1]
            kept.append(p)
    return out.index_select(0, row.scatter_out).view(-1, heads, rows.shape[1]), tuple(kept) if keep else ()


def attend_grouped_backward(kept: Sequence[Tensor], grad: Tensor, row: GroupedRow, heads: int, kv_heads: int) -> Tensor:
    """Gradient of `attend_grouped`.

    Args:
        kept: What it returned, or only the gathered rows.
        grad: (T, H, D), of their type.

    Returns:
        (T · (H + 2N), D).
    """
    gathered, *known = kept
    padded = grad.reshape(-1, grad.shape[-1]).index_select(0, row.gather_out).index_fill_(0, row.padding, 0.0)
    out = torch.empty_like(gathered)
    at = 0
    with torch.autocast("cpu", enabled=False):
        for i, batch in enumerate(row.batches):
            q, k, v = _operands(gathered, batch, heads, kv_heads)
            dq, dk, dv = _operands(out, batch, heads, kv_heads)
            g = padded[at : at + q.shape[0] * q.shape[1]].view(q.shape)
            at += q.shape[0] * q.shape[1]
            p = known[i] if known else _probabilities(q, k, batch)
            torch.bmm(p.transpose(1, 2), g, out=dv)
            ds = torch.ops.aten._softmax_backward_data(torch.bmm(g, v.transpose(1, 2)), p, -1, p.dtype)
            torch.bmm(ds, k, out=dq)
            torch.bmm(ds.transpose(1, 2), q, out=dk)
    return out.index_select(0, row.scatter)


def _operands(gathered: Tensor, batch: GroupBatch, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of a batch's queries (B · N, H / N · L, D), keys and values (B · N, L, D)."""
    most, few = batch.count * heads * batch.length, batch.count * kv_heads * batch.length
    start = batch.first
    q = gathered[start : start + most].view(batch.count * kv_heads, -1, gathered.shape[1])
    k = gathered[start + most : start + most + few].view(batch.count * kv_heads, batch.length, gathered.shape[1])
    v = gathered[start + most + few : start + most + 2 * few].view(k.shape)
    return q, k, v


def _probabilities(q: Tensor, k: Tensor, batch: GroupBatch) -> Tensor:
    """(B · N, H / N · L, L) softmax of the scores."""
    scores = torch.bmm(q, k.transpose(1, 2))
    if batch.mask.dim() == 2:
        scores.view(-1, batch.length, batch.length).add_(batch.mask)
    else:
        scores.view(batch.count, -1, batch.length, batch.length).add_(batch.mask)
    return torch.softmax(scores, -1)


# ---- indices ------------------------------------------------------------------------------------------------------


def _round(length: int) -> int:
    return -(-length // _ROUND) * _ROUND


def _cut(groups: Sequence[GroupSpan], heads: int) -> list[list[GroupSpan]]:
    """Groups in batches of like length, the longest first."""
    batches: list[list[GroupSpan]] = []
    length = 0
    for group in sorted(groups, key=lambda g: (g.start - g.end, g.start)):
        own = group.end - group.start
        if not batches or own < _SPREAD * length or (len(batches[-1]) + 1) * heads * length**2 > _AREA:
            batches.append([])
            length = _round(own)
        batches[-1].append(group)
    return batches


def _build_mask(groups: Sequence[GroupSpan], length: int) -> Tensor:
    past = np.tri(length, dtype=np.bool_)
    if all(len(g.completions) == 1 for g in groups):
        seen = past
    else:
        part = np.zeros((len(groups), length), dtype=np.int32)  # 0 = the prompt, and padding
        for i, group in enumerate(groups):
            for slot, c in enumerate(group.completions, start=1):
                part[i, c.start - group.start : c.start - group.start + c.length] = slot
        seen = past & ((part[:, None, :] == 0) | (part[:, :, None] == part[:, None, :]))
        seen = seen[:, None]
    return torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf")))


def _invert(gather: np.ndarray, real: np.ndarray, count: int) -> np.ndarray:
    """The place of each of `count` rows in a gathered tensor; where not `real`, a place stands for no row."""
    out = np.empty(count, dtype=np.int64)
    out[gather[real]] = np.flatnonzero(real)
    return out

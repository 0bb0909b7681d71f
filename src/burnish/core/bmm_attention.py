"""Packed attention on the CPU in bf16, as batched matrix products over blocks of queries.

PyTorch's flash kernel for the CPU multiplies its small bf16 blocks slowly (about a third of what batched products reach on
AVX-512). Here every segment is walked in blocks of queries, each against all the keys it sees: scores and d probabilities
are fp32 products of the bf16 inputs, everything else is a bf16 product, as in the flash kernel. A block of scores lives in a
buffer that is reused; backward recomputes it.

Shapes: T tokens of the row, H query heads, N key/value heads, D head size, n queries of a block, m keys they see.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from burnish.core.plan import AttentionPlan, Segment

_QUERIES = 128  # of a block at most: half of a causal square of 256 is never computed
_AREA = 1 << 23  # scores of a block at most


class PackedBmm(torch.autograd.Function):
    """(query (1, H, T, D), key (1, N, T, D), value (1, N, T, D), plan, scale) → (1, T, H, D), all bf16."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        heads, size = query.shape[1], query.shape[3]
        q32 = _by_head(query, heads, torch.float32).mul_(scale)
        k32, v16 = _by_head(key, heads, torch.float32), _by_head(value, heads, value.dtype)
        row = query.new_empty(1, plan.total, heads, size)
        out = row[0].transpose(0, 1)  # (H, T, D), a view
        work = _Buffers(plan, heads, query.dtype)
        for segment in plan.segments:
            keys, values = _keys(segment, k32), _keys(segment, v16)
            for a, b, seen in _blocks(segment, heads):
                p = work.probabilities(q32[:, a:b], keys[:, :seen])
                torch.bmm(work.low(p), values[:, :seen], out=(part := work.taken(b - a, size)))
                out[:, a:b] = part
        ctx.save_for_backward(query, key, value)
        ctx.plan, ctx.scale = plan, scale
        return row

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        plan, scale = ctx.plan, ctx.scale
        heads, size, low = query.shape[1], query.shape[3], query.dtype
        grad = grad.transpose(1, 2)
        q32 = _by_head(query, heads, torch.float32).mul_(scale)
        k32, v32, g32 = (_by_head(x, heads, torch.float32) for x in (key, value, grad))
        q16, k16, g16 = (_by_head(x, heads, low) for x in (query, key, grad))
        dq_row = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        dq = dq_row[0].transpose(0, 1)
        dk, dv = torch.zeros_like(k32), torch.zeros_like(v32)
        work = _Buffers(plan, heads, low)
        for segment in plan.segments:
            keys, values, keys16 = (_keys(segment, x) for x in (k32, v32, k16))
            for a, b, seen in _blocks(segment, heads):
                p = work.probabilities(q32[:, a:b], keys[:, :seen])
                _add_keys(dv, segment, torch.bmm(work.low(p).transpose(1, 2), g16[:, a:b]))
                ds = work.score_gradient(p, g32[:, a:b], values[:, :seen], scale)
                torch.bmm(ds, keys16[:, :seen], out=(part := work.taken(b - a, size)))
                dq[:, a:b] = part
                _add_keys(dk, segment, torch.bmm(ds.transpose(1, 2), q16[:, a:b]))
        return dq_row.transpose(1, 2), _by_group(dk, key), _by_group(dv, value), None, None


class _Buffers:
    """Scores, probabilities and their bf16 copies, reused by all blocks of one call."""

    def __init__(self, plan: AttentionPlan, heads: int, low: torch.dtype) -> None:
        area = max((heads * (b - a) * seen for s in plan.segments for a, b, seen in _blocks(s, heads)), default=0)
        self._scores, self._p = torch.empty(area), torch.empty(area)
        self._low = torch.empty(area, dtype=low)
        self._taken = torch.empty(heads * _QUERIES * 512, dtype=low)
        self._future = plan.future_penalty(_QUERIES)

    def probabilities(self, q: Tensor, k: Tensor) -> Tensor:
        """(H, n, m) softmax of q·k, where the last n keys are the queries' own; in a buffer."""
        shape = (*q.shape[:2], k.shape[1])
        scores = _shaped(self._scores, shape)
        torch.bmm(q, k.transpose(1, 2), out=scores)
        n = shape[1]
        scores[:, :, shape[2] - n :] += self._future[:n, :n]
        return torch.softmax(scores, -1, out=_shaped(self._p, shape))

    def score_gradient(self, p: Tensor, g: Tensor, v: Tensor, scale: float) -> Tensor:
        """d loss / d (q·k) in bf16, in a buffer."""
        dp = _shaped(self._scores, tuple(p.shape))
        torch.bmm(g, v.transpose(1, 2), out=dp)
        ds = torch.ops.aten._softmax_backward_data(dp, p, -1, torch.float32)
        return torch.mul(ds, scale, out=_shaped(self._low, tuple(p.shape)))

    def low(self, p: Tensor) -> Tensor:
        return _shaped(self._low, tuple(p.shape)).copy_(p)

    def taken(self, n: int, size: int) -> Tensor:
        """(H, n, D) room for a product."""
        heads = self._taken.numel() // (_QUERIES * 512)
        if size > 512:
            return torch.empty(heads, n, size, dtype=self._taken.dtype)
        return _shaped(self._taken, (heads, n, size))


def _shaped(buffer: Tensor, shape: tuple[int, ...]) -> Tensor:
    size = 1
    for n in shape:
        size *= n
    return buffer[:size].view(shape)


def _blocks(segment: Segment, heads: int) -> Iterator[tuple[int, int, int]]:
    """(first, end) row positions of a block of queries, and how many of the segment's keys they see."""
    own, before = segment.stop - segment.start, segment.prompt_stop - segment.prompt
    most = min(_QUERIES, max(16, _AREA // (heads * (own + before))))
    count = -(-own // most)
    step = -(-own // count)
    for a in range(0, own, step):
        b = min(a + step, own)
        yield segment.start + a, segment.start + b, before + b


def _keys(segment: Segment, x: Tensor) -> Tensor:
    """(H, T, D) → (H, m, D): what the segment sees, its prompt first."""
    own = x[:, segment.start : segment.stop]
    if segment.prompt_stop == segment.prompt:
        return own
    return torch.cat((x[:, segment.prompt : segment.prompt_stop], own), dim=1)


def _add_keys(total: Tensor, segment: Segment, part: Tensor) -> None:
    """Add (H, m', D), a gradient at the first m' keys of the segment, where they lie in the row."""
    before = segment.prompt_stop - segment.prompt
    if before:
        total[:, segment.prompt : segment.prompt_stop] += part[:, :before]
    total[:, segment.start : segment.start + part.shape[1] - before] += part[:, before:]


def _by_head(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """(1, N, T, D) → (H, T, D) contiguous, every key head repeated for its query heads."""
    n, t, d = x.shape[1:]
    out = torch.empty(n, heads // n, t, d, dtype=dtype)
    return out.copy_(x[0].unsqueeze(1)).view(heads, t, d)


def _by_group(total: Tensor, like: Tensor) -> Tensor:
    """(H, T, D) fp32 → (1, N, T, D) in `like`'s type, laid out token by token."""
    n, t, d = like.shape[1:]
    row = torch.empty(1, t, n, d, dtype=like.dtype)
    summed = total.view(n, -1, t, d)
    row[0].transpose(0, 1).copy_(summed[:, 0] if summed.shape[1] == 1 else summed.sum(1))
    return row.transpose(1, 2)

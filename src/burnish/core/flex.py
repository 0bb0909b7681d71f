"""Packed attention through PyTorch's flex attention, for CUDA: one kernel for the whole row with a block mask.

For softcaps and sinks, and for all layers under `attention: flex`. Not used on the CPU, where flex attention has no backward
pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.batch import CompletionSpan, GroupSpan, Layout, move
from burnish.core.segments import AttentionPlan

_BLOCK = 128  # queries and keys of a block
_COMPILATIONS = 64  # variants of flex attention that may be compiled: window, softcap, sinks, heads, gradient or none

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def build_mask_mod(layout: Layout, window: int | None, device: torch.device | str = "cpu") -> MaskFunction:
    """mask_mod(batch, head, query, key) of a packed row: whether the query sees the key.

    Args:
        layout: The packed row.
        window: A key is visible if its restarted position is less than this many before the query's.
    """
    group = torch.empty(layout.total, dtype=torch.int32)
    part = torch.zeros(layout.total, dtype=torch.int32)  # 0 = prompt, 1 … K = completion
    position = torch.empty(layout.total, dtype=torch.int32)
    for i, span in enumerate(layout.groups):
        group[span.start : span.end] = i
        position[span.start : span.start + span.prompt] = torch.arange(span.prompt)
        for k, c in enumerate(span.completions, start=1):
            part[c.start : c.start + c.length] = k
            position[c.start : c.start + c.length] = torch.arange(span.prompt, span.prompt + c.length)
    group, part, position = (move(x, device) for x in (group, part, position))

    def mask_mod(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        same = (group[query] == group[key]) & ((part[key] == 0) | (part[key] == part[query]))
        visible = same & (position[key] <= position[query])
        return visible if window is None else visible & (position[query] - position[key] < window)

    return mask_mod


def find_blocks(layout: Layout, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Which blocks of (size queries, size keys) hold a visible pair, and which of them nothing but visible pairs.

    Computed from the spans, without a (tokens, tokens) mask; a sliding window is left to the mask function.

    Returns:
        (n, n) bool, rows are blocks of queries: visible, full.
    """
    count = -(-layout.total // size)
    visible, full = (np.zeros((count, count), dtype=np.bool_) for _ in range(2))
    causal, before = np.tri(count, dtype=np.bool_), np.tri(count, k=-1, dtype=np.bool_)

    def touched(start: int, stop: int) -> slice:
        return slice(start // size, -(-stop // size))

    def inside(start: int, stop: int) -> slice:
        first = -(-start // size)
        return slice(first, max(first, stop // size))

    for group in layout.groups:
        first, prompt = group.completions[0], (group.start, group.start + group.prompt)
        # Every later query of the group sees a block of its prompt; prompt and first completion are one causal stretch.
        everyone, shared, joint = (
            inside(group.start, group.end),
            inside(*prompt),
            inside(group.start, first.start + first.length),
        )
        full[everyone, shared] |= before[everyone, shared]
        full[joint, joint] |= before[joint, joint]
        for part in [prompt, *((c.start, c.start + c.length) for c in group.completions)]:
            some, all_of = touched(*part), inside(*part)
            visible[some, some] |= causal[some, some]
            full[all_of, all_of] |= before[all_of, all_of]
            if part != prompt:
                visible[some, touched(*prompt)] = True
    return visible, full


def build_block_mask(layout: Layout, window: int | None, device: torch.device | str, size: int = 128) -> Any:
    """Flex attention's block mask of a packed row."""
    from torch.nn.attention.flex_attention import BlockMask

    visible, full = find_blocks(layout, size)
    full &= window is None
    given = [move(x, device) for kind in (visible & ~full, full) for x in _list_blocks(kind)]
    return BlockMask.from_kv_blocks(
        *given,
        BLOCK_SIZE=size,
        mask_mod=build_mask_mod(layout, window, device),
        seq_lengths=(layout.total, layout.total),
    )


def _list_blocks(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """(1, 1, n) how many, and (1, 1, n, n) which (first in each row), both int32."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks.sum(1, dtype=np.int32))[None, None], torch.from_numpy(order)[None, None]


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Any]:
    """Flex attention, compiled as a whole: where Dynamo gives up, it raises instead of building a (T, T) mask."""
    import torch._dynamo.config as dynamo
    from torch.nn.attention.flex_attention import flex_attention

    dynamo.recompile_limit = max(dynamo.recompile_limit, _COMPILATIONS)
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def run_flex(
    plan: AttentionPlan,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
) -> Tensor:
    """(1, H, T, D), (1, N, T, D) → (1, T, H, Dv). Sinks are applied through the log-sum-exp: o · e^lse / (e^lse + e^sink).

    Rows are padded to few lengths, by tokens that see themselves and that nobody reads, so that few are compiled.
    """
    attend = _compiled()
    total = _round_length(plan.total)
    mask = plan.cached(
        ("flex", window, query.device),
        lambda: build_block_mask(pad_layout(plan.layout, total), window, query.device, _BLOCK),
    )
    query, key, value = (F.pad(x, (0, 0, 0, total - plan.total)) for x in (query, key, value))
    limit = softcap or 1.0

    def cap(score: Tensor, batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return torch.tanh(score / limit) * limit

    given: dict[str, Any] = {
        "score_mod": None if softcap is None else cap,
        "block_mask": mask,
        "scale": scale,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if sinks is None:
        out = attend(query, key, value, **given)
    else:
        out, lse = attend(query, key, value, return_lse=True, **given)
        keep = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
        out = out * keep[..., None].to(out.dtype)
    return out[:, :, : plan.total].transpose(1, 2).contiguous()


def pad_layout(layout: Layout, total: int) -> Layout:
    """The layout with one more group, of tokens that nobody reads, up to `total`."""
    spare = total - layout.total
    if not spare:
        return layout
    return Layout(total, (*layout.groups, GroupSpan(layout.total, 0, (CompletionSpan(layout.total, spare),))))


def _round_length(total: int) -> int:
    """At least three blocks (Dynamo compiles one and two apart), then steps of an eighth of the power of two below."""
    step = max(_BLOCK, 1 << max(0, total.bit_length() - 4))
    return max(3 * _BLOCK, -(-total // step) * step)

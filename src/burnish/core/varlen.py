"""Packed attention through PyTorch's variable-length attention, for CUDA: one launch a layer, however many segments.

Each segment is a sequence of queries with its own keys (its prompt, then itself), causal and aligned at the lower right.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from burnish.core.segments import AttentionPlan

_LONGEST_HEAD = 256
_NEEDED = frozenset({"scale", "window_size", "enable_gqa"})


@lru_cache(maxsize=1)
def find_varlen() -> Callable[..., Any] | None:
    """torch's `varlen_attn`, or None where this torch has none that takes windows, a scale and grouped heads."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if set(inspect.signature(varlen_attn).parameters) >= _NEEDED else None


def explain_missing(device: torch.device) -> str:
    """Why no model can run varlen attention here, one clause; "" if it can."""
    if device.type != "cuda":
        return "varlen attention needs a CUDA device"
    if find_varlen() is None:
        return f"torch {torch.__version__} has no varlen_attn that takes windows, a scale and grouped heads"
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        return "the device is older than compute capability 8.0"
    return ""


def explain_refusal(query: Tensor, value: Tensor) -> str:
    """Why varlen attention does not take these queries and values (1, heads, T, size), one clause; "" if it does."""
    size, value_size = query.shape[-1], value.shape[-1]
    if query.dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bf16 and fp16, not {str(query.dtype).removeprefix('torch.')}"
    if size != value_size:
        return f"its values must be as wide as its queries, not {value_size} and {size}"
    if size % 8 or size > _LONGEST_HEAD:
        return f"a head size must be a multiple of 8 up to {_LONGEST_HEAD}, not {size}"
    return ""


def run_varlen(
    plan: AttentionPlan, scale: float, window: int | None, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """(1, H, T, D), (1, N, T, D) → (1, T, H, D).

    Args:
        window: A key is visible if its position is less than this many before the query's.
    """
    attend = find_varlen()
    assert attend is not None
    pieces, bounds = plan.pieces(None, query.device), plan.bounds(query.device)
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = attend(
        q,
        pieces.gather(k, 0),
        pieces.gather(v, 0),
        bounds.queries,
        bounds.keys,
        bounds.longest_query,
        bounds.longest_key,
        scale=scale,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return out[None]

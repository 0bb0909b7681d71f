"""Attention over packed groups, registered with transformers' attention registry.

A row of groups needs no mask: a prompt and its first completion are one causal segment, and every further completion
attends to its prompt (all of it) and, causally, to itself. Keys and values of all segments are gathered once a layer
(`core.segments`). Ways, all with the same numbers:

- CPU: the C kernel (`core.kernels`) where it serves; else the public `scaled_dot_product_attention`, one call a segment.
- CUDA: variable-length attention (`core.varlen`), one launch whatever the number of segments; flex attention (`core.flex`)
  for softcaps and sinks; `scaled_dot_product_attention` for what varlen does not take (fp32, odd head sizes, old devices).
- Dropout everywhere, softcaps and sinks on the CPU: a softmax written out in fp32, segment by segment.

Shapes: T tokens of the row, H query heads, N key/value heads, D head size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from burnish.core.flex import run_flex
from burnish.core.kernel_attention import KernelAttention
from burnish.core.segments import AttentionPlan
from burnish.core.varlen import explain_refusal, run_varlen
from burnish.errors import BurnishError

log = logging.getLogger("burnish")

SDPA_NAME = "burnish_packed"
VARLEN_NAME = "burnish_varlen"
FLEX_NAME = "burnish_flex"
NAMES = {"sdpa": SDPA_NAME, "varlen": VARLEN_NAME, "flex": FLEX_NAME}
PLAN_KWARG = "burnish_plan"
_PLAN_ATTRIBUTE = "_burnish_plan"

# Keyword arguments that carry nothing which changes the result of attention over a packed row.
_HARMLESS = frozenset(
    {
        "position_ids",
        "use_cache",
        "is_causal",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "position_embeddings",
        "cache_position",
        "past_key_values",
    }
)


class PackingRefused(BurnishError):
    """The model asks of attention something that packed rows do not implement."""

    def __init__(self, message: str) -> None:
        super().__init__(message, where="packed attention", remedy="use attention: padded for this model")


def attach_plan(position_ids: Tensor, plan: AttentionPlan) -> None:
    """Let attention find the plan by the position ids, for models that swallow unknown forward arguments."""
    setattr(position_ids, _PLAN_ATTRIBUTE, plan)


def _find_plan(plan: AttentionPlan | None, kwargs: dict[str, Any]) -> AttentionPlan:
    if plan is None:
        positions = kwargs.get("position_ids")
        plan = getattr(positions, _PLAN_ATTRIBUTE, None)
        if plan is None and isinstance(positions, Tensor) and positions._base is not None:
            plan = getattr(positions._base, _PLAN_ATTRIBUTE, None)
    if plan is None:
        raise PackingRefused("the model does not hand the packed layout on to its attention layers")
    return plan


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    way: Literal["sdpa", "varlen", "flex"] = "sdpa",
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    burnish_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one layer over a packed row; the signature is transformers'.

    Args:
        query: (1, H, T, D). key: (1, N, T, D). value: (1, N, T, Dv).
        attention_mask: Must be None: the layout says all.
        way: The backend of this model; a call that it does not take goes another way, said once in the log.
        sliding_window: A key is visible if its position is less than this many before the query's.
        softcap: Scores become c·tanh(score / c).
        s_aux: (H,) one more logit per head that joins the softmax and is then dropped.

    Returns:
        (1, T, H, Dv), None.

    Raises:
        PackingRefused: An argument is set that this function does not implement.
    """
    plan = _admit(query, key, attention_mask, burnish_plan, kwargs)
    query, key, value = _same_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = None if sliding_window is None or sliding_window >= plan.longest else sliding_window
    bent = softcap is not None or s_aux is not None
    if dropout > 0 or (bent and query.device.type == "cpu"):
        return _Explicit(plan, scale, window, softcap, s_aux, dropout)(query, key, value), None
    if bent or way == "flex":
        if way != "flex":
            _say_once("layers with softcaps or sinks run flex attention, which compiles first (minutes, once)")
        return run_flex(plan, scale, window, softcap, s_aux, query, key, value), None
    if way == "varlen":
        refusal = explain_refusal(query, value)
        if not refusal:
            return run_varlen(plan, scale, window, query, key, value), None
        _say_once(f"attention runs by scaled_dot_product_attention, not varlen: {refusal}")
    if window is None and KernelAttention.takes(query, key, value, plan):
        return KernelAttention.apply(query, key, value, plan, scale), None  # type: ignore[return-value]
    return _run_sdpa(plan, scale, window, query, key, value), None


class _Backend:
    """`packed_attention` by one way, as the registry calls it; an object, so that models with it can be pickled."""

    def __init__(self, way: Literal["sdpa", "varlen", "flex"]) -> None:
        self.way: Literal["sdpa", "varlen", "flex"] = way

    def __call__(self, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        return packed_attention(*args, way=self.way, **kwargs)


@lru_cache
def _say_once(text: str) -> None:
    log.info(text)


def _admit(
    query: Tensor, key: Tensor, attention_mask: Tensor | None, plan: AttentionPlan | None, kwargs: dict[str, Any]
) -> AttentionPlan:
    """The plan of this call, after checking that nothing is asked which packed attention does not do."""
    plan = _find_plan(plan, kwargs)
    _refuse_unknown(attention_mask, kwargs)
    if query.shape[0] != 1 or query.shape[2] != plan.total or key.shape[2] != plan.total:
        raise PackingRefused(f"attention got {tuple(query.shape)} for a packed row of {plan.total} tokens")
    plan.calls += 1
    return plan


def _refuse_unknown(attention_mask: Tensor | None, kwargs: dict[str, Any]) -> None:
    if attention_mask is not None:
        raise PackingRefused("the model brings an attention mask of its own")
    for name, given in kwargs.items():
        if given is not None and given is not False and name not in _HARMLESS:
            raise PackingRefused(f"the model passes `{name}` to attention, which packed attention does not implement")


def _same_dtype(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three in one dtype: autocast's where it is on (as for the library's own attention), else the widest."""
    device = query.device.type
    if torch.is_autocast_enabled(device) and query.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    else:
        dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), value.dtype)
    return query.to(dtype), key.to(dtype), value.to(dtype)


# ---- segment by segment --------------------------------------------------------------------------------------------


def _run_sdpa(plan: AttentionPlan, scale: float, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One `scaled_dot_product_attention` a segment; returns (1, T, H, Dv)."""
    rep = q.shape[1] // k.shape[1]
    if q.device.type == "cpu" and q.dtype in (torch.bfloat16, torch.float16):
        # The backward pass of PyTorch's kernel for the CPU takes five times as long in bf16 as in fp32.
        return _run_sdpa(plan, scale, window, q.float(), k.float(), v.float()).to(q.dtype)

    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        n, m = queries.shape[2], keys.shape[2]
        plain = n == m and (window is None or window >= m)
        mask = None if plain else plan.visible(n, m, window, q.device)
        if (
            mask is not None and rep > 1 and q.device.type == "cuda"
        ):  # its fused kernels take no grouped heads with a mask
            keys, values = keys.repeat_interleave(rep, 1), values.repeat_interleave(rep, 1)
        grouped = queries.shape[1] != keys.shape[1]
        return F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, is_causal=plain, scale=scale, enable_gqa=grouped
        )

    return _for_each_piece(attend, plan, window, q, k, v)


def _for_each_piece(
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    plan: AttentionPlan,
    window: int | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
) -> Tensor:
    """(1, H, n, D) queries and (1, N, m, D) keys and values of each piece → (1, H, n, Dv) each → (1, T, H, Dv) in all.

    One gather and three splits: backward touches each gradient once, however many pieces there are.
    """
    pieces = plan.pieces(window, q.device)
    queries = q.split(pieces.queries, 2)
    keys, values = (pieces.gather(x, 2).split(pieces.keys, 2) for x in (k, v))
    parts = [attend(*operands) for operands in zip(queries, keys, values, strict=True)]
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


@dataclass(frozen=True)
class _Explicit:
    """Attention written out, with everything the fused kernels cannot do; softmax in at least fp32."""

    plan: AttentionPlan
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    dropout: float

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            grouped = queries[0].unflatten(0, (keys.shape[1], -1))
            mask = self.plan.visible(queries.shape[2], keys.shape[2], self.window, q.device)
            return self._one(grouped, keys[0], values[0], mask).flatten(0, 1)[None]

        return _for_each_piece(attend, self.plan, self.window, q, k, v)

    def _one(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        """q: (N, H/N, n, D); k, v: (N, m, D); mask: (n, m) → (N, H/N, n, Dv)."""
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.matmul(q * self.scale, k.unsqueeze(1).transpose(-1, -2))
            scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
            if self.softcap is not None:
                scores = torch.tanh(scores / self.softcap) * self.softcap
            scores = scores.masked_fill(~mask, float("-inf"))
            if self.sinks is not None:
                sink = self.sinks.to(scores.dtype).view(*q.shape[:2], 1, 1).expand(*q.shape[:3], 1)
                weights = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1]
            else:
                weights = torch.softmax(scores, dim=-1)
            weights = F.dropout(weights.to(v.dtype), p=self.dropout, training=self.dropout > 0)
            return torch.matmul(weights, v.unsqueeze(1))


def register_packed_attention() -> None:
    """Make the packed backends known to transformers.

    No mask function is registered: for an unregistered name transformers hands None to the layers at once, while a
    registered one first searches position ids for packed sequences (a device synchronisation).
    """
    AttentionInterface.register(SDPA_NAME, _Backend("sdpa"))
    AttentionInterface.register(VARLEN_NAME, _Backend("varlen"))
    AttentionInterface.register(FLEX_NAME, _Backend("flex"))


register_packed_attention()

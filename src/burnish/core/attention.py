"""Attention over packed groups, registered with transformers' attention registry.

A row of groups needs no mask: a prompt and its first completion are one causal segment, and every further completion
attends to its prompt (all of it) and, causally, to itself. Ways, all with the same numbers:

- CPU: batched matrix products over blocks of queries (`core.bmm_attention`).
- Other devices: the public `scaled_dot_product_attention`, one call a segment.
- Softcaps, sinks and dropout: a softmax written out in fp32, segment by segment.
- CUDA, if asked for: flex attention (`core.flex`).

Shapes: T tokens of the row, H query heads, N key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface

from burnish.core.bmm_attention import PackedBmm
from burnish.core.flex import run_flex
from burnish.core.plan import AttentionPlan, Segment
from burnish.errors import BurnishError

SDPA_NAME = "burnish_packed"
FLEX_NAME = "burnish_flex"
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
    if softcap is not None or s_aux is not None or dropout > 0:
        return _Explicit(plan, scale, window, softcap, s_aux, dropout)(query, key, value), None
    if query.device.type == "cpu":
        return PackedBmm.apply(query, key, value, plan, scale, window), None  # type: ignore[return-value]
    return _run_sdpa(plan, scale, window, query, key, value), None


def flex_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    burnish_plan: AttentionPlan | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`packed_attention` through one block-masked kernel (CUDA); dropout takes the written-out way."""
    plan = _admit(query, key, attention_mask, burnish_plan, kwargs)
    query, key, value = _same_dtype(query, key, value)
    scale = query.shape[-1] ** -0.5 if scaling is None else float(scaling)
    window = None if sliding_window is None or sliding_window >= plan.longest else sliding_window
    if dropout > 0:
        return _Explicit(plan, scale, window, softcap, s_aux, dropout)(query, key, value), None
    return run_flex(plan, scale, window, softcap, s_aux, query, key, value), None


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


# ---- every device: public attention ------------------------------------------------------------------------------


def _run_sdpa(plan: AttentionPlan, scale: float, window: int | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One `scaled_dot_product_attention` a segment; returns (1, T, H, Dv)."""
    rep = q.shape[1] // k.shape[1]
    parts = []
    for s in plan.segments:
        own = s.stop - s.start
        keys, values = _segment_keys(s, k, v)
        plain = s.prompt_stop == s.prompt and (window is None or window >= own)
        mask = None if plain else plan.visible(s, window, q.device)
        if mask is not None and rep > 1:  # with a mask, CUDA's fused kernels take no grouped heads
            keys, values = keys.repeat_interleave(rep, 1), values.repeat_interleave(rep, 1)
        given: dict[str, Any] = {"attn_mask": mask, "is_causal": plain, "scale": scale, "enable_gqa": plain and rep > 1}
        parts.append(F.scaled_dot_product_attention(q.narrow(2, s.start, own), keys, values, **given))
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def _segment_keys(s: Segment, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values a segment sees: its prompt, then itself."""
    own = s.stop - s.start
    if s.prompt_stop == s.prompt:
        return k.narrow(2, s.start, own), v.narrow(2, s.start, own)
    before = s.prompt_stop - s.prompt
    return (
        torch.cat((k.narrow(2, s.prompt, before), k.narrow(2, s.start, own)), dim=2),
        torch.cat((v.narrow(2, s.prompt, before), v.narrow(2, s.start, own)), dim=2),
    )


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
        n, rep = k.shape[1], q.shape[1] // k.shape[1]
        grouped = q[0].unflatten(0, (n, rep))
        parts = []
        for s in self.plan.segments:
            keys, values = _segment_keys(s, k, v)
            mask = self.plan.visible(s, self.window, q.device)
            part = self._one(grouped.narrow(2, s.start, s.stop - s.start), keys[0], values[0], mask)
            parts.append(part.flatten(0, 1))
        return torch.cat(parts, dim=1).transpose(0, 1)[None].contiguous()

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
    AttentionInterface.register(SDPA_NAME, packed_attention)
    AttentionInterface.register(FLEX_NAME, flex_attention)


register_packed_attention()

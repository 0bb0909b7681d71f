"""Packed attention by the C kernel (`core.kernels`), for models whose blocks do not run fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.core.kernels import calls
from burnish.core.segments import AttentionPlan


class KernelAttention(torch.autograd.Function):
    """(query (1, H, T, D), key (1, N, T, D), value (1, N, T, D), plan, scale) → (1, T, H, D), all of one type."""

    @staticmethod
    def takes(query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan) -> bool:
        """Whether the kernel serves here."""
        on_cpu = all(x.device.type == "cpu" for x in (query, key, value))
        return on_cpu and value.shape[3] == query.shape[3] and plan.has_kernel(value.dtype)

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, plan: AttentionPlan, scale: float) -> Tensor:
        ctx.plan, ctx.scale = plan, scale
        rows = _join(query, key, value, scale)
        out, lse = calls.attend(rows, plan.table, query.shape[1], key.shape[1], value.dtype, keep=True)
        ctx.save_for_backward(query, key, value, lse)
        return out[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, lse = ctx.saved_tensors
        heads, kv_heads = query.shape[1], key.shape[1]
        rows = _join(query, key, value, ctx.scale)
        d_rows = calls.attend_backward(rows, ctx.plan.table, heads, kv_heads, grad[0].contiguous(), lse)
        dq, dk, dv = d_rows[None].transpose(1, 2).split((heads, kv_heads, kv_heads), 1)
        return (dq * ctx.scale).to(query.dtype), dk.to(key.dtype), dv.to(value.dtype), None, None


def _join(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """(T, H + 2N, D) fp32: of each token its scaled queries, its keys and its values."""
    heads, kv_heads, total, size = query.shape[1], key.shape[1], query.shape[2], query.shape[3]
    rows = query.new_empty(total, heads + 2 * kv_heads, size, dtype=torch.float32)
    to_query, to_key, to_value = rows.transpose(0, 1).split((heads, kv_heads, kv_heads))
    to_query.copy_(query[0]).mul_(scale)
    to_key.copy_(key[0])
    to_value.copy_(value[0])
    return rows

"""The kernels as functions of tensors. Callers ask `serves` first; everything here writes tensors that it has just made.

Shapes: T tokens, h hidden size, H query heads, N key/value heads, D head size, I intermediate size. `low` is fp32 or bf16,
everything else fp32. A result has the same bits whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from burnish.core.kernels.build import load_kernels

_LOW = (torch.float32, torch.bfloat16)
_CHUNK = 32  # rows of an item in the C sources: gradients of weights come as one row of partial sums per item
_LONGEST_HEAD = 512
_P, _L, _F = ctypes.c_void_p, ctypes.c_long, ctypes.c_float
_SIGNATURES = {
    "norm": (_P, _P, _P, _P, _L, _L, _F, _L, _L),
    "norm_backward": (_P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L),
    "swiglu": (_P, _P, _P, _L, _L, _L, _L),
    "swiglu_backward": (_P, _P, _P, _P, _P, _L, _L, _L, _L),
    "add": (_P, _P, _P, _P, _L, _L, _L, _L),
    "rotate": (_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _F, _L, _L),
    "rotate_backward": (_P, _P, _P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _F, _F, _L, _L),
    "attend": (_P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L),
    "attend_backward": (_P, _P, _P, _P, _P, _P, _L, _L, _L, _L, _L, _L),
    "head": (_P, _P, _P, _P, _L, _L, _L, _F, _L, _L),
    "head_backward": (_P, _P, _P, _P, _P, _L, _L, _L, _F, _L, _L),
}
_allowed = True


@contextlib.contextmanager
def without_kernels() -> Iterator[None]:
    """PyTorch's operations do all the work meanwhile (in all threads); what the kernels are compared with."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


@functools.cache
def _functions() -> dict[str, Any]:
    library = load_kernels().library
    if library is None:
        return {}
    found = {}
    for name, signature in _SIGNATURES.items():
        function = getattr(library, f"burnish_{name}")
        function.argtypes, function.restype = signature, _L if name.startswith("attend") else None
        found[name] = function
    return found


def serves(low: torch.dtype, *wide: Tensor | None, given: Sequence[Tensor] = ()) -> bool:
    """Whether the kernels take these.

    Args:
        low: The compute type.
        wide: Must be contiguous fp32 tensors on the CPU that hold something.
        given: Must be contiguous tensors of the compute type on the CPU.
    """
    return (
        _allowed
        and low in _LOW
        and all(t is None or (_fits(t, torch.float32) and t.numel() > 0) for t in wide)
        and all(_fits(t, low) for t in given)
        and bool(_functions())
    )


def _fits(t: Tensor, dtype: torch.dtype) -> bool:
    return t.dtype is dtype and t.device.type == "cpu" and t.is_contiguous()


def norm(x: Tensor, weight: Tensor, eps: float, low: torch.dtype) -> tuple[Tensor, Tensor]:
    """x (T, h), weight (h,) → x / √(mean x² + eps) · weight (T, h) in `low`, 1 / √(…) (T, 1)."""
    out = torch.empty_like(x, dtype=low)
    rstd = x.new_empty(x.shape[0], 1)
    _call("norm", x, weight, out, rstd, *x.shape, eps, low)
    return out, rstd


def norm_backward(
    grad: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, residual: Tensor | None, need_weight: bool
) -> tuple[Tensor, Tensor | None]:
    """Gradient of `norm` at grad (T, h), in fp32 or bf16; `residual` (T, h) is added to that of x."""
    dx = torch.empty_like(x)
    parts = x.new_empty(-(-x.shape[0] // _CHUNK), x.shape[1]) if need_weight else None
    _call("norm_backward", grad, x, rstd, weight, residual, dx, parts, *x.shape, grad.dtype)
    return dx, None if parts is None else parts.sum(0)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, (T, I) each."""
    out = torch.empty_like(gate)
    _call("swiglu", gate, up, out, *gate.shape, gate.dtype)
    return out


def swiglu_backward(gate: Tensor, up: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up side by side (T, 2I), and `swiglu` again (T, I)."""
    both = gate.new_empty(gate.shape[0], 2 * gate.shape[1])
    out = torch.empty_like(gate)
    _call("swiglu_backward", gate, up, grad, both, out, *gate.shape, gate.dtype)
    return both, out


def add(product: Tensor, x: Tensor, rows: Tensor | None) -> Tensor:
    """x (T, h), or its `rows` (K,) int64, plus the product (T or K, h) in fp32 or bf16."""
    out = torch.empty_like(product, dtype=torch.float32)
    _call("add", product, x, rows, out, *product.shape, product.dtype)
    return out


@dataclass(frozen=True, slots=True)
class Heads:
    """How rows of queries, keys and values are cut and turned: H, N, D, the scale of the queries, eps of the norms."""

    heads: int
    kv_heads: int
    size: int
    scale: float
    eps: float

    @property
    def fits(self) -> bool:
        return self.size % 2 == 0 and self.size <= _LONGEST_HEAD

    @property
    def _shape(self) -> tuple[int, int, int, float, float]:
        return self.heads, self.kv_heads, self.size, self.scale, self.eps


def rotate(qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads) -> Tensor:
    """qkv (T, (H + 2N)·D) → (T, H + 2N, D) fp32: queries and keys normalised (if there are norms (D,)) and rotated by the
    angles (T, D), queries scaled, values as they are."""
    rows = qkv.new_empty(qkv.shape[0], heads.heads + 2 * heads.kv_heads, heads.size, dtype=torch.float32)
    _call("rotate", qkv, q_norm, k_norm, cos, sin, rows, qkv.shape[0], *heads._shape, qkv.dtype)
    return rows


def rotate_backward(
    grad: Tensor, qkv: Tensor, q_norm: Tensor | None, k_norm: Tensor | None, cos: Tensor, sin: Tensor, heads: Heads
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Gradient of `rotate` at grad (T, H + 2N, D): of qkv, in its type, and of the norms."""
    out = torch.empty_like(qkv)
    parts = None if q_norm is None else grad.new_empty(-(-qkv.shape[0] // _CHUNK), 2, heads.size)
    _call("rotate_backward", grad, qkv, q_norm, k_norm, cos, sin, out, parts, qkv.shape[0], *heads._shape, qkv.dtype)
    if parts is None:
        return out, None, None
    d_q, d_k = parts.sum(0)
    return out, d_q, d_k


@dataclass(frozen=True, slots=True)
class GroupTable:
    """Groups of a packed row for the C side.

    Attributes:
        offsets: (groups + 1,) int64: of each group its first segment.
        segments: (·, 4) int64: start, stop, prompt, prompt_stop, as in `core.segments`.
    """

    offsets: Tensor
    segments: Tensor


def attend(
    rows: Tensor, table: GroupTable, heads: int, kv_heads: int, low: torch.dtype, keep: bool
) -> tuple[Tensor, Tensor | None]:
    """rows (T, H + 2N, D) fp32 → (T, H, D) in `low`, and the log-sum-exp of each query's scores (T, H) if `keep`."""
    total, _, size = rows.shape
    out = rows.new_empty(total, heads, size, dtype=low)
    lse = rows.new_empty(total, heads) if keep else None
    _call("attend", rows, table.offsets, table.segments, out, lse, len(table.offsets) - 1, heads, kv_heads, size, low)
    return out, lse


def attend_backward(rows: Tensor, table: GroupTable, heads: int, kv_heads: int, grad: Tensor, lse: Tensor) -> Tensor:
    """Gradient of `attend` at grad (T, H, D), in fp32 or bf16: (T, H + 2N, D) fp32."""
    d_rows = torch.empty_like(rows)
    _call(
        "attend_backward",
        rows,
        table.offsets,
        table.segments,
        grad,
        lse,
        d_rows,
        len(table.offsets) - 1,
        heads,
        kv_heads,
        rows.shape[2],
        grad.dtype,
    )
    return d_rows


def read_tile(z: Tensor, targets: Tensor, first: int, factor: float, lse: Tensor, picked: Tensor) -> None:
    """Add a tile of products (n, columns), words from `first`, to the log-sum-exp (n,) of its rows' logits (factor · products),
    and put the logits of the targets (n,) int64 that lie in it into `picked` (n,)."""
    _call("head", z, targets, lse, picked, *z.shape, first, factor, z.dtype)


def tile_gradient(
    z: Tensor, targets: Tensor, first: int, factor: float, lse: Tensor, grad: Tensor, out: Tensor
) -> Tensor:
    """`out` (n, columns; may be z) = grad (n,) · d log-prob of the target / d products of the tile."""
    _call("head_backward", z, targets, lse, grad, out, *z.shape, first, factor, z.dtype)
    return out


def _call(name: str, *args: Any) -> None:
    """Tensors by address, types as 0 (fp32) or 1 (bf16), the number of threads last.

    Raises:
        MemoryError: There is no room for the keys and values of a group.
    """
    failed = _functions()[name](
        *[
            a.data_ptr() if isinstance(a, Tensor) else a is torch.bfloat16 if isinstance(a, torch.dtype) else a
            for a in args
        ],
        torch.get_num_threads(),
    )
    if failed:
        raise MemoryError("not enough memory: the attention kernel found no room for the keys and values of a group")

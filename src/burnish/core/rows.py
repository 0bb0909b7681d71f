"""Functionals of whole rows of logits, a block of positions at a time, recomputed in backward.

A block's products are one matrix product in the compute type; logits and what a functional makes of them, several numbers for
each product, exist for a few of its rows at once, so that they stay in the processor's cache. Backward takes the gradient of the
functionals with respect to those rows, and multiplies for the whole block: the head's weight is cast once a pass, and its
gradient is summed in at least fp32.

Shapes: S positions, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from burnish.core.logits import Functional, HeadInput, compute_dtype
from burnish.errors import UsageError

_AREA = 1 << 20  # logits that a functional sees at once on a CPU; a functional holds several numbers for each


def compute_functionals(
    source: HeadInput,
    targets: Tensor,
    wanted: Sequence[Functional],
    temperature: float,
    against: HeadInput | None,
    block: int,
) -> list[Tensor]:
    """(S,) per functional, at least fp32.

    Args:
        source: The head; with a module in place of a weight each block runs through it and its autograd.
        against: A second model, without gradient.
        block: Positions whose products exist at once.
    """
    if source.module is not None or source.weight is None or not source.hidden.shape[0]:
        return _run_module(source, targets, wanted, temperature, against, block)
    device = source.hidden.device.type
    low = compute_dtype(source.hidden, source.weight)
    asked = _Asked(
        tuple(wanted),
        source,
        against,
        temperature,
        block,
        low,
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)),
    )
    found: Any = _FullRows.apply(source.hidden, source.weight, source.bias, targets, asked)
    return list(found)


@dataclass(frozen=True)
class _Asked:
    """What is computed; `source` serves for its transform alone, its tensors are given to autograd.

    Attributes:
        low: The type of the products.
        autocast: (device type, dtype, enabled) of the forward pass; backward runs under the same.
    """

    wanted: tuple[Functional, ...]
    source: HeadInput
    against: HeadInput | None
    temperature: float
    block: int
    low: torch.dtype
    autocast: tuple[str, torch.dtype, bool]

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.low, torch.float32)

    def restore_autocast(self) -> Any:
        device, dtype, enabled = self.autocast
        return torch.autocast(device, dtype=dtype, enabled=enabled)

    def low_against(self) -> HeadInput | None:
        """The second model with its weight cast once, not in each block."""
        if self.against is None or self.against.weight is None or self.against.module is not None:
            return self.against
        return replace(
            self.against, weight=self.against.weight.to(compute_dtype(self.against.hidden, self.against.weight))
        )


class _Block:
    """The products of some positions (and the second model's there), and what functionals make of their rows."""

    def __init__(self, asked: _Asked, products: Tensor, other: Tensor | None, targets: Tensor) -> None:
        self.asked, self.products, self.other, self.targets = asked, products, other, targets

    def parts(self) -> Iterator[slice]:
        """Rows that are looked at together."""
        count, vocabulary = self.products.shape
        rows = count if self.products.device.type != "cpu" else max(1, min(count, _AREA // vocabulary))
        for start in range(0, count, rows):
            yield slice(start, min(start + rows, count))

    def second(self, part: slice) -> Tensor | None:
        """The second model's logits of some rows."""
        asked = self.asked
        if self.other is None or asked.against is None:
            return None
        return asked.against.finish(self.other[part], asked.temperature)

    def compute(self, part: slice) -> list[Tensor]:
        """Each functional of some rows."""
        logits = self.asked.source.finish(self.products[part], self.asked.temperature)
        return [f.fn(logits, self.targets[part], self.second(part)) for f in self.asked.wanted]

    def pull(self, part: slice, grads: Sequence[Tensor | None]) -> Tensor:
        """The gradient of the functionals with respect to the rows' products, at least fp32."""
        asked, targets = self.asked, self.targets[part]
        pairs = [(f, g) for f, g in zip(asked.wanted, grads, strict=True) if g is not None]
        plain = asked.source.transform.is_identity and asked.temperature == 1.0
        raw = self.products[part].to(asked.wide)
        second = self.second(part) if any(f.needs_against for f, _ in pairs) else None
        total: Tensor | None = None
        if plain and any(f.pull is not None for f, _ in pairs):
            p = torch.softmax(raw, -1)
            for functional, grad in pairs:
                if functional.pull is not None:
                    total = _add(total, functional.pull(p, targets, second, grad))
            pairs = [(f, g) for f, g in pairs if f.pull is None]
        raw.requires_grad_(True)
        with torch.enable_grad():
            logits = asked.source.finish(raw, asked.temperature) if pairs else raw
            found = [(f.fn(logits, targets, second), g) for f, g in pairs]
        found = [(f, g) for f, g in found if f.requires_grad]
        if found:
            (dz,) = torch.autograd.grad([f for f, _ in found], raw, [g.to(f.dtype) for f, g in found])
            total = _add(total, dz)
        return torch.zeros_like(raw) if total is None else total


def _walk(asked: _Asked, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Iterator[tuple]:
    """(positions, block) one after the other; the weight is of the compute type."""
    against = asked.low_against()
    for start in range(0, hidden.shape[0], asked.block):
        stop = min(start + asked.block, hidden.shape[0])
        products = hidden[start:stop] @ weight.t()
        if bias is not None:
            products = products + bias.to(products.dtype)
        other = None if against is None else against.products(start, stop)
        if other is not None and other.shape != products.shape:
            raise _vocabularies_differ(products, other)
        yield slice(start, stop), _Block(asked, products, other, targets[start:stop])


class _FullRows(torch.autograd.Function):
    """(hidden, weight, bias, targets) → (S,) for each functional."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, asked: _Asked
    ) -> tuple[Tensor, ...]:
        out = [hidden.new_empty(hidden.shape[0], dtype=asked.wide) for _ in asked.wanted]
        for place, block in _walk(asked, hidden.to(asked.low), weight.to(asked.low), bias, targets):
            for part in block.parts():
                rows = slice(place.start + part.start, place.start + part.stop)
                for column, found in zip(out, block.compute(part), strict=True):
                    column[rows] = found
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.asked = asked
        ctx.set_materialize_grads(False)
        return tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets = ctx.saved_tensors
        asked: _Asked = ctx.asked
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        h, w = hidden.to(asked.low), weight.to(asked.low)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        d_weight: Tensor | None = None
        d_bias = bias.new_zeros(bias.shape, dtype=asked.wide) if need_bias and bias is not None else None
        with asked.restore_autocast():
            for place, block in _walk(asked, h, w, bias, targets):
                pulled = torch.empty_like(block.products)
                for part in block.parts():
                    rows = slice(place.start + part.start, place.start + part.stop)
                    mine = [None if g is None else g[rows] for g in grads]
                    dz = block.pull(part, mine)
                    pulled[part] = dz
                    if d_bias is not None:
                        d_bias += dz.sum(0)
                with torch.autocast(hidden.device.type, enabled=False):
                    if d_hidden is not None:
                        d_hidden[place] = pulled @ w
                    if need_weight:
                        d_weight = _add(d_weight, (pulled.t() @ h[place]).to(asked.wide))
        return (
            d_hidden,
            None if d_weight is None else d_weight.to(weight.dtype),
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _add(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _vocabularies_differ(ours: Tensor, theirs: Tensor) -> UsageError:
    return UsageError(
        f"vocabularies differ: {ours.shape[1]} and {theirs.shape[1]} tokens",
        where="head",
        remedy="use a reference or teacher with the same vocabulary",
    )


# ---- heads that must be called ------------------------------------------------------------------------------------


def _run_module(
    source: HeadInput,
    targets: Tensor,
    wanted: Sequence[Functional],
    temperature: float,
    against: HeadInput | None,
    block: int,
) -> list[Tensor]:
    """The same for a head with adapters or quantisation: autograd goes through it, block by block."""

    def run(hidden: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        part = HeadInput(hidden, source.weight, source.bias, source.transform, source.module)
        logits = part.logits(0, stop - start, temperature)
        other = None
        if against is not None:
            with torch.no_grad():
                other = against.logits(start, stop, temperature)
            if other.shape != logits.shape:
                raise _vocabularies_differ(logits, other)
        return tuple(f.fn(logits, targets[start:stop], other) for f in wanted)

    count = source.hidden.shape[0]
    pieces = []
    for start in range(0, max(count, 1), block):
        stop = min(start + block, count)
        hidden = source.hidden[start:stop]
        if torch.is_grad_enabled():
            pieces.append(checkpoint(run, hidden, start, stop, use_reentrant=False, preserve_rng_state=False))
        else:
            pieces.append(run(hidden, start, stop))
    return [torch.cat([piece[i] for piece in pieces]) for i in range(len(wanted))]

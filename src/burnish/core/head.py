"""The language-model head without logits: log-probabilities and functionals, tile by tile, recomputed in backward.

Log-probabilities and entropy walk the vocabulary in tiles (all rows × some columns), keeping a running log-sum-exp, so
that the gradient of each weight row is one matrix product. Functionals need whole rows and walk blocks of positions
(`core.rows`). Neither ever holds a (positions, vocabulary) tensor, unless the products are few (64 MiB on a CPU): then the
tiles keep them for backward.

Shapes: S positions, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from burnish.core.kernels import calls
from burnish.core.logits import (
    ENTROPY,
    IDENTITY,
    LOG_SQUARE_SUM,
    LOGPROBS,
    BlockFunction,
    Functional,
    HeadInput,
    LogitTransform,
    compute_dtype,
)
from burnish.core.rows import compute_functionals
from burnish.errors import UsageError

_TILE = 1 << 21  # elements of a logits tile; 8 MB in fp32 stays in the last-level cache
_ROWS = 4096  # positions of a tile at most
_KEEP = 1 << 26  # bytes of products kept from forward to backward at most; more of them are computed again
_KEEP_SHARE = 64  # on a device: one part in so many of its memory, if that is more


def compute_token_logprobs(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = IDENTITY,
    want_logprobs: bool = True,
    want_entropy: bool = False,
    temperature: float = 1.0,
    functionals: Sequence[Functional] | Mapping[str, BlockFunction] = (),
    against: HeadInput | None = None,
    module: Callable[[Tensor], Tensor] | None = None,
    block: int = 256,
) -> dict[str, Tensor]:
    """Log-probabilities of the targets and functionals of the distributions they come from.

    Args:
        hidden: (S, h) hidden states that predict the targets. weight: (V, h). targets: (S,) int64. bias: (V,).
        transform: What the model does to its logits.
        temperature: Divides the logits after the transform.
        functionals: Further numbers per position; given as a mapping, none of them reads a second model.
        against: A second model's hidden states and head, for functionals; no gradient reaches it.
        module: The head as a callable, in place of `weight` and `bias`.
        block: Positions at a time where whole rows of logits are needed.

    Returns:
        name → (S,), nats, at least fp32: "logprobs", "entropy" if wanted, one entry per functional.

    Raises:
        UsageError: The second model has another vocabulary, or is missing.
    """
    if isinstance(functionals, Mapping):
        functionals = [Functional(name, fn) for name, fn in functionals.items()]
    source = HeadInput(hidden, weight, bias, transform, module)
    _check_against(source, functionals, against)
    want_squares = list(functionals) == [LOG_SQUARE_SUM]
    if module is None and (not functionals or want_squares):
        assert weight is not None
        frozen = not weight.requires_grad and not (bias is not None and bias.requires_grad)
        once = torch.is_grad_enabled() and hidden.requires_grad and frozen and not want_entropy
        once = once and transform.softcap is None
        keep = torch.is_grad_enabled() and not once and (hidden.requires_grad or not frozen)
        settings = _Tiling(
            transform, temperature, want_entropy, compute_dtype(hidden, weight), once, keep, want_squares
        )
        logprobs, entropy, squares = _TiledHead.apply(hidden, weight, bias, targets, settings)  # type: ignore[misc]
        found = {"logprobs": logprobs}
        found |= {"entropy": entropy} if want_entropy else {}
        return found | ({LOG_SQUARE_SUM.name: squares} if want_squares else {})
    wanted = ([LOGPROBS] if want_logprobs else []) + ([ENTROPY] if want_entropy else []) + list(functionals)
    columns = compute_functionals(source, targets, wanted, temperature, against, block)
    return {f.name: column for f, column in zip(wanted, columns, strict=True)}


def _check_against(source: HeadInput, functionals: Sequence[Functional], against: HeadInput | None) -> None:
    if any(f.needs_against for f in functionals) and against is None:
        names = ", ".join(f.name for f in functionals if f.needs_against)
        raise UsageError(f"{names}: no second model was given", where="head", remedy="pass `against`")
    if against is None or against.weight is None or source.weight is None:
        return
    mine, theirs = source.weight.shape[0], against.weight.shape[0]
    if mine != theirs:
        raise UsageError(
            f"vocabularies differ: {mine} and {theirs} tokens",
            where="head",
            remedy="use a reference or teacher with the same vocabulary",
        )


# ---- tiles over the vocabulary ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiling:
    """How the tiled head runs.

    Attributes:
        dtype: Of the matrix products. Everything else is in at least fp32.
        eager_gradient: The head is frozen: the forward pass also computes d log-prob / d hidden (one product more), and
            the backward pass none.
        keep: A backward pass follows that wants the products again.
        want_squares: log Σ p² too, without gradient.
    """

    transform: LogitTransform
    temperature: float
    want_entropy: bool
    dtype: torch.dtype
    eager_gradient: bool = False
    keep: bool = False
    want_squares: bool = False

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.dtype, torch.float32)

    def has_kernel(self, hidden: Tensor, bias: Tensor | None) -> bool:
        """Whether tiles of products are read as they are, without a tile of logits."""
        plain = self.transform.softcap is None and bias is None
        return (
            plain
            and not (self.want_entropy or self.want_squares)
            and hidden.device.type == "cpu"
            and calls.serves(self.dtype)
        )

    @property
    def factor(self) -> float:
        """d logits / d products where there is no softcap."""
        return self.transform.scale / self.temperature

    def transform_(self, z: Tensor) -> Tensor:
        """Products → logits, in place."""
        cap = self.transform.softcap
        if cap is not None:
            return z.mul_(self.transform.scale / cap).tanh_().mul_(cap / self.temperature)
        return z if self.factor == 1.0 else z.mul_(self.factor)

    def chain_(self, dz: Tensor, z: Tensor) -> Tensor:
        """d/d logits → d/d products, in place; z: the logits."""
        cap = self.transform.softcap
        if cap is not None:
            return dz.mul_((z * (self.temperature / cap)).square_().neg_().add_(1.0).mul_(self.factor))
        return dz if self.factor == 1.0 else dz.mul_(self.factor)


class _Tiles:
    """Walks (positions, vocabulary) tile by tile with buffers that are reused, so that no tile costs page faults.

    `kept`, if given, holds all products (S · V) of the compute dtype, tile after tile, where they are few enough: forward
    writes them, backward reads them instead of multiplying again. They are what the matrix product gave, so nothing changes.
    """

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        t: _Tiling,
        kept: Tensor | None = None,
        *,
        ready: bool = False,
    ) -> None:
        self.h, self.weight, self.bias, self.targets, self.t = hidden.to(t.dtype), weight, bias, targets, t
        self._kept, self._ready = kept, ready
        self.count, self.vocabulary = hidden.shape[0], weight.shape[0]
        self.rows = min(self.count, _ROWS)
        area = _TILE if hidden.device.type == "cpu" else 16 * _TILE
        self.columns = min(max(512, area // max(self.rows, 1)) // 256 * 256, self.vocabulary)
        size = self.rows * self.columns
        self._raw = hidden.new_empty(size, dtype=t.dtype)
        self._z = self._raw if t.dtype == t.wide else hidden.new_empty(size, dtype=t.wide)
        self._p = hidden.new_empty(size, dtype=t.wide)

    @property
    def across(self) -> int:
        """Tiles side by side over the vocabulary."""
        return -(-self.vocabulary // self.columns)

    def columns_of(self) -> Iterator[tuple[int, slice, Tensor]]:
        """(number, columns, their weight rows in the compute dtype) of every stripe of the vocabulary."""
        for i, left in enumerate(range(0, self.vocabulary, self.columns)):
            stripe = slice(left, min(left + self.columns, self.vocabulary))
            yield i, stripe, self.weight[stripe].to(self.t.dtype)

    def rows_of(self) -> Iterator[slice]:
        for top in range(0, self.count, max(self.rows, 1)):
            yield slice(top, min(top + self.rows, self.count))

    def products(self, part: slice, stripe: slice, weight: Tensor) -> Tensor:
        """A tile of products, in the compute dtype."""
        if self._kept is None:
            raw = self._shaped(self._raw, part, stripe)
        else:
            raw = self._shaped(
                self._kept[self.count * stripe.start + part.start * (stripe.stop - stripe.start) :], part, stripe
            )
        if not self._ready:
            torch.mm(self.h[part], weight.t(), out=raw)
        return raw

    def logits(self, part: slice, stripe: slice, weight: Tensor) -> Tensor:
        """A tile of logits, at least fp32, in the shared buffer."""
        z = self._shaped(self._z, part, stripe)
        raw = self.products(part, stripe, weight)
        if self._kept is not None or self._raw is not self._z:
            z.copy_(raw)
        if self.bias is not None:
            z += self.bias[stripe].to(z.dtype)
        return self.t.transform_(z)

    def softmax(self, z: Tensor) -> Tensor:
        """Softmax within the tile, in the shared buffer."""
        return torch.softmax(z, 1, out=self._p[: z.numel()].view(z.shape))

    def lower(self, dz: Tensor) -> Tensor:
        """The tile in the compute dtype; overwrites the products."""
        return dz if dz.dtype == self.t.dtype else self._raw[: dz.numel()].view(dz.shape).copy_(dz)

    def read(
        self, part: slice, stripe: slice, weight: Tensor, lse: Tensor, picked: Tensor, pull: Tensor | None
    ) -> None:
        """By kernel, a tile into the running sums of its rows: log-sum-exp, target's logit, and Σ p·w if wanted."""
        raw, targets, factor = self.products(part, stripe, weight), self.targets[part], self.t.factor
        before = None if pull is None else lse.clone()
        calls.read_tile(raw, targets, stripe.start, factor, lse, picked)
        if pull is not None and before is not None:
            nowhere, minus = torch.full_like(targets, -1), torch.full_like(lse, -1.0 / factor)
            p = calls.tile_gradient(raw, nowhere, 0, factor, lse, minus, self._shaped(self._raw, part, stripe))
            pull.mul_((before - lse).exp_()[:, None]).add_(torch.mm(p, weight))

    def gradient(self, part: slice, stripe: slice, weight: Tensor, lse: Tensor, grad: Tensor) -> Tensor:
        """grad · d log-prob / d products of a tile, by kernel, in the compute dtype; overwrites the products' buffer."""
        raw, out = self.products(part, stripe, weight), self._shaped(self._raw, part, stripe)
        return calls.tile_gradient(raw, self.targets[part], stripe.start, self.t.factor, lse[part], grad[part], out)

    def pull(
        self, z: Tensor, part: slice, stripe: slice, share: Tensor, grad: Tensor, entropy: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """grad · d log-prob / d logits of a tile, and the entropy's at (its gradient, Σ p·z); overwrites the softmax."""
        p = self.softmax(z)
        if entropy is None:
            p *= (-grad * share)[:, None]
        else:
            own, mean = entropy
            p *= (z * (-own * share)[:, None]).add_(((own * mean - grad) * share)[:, None])
        where, inside = self.local_targets(part, stripe)
        return p.scatter_add_(1, where, torch.where(inside, grad[:, None], 0.0))

    def local_targets(self, part: slice, stripe: slice) -> tuple[Tensor, Tensor]:
        """(n, 1) column of each position's target within the stripe (clamped), and (n, 1) whether it lies there."""
        local = self.targets[part, None] - stripe.start
        width = stripe.stop - stripe.start
        return local.clamp(0, width - 1), (local >= 0) & (local < width)

    @staticmethod
    def _shaped(buffer: Tensor, part: slice, stripe: slice) -> Tensor:
        rows, columns = part.stop - part.start, stripe.stop - stripe.start
        return buffer[: rows * columns].view(rows, columns)


def _reserve(hidden: Tensor, weight: Tensor, t: _Tiling) -> Tensor | None:
    """Room for the products of a forward pass whose backward will read them; None where they are too many."""
    size = hidden.shape[0] * weight.shape[0]
    fits = t.keep and size * t.dtype.itemsize <= _find_keep_limit(hidden.device)
    return hidden.new_empty(size, dtype=t.dtype) if fits else None


def _find_keep_limit(device: torch.device) -> int:
    """Bytes of products that may be kept on a device. Kept or computed again, they are the same bits."""
    return _KEEP if device.type != "cuda" else max(_KEEP, _find_memory(device) // _KEEP_SHARE)


@cache
def _find_memory(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[1]


class _TiledHead(torch.autograd.Function):
    """(hidden, weight, bias, targets) → log-probs, entropy and log Σ p² (empty if not wanted)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, t: _Tiling
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            kept = _reserve(hidden, weight, t)
            tiles = _Tiles(hidden, weight, bias, targets, t, kept)
            count = tiles.count
            lse = hidden.new_full((count,), float("-inf"), dtype=t.wide)
            picked = hidden.new_zeros((count,), dtype=t.wide)
            mean = hidden.new_zeros((count if t.want_entropy else 0,), dtype=t.wide)  # running Σ p·z
            squares = hidden.new_zeros((count if t.want_squares else 0,), dtype=t.wide)  # running Σ p²
            local_lse = hidden.new_empty((tiles.across, count), dtype=t.wide)
            pull = hidden.new_zeros(hidden.shape, dtype=t.wide) if t.eager_gradient else None  # running Σ p·w
            ctx.by_kernel = t.has_kernel(hidden, bias)
            for i, stripe, w in tiles.columns_of():
                for part in tiles.rows_of():
                    if ctx.by_kernel:
                        tiles.read(part, stripe, w, lse[part], picked[part], None if pull is None else pull[part])
                        continue
                    z = tiles.logits(part, stripe, w)
                    where, inside = tiles.local_targets(part, stripe)
                    picked[part] += torch.where(inside, z.gather(1, where), 0.0)[:, 0]
                    top = z.amax(1)
                    p = tiles.softmax(z)
                    here = top.sub_(p.amax(1).log_())  # the largest probability is exp(max − lse)
                    both = torch.logaddexp(lse[part], here)
                    before, now = (lse[part] - both).exp_(), (here - both).exp_()
                    if t.want_entropy:
                        mean[part] = mean[part] * before + (p * z).sum(1) * now
                    if t.want_squares:
                        own = torch.linalg.vector_norm(p, dim=1)
                        squares[part] = squares[part] * before.square() + (own * now).square_()
                    if pull is not None:
                        gained = torch.mm(tiles.lower(p), w)
                        pull[part] = pull[part].mul_(before[:, None]).addcmul_(gained.to(t.wide), now[:, None])
                    lse[part] = both
                    local_lse[i, part] = here
            if pull is not None:
                pull = (weight[targets].to(t.wide) - pull).mul_(t.factor).to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, local_lse, mean, pull, kept)
        ctx.tiling = t
        squares.log_()
        ctx.mark_non_differentiable(squares)
        return picked - lse, (lse - mean if t.want_entropy else mean), squares

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor, _: Any) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, lse, local_lse, mean, pull, kept = ctx.saved_tensors
        t: _Tiling = ctx.tiling
        if pull is not None:
            return (pull * grad[:, None].to(pull.dtype), None, None, None, None)
        grad = grad.contiguous()
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        tiles = _Tiles(hidden, weight, bias, targets, t, kept, ready=kept is not None)
        d_hidden = hidden.new_zeros(hidden.shape, dtype=t.wide) if need_hidden else None
        d_weight = torch.empty_like(weight) if need_weight else None
        d_bias = weight.new_zeros(tiles.vocabulary, dtype=t.wide) if need_bias and bias is not None else None
        for i, stripe, w in tiles.columns_of():
            stripe_sum: Tensor | None = None
            for part in tiles.rows_of():
                if ctx.by_kernel:
                    low = tiles.gradient(part, stripe, w, lse, grad)
                else:
                    z = tiles.logits(part, stripe, w)
                    share = (local_lse[i, part] - lse[part]).exp_()  # the tile's part of all probability
                    entropy_pull = (grad_entropy[part], mean[part]) if t.want_entropy else None
                    dz = t.chain_(tiles.pull(z, part, stripe, share, grad[part], entropy_pull), z)
                    if d_bias is not None:
                        d_bias[stripe] += dz.sum(0)
                    low = tiles.lower(dz)
                if d_hidden is not None:
                    d_hidden[part] += torch.mm(low, w)
                if d_weight is not None:
                    product = torch.mm(low.t(), tiles.h[part])
                    stripe_sum = product if stripe_sum is None else product.to(t.wide).add_(stripe_sum)
            if d_weight is not None:
                d_weight[stripe] = stripe_sum if stripe_sum is not None else 0.0
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )

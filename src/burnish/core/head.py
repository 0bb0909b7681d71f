"""The language-model head without logits: log-probabilities and functionals, tile by tile, recomputed in backward.

Log-probabilities and entropy walk the vocabulary in tiles (all rows × some columns), keeping a running log-sum-exp, so
that the gradient of each weight row is one matrix product. Functionals need whole rows and walk blocks of positions.
Neither ever holds a (positions, vocabulary) tensor.

Shapes: S positions, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from burnish.errors import UsageError

BlockFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
_TILE = 1 << 21  # elements of a logits tile; 8 MB in fp32 stays in the last-level cache
_ROWS = 4096  # positions of a tile at most


@dataclass(frozen=True, slots=True)
class LogitTransform:
    """What a model does to its logits after the matrix product: z → c·tanh(scale·z / c), without softcap scale·z."""

    scale: float = 1.0
    softcap: float | None = None

    @property
    def is_identity(self) -> bool:
        return self.scale == 1.0 and self.softcap is None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


@dataclass(frozen=True)
class Functional:
    """A number per position from the distribution over the vocabulary.

    Attributes:
        name: Its key in the result.
        fn: fn(logits (B, V), targets (B,), against (B, V) or None) → (B,); at least fp32, differentiable in `logits`.
        needs_against: It reads a second model's logits.
    """

    name: str
    fn: BlockFunction
    needs_against: bool = False


@dataclass(frozen=True)
class HeadInput:
    """Hidden states at the scored positions with the head that reads them.

    Attributes:
        hidden: (S, h). weight: (V, h). bias: (V,) or None.
        module: Called on (B, h) in place of weight and bias (adapters or quantisation on the head).
    """

    hidden: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None
    transform: LogitTransform = LogitTransform()
    module: Callable[[Tensor], Tensor] | None = None

    def logits(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """(stop − start, V) logits, at least fp32, divided by the temperature."""
        hidden = self.hidden[start:stop]
        if self.module is not None:
            raw = self.module(hidden)
        else:
            assert self.weight is not None
            dtype = _compute_dtype(hidden, self.weight)
            raw = hidden.to(dtype) @ self.weight.to(dtype).t()
            if self.bias is not None:
                raw = raw + self.bias.to(dtype)
        logits = self.transform(raw.to(torch.promote_types(raw.dtype, torch.float32)))
        return logits if temperature == 1.0 else logits / temperature


def compute_entropy(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    """(B, V) → (B,) entropy in nats."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def _compute_target_logprob(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


ENTROPY = Functional("entropy", compute_entropy)
_LOGPROBS = Functional("logprobs", _compute_target_logprob)


def compute_token_logprobs(
    hidden: Tensor,
    weight: Tensor | None,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    transform: LogitTransform = LogitTransform(),
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
    if not functionals and module is None:
        assert weight is not None
        settings = _Tiling(transform, temperature, want_entropy, _compute_dtype(hidden, weight))
        logprobs, entropy = _TiledHead.apply(hidden, weight, bias, targets, settings)  # type: ignore[misc]
        return {"logprobs": logprobs, "entropy": entropy} if want_entropy else {"logprobs": logprobs}
    wanted = ([_LOGPROBS] if want_logprobs else []) + ([ENTROPY] if want_entropy else []) + list(functionals)
    columns = _run_blocks(source, targets, wanted, temperature, against, block)
    return {f.name: column for f, column in zip(wanted, columns, strict=True)}


def _compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's matrix product: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _check_against(source: HeadInput, functionals: Sequence[Functional], against: HeadInput | None) -> None:
    if any(f.needs_against for f in functionals) and against is None:
        names = ", ".join(f.name for f in functionals if f.needs_against)
        raise UsageError(f"{names}: no second model was given", where="head", remedy="pass `against`")
    if against is None or against.weight is None or source.weight is None:
        return
    mine, theirs = source.weight.shape[0], against.weight.shape[0]
    if mine != theirs:
        raise UsageError(
            f"vocabularies differ: {mine} and {theirs} tokens", where="head",
            remedy="use a reference or teacher with the same vocabulary",
        )  # fmt: skip


# ---- tiles over the vocabulary ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Tiling:
    transform: LogitTransform
    temperature: float
    want_entropy: bool
    dtype: torch.dtype

    def columns(self, rows: int, vocabulary: int) -> int:
        """Columns of a tile."""
        fit = max(512, _TILE // max(rows, 1)) // 256 * 256
        return min(fit, vocabulary)

    def tile(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of a tile, at least fp32, and d logits / d products where that is no constant."""
        raw = torch.mm(hidden, weight.t())
        z = raw.to(torch.promote_types(raw.dtype, torch.float32))
        if bias is not None:
            z += bias.to(z.dtype)
        slope = None
        if self.transform.softcap is not None:
            cap = self.transform.softcap
            z = z.mul_(self.transform.scale / cap).tanh_()
            slope = (1 - z * z).mul_(self.transform.scale / self.temperature)
            z = z.mul_(cap / self.temperature)
        elif self.factor != 1.0:
            z = z.mul_(self.factor)
        return z, slope

    @property
    def factor(self) -> float:
        return self.transform.scale / self.temperature


class _TiledHead(torch.autograd.Function):
    """(hidden, weight, bias, targets) → log-probs, entropy (empty if not wanted)."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, t: _Tiling
    ) -> tuple[Tensor, Tensor]:
        h = hidden.to(t.dtype)
        wide = torch.promote_types(t.dtype, torch.float32)
        rows = h.shape[0]
        lse = h.new_full((rows,), float("-inf"), dtype=wide)
        picked = h.new_zeros((rows,), dtype=wide)
        mean = h.new_zeros((rows,) if t.want_entropy else (0,), dtype=wide)  # running Σ p·z
        for top in range(0, rows, _ROWS):
            stop = min(top + _ROWS, rows)
            part = slice(top, stop)
            step = t.columns(stop - top, weight.shape[0])
            for left in range(0, weight.shape[0], step):
                w = weight[left : left + step]
                z, _ = t.tile(h[part], w.to(t.dtype), None if bias is None else bias[left : left + step])
                _read_targets(z, targets[part], left, picked[part])
                top_z = z.amax(1)
                p = torch.softmax(z, 1)
                here = top_z - p.amax(1).log_()  # the largest probability is exp(max − lse)
                if t.want_entropy:
                    _update_mean(mean[part], lse[part], here, (p * z).sum(1))
                lse[part] = torch.logaddexp(lse[part], here)
        ctx.save_for_backward(hidden, weight, bias, targets, lse, mean)
        ctx.tiling = t
        return picked - lse, (lse - mean if t.want_entropy else mean)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, grad_entropy: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        hidden, weight, bias, targets, lse, mean = ctx.saved_tensors
        t: _Tiling = ctx.tiling
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        h = hidden.to(t.dtype)
        wide = lse.dtype
        rows, vocabulary = h.shape[0], weight.shape[0]
        d_hidden = torch.zeros(hidden.shape, dtype=wide, device=hidden.device) if need_hidden else None
        d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=weight.device) if need_weight else None
        d_bias = torch.zeros(vocabulary, dtype=wide, device=weight.device) if need_bias and bias is not None else None
        if d_weight is not None and rows == 0:
            d_weight.zero_()
        for top in range(0, rows, _ROWS):
            stop = min(top + _ROWS, rows)
            part = slice(top, stop)
            step = t.columns(stop - top, vocabulary)
            for left in range(0, vocabulary, step):
                tile = slice(left, left + step)
                w = weight[tile].to(t.dtype)
                z, slope = t.tile(h[part], w, None if bias is None else bias[tile])
                dz = _tile_gradient(z, left, targets[part], lse[part], mean, grad[part], grad_entropy, part, t)
                dz = dz.mul_(slope) if slope is not None else dz
                if d_bias is not None:
                    d_bias[tile] += dz.sum(0)
                low = dz.to(t.dtype)
                if d_hidden is not None:
                    d_hidden[part] += torch.mm(low, w)
                if d_weight is not None:
                    product = torch.mm(low.t(), h[part])
                    d_weight[tile] = product if top == 0 else d_weight[tile] + product
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            d_weight,
            None if d_bias is None or bias is None else d_bias.to(bias.dtype),
            None,
            None,
        )


def _read_targets(z: Tensor, targets: Tensor, left: int, into: Tensor) -> None:
    """Add the tile's logits of those targets that lie in its columns."""
    local = targets - left
    inside = (local >= 0) & (local < z.shape[1])
    value = z.gather(1, local.clamp(0, z.shape[1] - 1)[:, None])[:, 0]
    into += torch.where(inside, value, 0.0)


def _update_mean(mean: Tensor, lse: Tensor, here: Tensor, tile_mean: Tensor) -> None:
    """Running Σ p·z, from the earlier tiles' (mean, lse) and this tile's."""
    both = torch.logaddexp(lse, here)
    mean.copy_(mean * (lse - both).exp() + tile_mean * (here - both).exp())


def _tile_gradient(
    z: Tensor, left: int, targets: Tensor, lse: Tensor, mean: Tensor, grad: Tensor, grad_entropy: Tensor, part: slice,
    t: _Tiling,
) -> Tensor:  # fmt: skip
    """d loss / d products of a tile without the softcap's slope: g·(onehot − p) − gₑ·p·(z − Σ p·z), times the factor."""
    p = torch.exp(z - lse[:, None])
    if t.want_entropy:
        dz = p * ((z - mean[part][:, None]).mul_(-grad_entropy[part][:, None]) - grad[:, None])
    else:
        dz = p.mul_(-grad[:, None])
    local = targets - left
    inside = (local >= 0) & (local < z.shape[1])
    dz.scatter_add_(1, local.clamp(0, z.shape[1] - 1)[:, None], torch.where(inside, grad, 0.0)[:, None])
    return dz if t.transform.softcap is not None or t.factor == 1.0 else dz.mul_(t.factor)


# ---- whole rows, a block of positions at a time -------------------------------------------------------------------


def _run_blocks(
    source: HeadInput,
    targets: Tensor,
    wanted: Sequence[Functional],
    temperature: float,
    against: HeadInput | None,
    block: int,
) -> list[Tensor]:
    """(S,) per functional; each block of logits is freed after use and recomputed in backward."""

    def run(hidden: Tensor, start: int, stop: int) -> tuple[Tensor, ...]:
        part = HeadInput(hidden, source.weight, source.bias, source.transform, source.module)
        logits = part.logits(0, stop - start, temperature)
        other = None
        if against is not None:
            with torch.no_grad():
                other = against.logits(start, stop, temperature)
            if other.shape != logits.shape:
                raise UsageError(
                    f"vocabularies differ: {logits.shape[1]} and {other.shape[1]} tokens", where="head",
                    remedy="use a reference or teacher with the same vocabulary",
                )  # fmt: skip
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

"""What a language-model head reads, what a model does to its logits, and what may be asked of them.

Shapes: S positions, B some of them, h hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

BlockFunction = Callable[[Tensor, Tensor, Tensor | None], Tensor]
Pull = Callable[[Tensor, Tensor, Tensor | None, Tensor], Tensor]


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


IDENTITY = LogitTransform()


@dataclass(frozen=True)
class Functional:
    """A number per position from the distribution over the vocabulary.

    Attributes:
        name: Its key in the result.
        fn: fn(logits (B, V), targets (B,), against (B, V) or None) → (B,); at least fp32, differentiable in `logits`.
        needs_against: It reads a second model's logits.
        pull: Its gradient in closed form: pull(softmax of the logits (B, V), not to be changed; targets; against; d/d result
            (B,)) → d/d logits (B, V), newly made. None: autograd through `fn`.
    """

    name: str
    fn: BlockFunction
    needs_against: bool = False
    pull: Pull | None = None


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
    transform: LogitTransform = IDENTITY
    module: Callable[[Tensor], Tensor] | None = None

    def products(self, start: int, stop: int) -> Tensor:
        """(stop − start, V): what the head's matrix product gives, in its type."""
        hidden = self.hidden[start:stop]
        if self.module is not None:
            return self.module(hidden)
        assert self.weight is not None
        dtype = compute_dtype(hidden, self.weight)
        raw = hidden.to(dtype) @ self.weight.to(dtype).t()
        return raw if self.bias is None else raw + self.bias.to(dtype)

    def finish(self, products: Tensor, temperature: float = 1.0) -> Tensor:
        """Products → logits, at least fp32, divided by the temperature."""
        logits = self.transform(products.to(torch.promote_types(products.dtype, torch.float32)))
        return logits if temperature == 1.0 else logits / temperature

    def logits(self, start: int, stop: int, temperature: float = 1.0) -> Tensor:
        """(stop − start, V) logits, at least fp32, divided by the temperature."""
        return self.finish(self.products(start, stop), temperature)


def compute_entropy(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    """(B, V) → (B,) entropy in nats."""
    logp = torch.log_softmax(logits, dim=-1)
    return -(logp.exp() * logp).sum(-1)


def _compute_target_logprob(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    return logits.gather(1, targets[:, None])[:, 0] - torch.logsumexp(logits, dim=-1)


def _pull_target_logprob(p: Tensor, targets: Tensor, against: Tensor | None, grad: Tensor) -> Tensor:
    return (p * -grad[:, None]).scatter_add_(1, targets[:, None], grad[:, None])


def _compute_against_logprob(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    assert against is not None
    return _compute_target_logprob(against, targets, None)


def _compute_log_square_sum(logits: Tensor, targets: Tensor, against: Tensor | None) -> Tensor:
    with torch.no_grad():
        return torch.logsumexp(2 * torch.log_softmax(logits, dim=-1), dim=-1)


ENTROPY = Functional("entropy", compute_entropy)
# log Σ_v p(v)², the log of the probability that two draws agree; no gradient. Alone it is computed tile by tile.
LOG_SQUARE_SUM = Functional("log_square_sum", _compute_log_square_sum)
AGAINST_LOGPROBS = Functional("against_logprobs", _compute_against_logprob, needs_against=True)
LOGPROBS = Functional("logprobs", _compute_target_logprob, pull=_pull_target_logprob)


def compute_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype of the head's matrix product: autocast's where it is on, else the wider of the two."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return torch.promote_types(hidden.dtype, weight.dtype)

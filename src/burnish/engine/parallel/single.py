"""One process: nothing is exchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from burnish.engine.runtime import Runtime


class Single:
    """The models as they are, on this process's device."""

    kind = "single"

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def prepare(self, models: Mapping[str, nn.Module]) -> None:
        """They stay as they are."""

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def backward(self, tensors: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> None:
        """Back-propagate; gradients add up on the parameters."""
        torch.autograd.backward(list(tensors), None if grads is None else list(grads))

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """Undo the loss scale; returns (), the gradients' L2 norm."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if scale is not None:
            for grad in grads:
                grad.mul_(1.0 / scale)
        return get_total_norm(grads)

    def clip_and_step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float, norm: Tensor
    ) -> None:
        """Scale the gradients to at most `max_norm` (0: not at all) and let the optimizer step."""
        if max_norm:
            clip_grads_with_norm_(parameters, max_norm, norm)
        optimizer.step()

    def discard(self, parameters: Sequence[Tensor]) -> None:
        """Drop all gradients."""
        for p in parameters:
            p.grad = None

    def identity(self) -> dict[str, Any]:
        """One process."""
        return {"strategy": self.kind, "ranks": 1}

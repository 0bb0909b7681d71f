"""Equal copies of the models on all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from burnish.engine.parallel.ordered import sum_in_any_order, sum_in_rank_order
from burnish.engine.parallel.single import Single
from burnish.engine.runtime import Runtime


class Replicated(Single):
    """Every rank holds everything; the gradient is summed over ranks after the last backward.

    A parameter that got a gradient on no rank keeps none, as on one process; one that got it on some takes part with zeros on
    the others.

    Args:
        ordered: Add in rank order, equal to the bit each time; else in the order that the backend chooses.
    """

    kind = "replicated"

    def __init__(self, runtime: Runtime, *, ordered: bool) -> None:
        super().__init__(runtime)
        self.ordered = ordered

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """Sum the gradients over ranks and undo the loss scale; returns (), their L2 norm."""
        used = self.runtime.any_of([p.grad is not None for p in parameters])
        grads = []
        for p in (p for p, has in zip(parameters, used, strict=True) if has):
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.contiguous()
            grads.append(p.grad)
        if self.ordered:
            sum_in_rank_order(grads)
        else:
            sum_in_any_order(grads)
        return super().finish(parameters, scale)

    def identity(self) -> dict[str, Any]:
        """The number of ranks and the order of sums."""
        order = "in rank order" if self.ordered else "as the backend does"
        return {"strategy": self.kind, "ranks": self.runtime.world, "sums": order}

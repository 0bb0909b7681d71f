"""Equal copies of the models on all ranks; gradients are added in rank order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from burnish.engine.parallel.single import Single


class Replicated(Single):
    """Every rank holds everything; sums over ranks are added in rank order, equal to the bit on all ranks."""

    kind = "replicated"

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """Sum the gradients over ranks and undo the loss scale; returns (), their L2 norm."""
        self.runtime.sum_gradients(parameters)
        return super().finish(parameters, scale)

    def identity(self) -> dict[str, Any]:
        """The number of ranks."""
        return {"strategy": self.kind, "ranks": self.runtime.world}

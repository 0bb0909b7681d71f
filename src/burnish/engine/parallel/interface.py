"""How the models of a stage lie over its ranks: what a strategy must do for the step, the update and checkpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from burnish.engine.runtime import Runtime


class Parallel(Protocol):
    """A strategy: one process, equal copies, or shards.

    Attributes:
        kind: "single", "replicated" or "fsdp2".
        runtime: The ranks, and the control traffic between them.
    """

    kind: str
    runtime: Runtime

    def prepare(self, models: Mapping[str, nn.Module]) -> None:
        """Lay the models over the ranks, in place; before parameters are taken and the optimizer is built."""
        ...

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Around forward and backward of a micro-batch.

        Args:
            last: It is the step's last one.
        """
        ...

    def backward(self, tensors: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> None:
        """Back-propagate; gradients add up on the parameters."""
        ...

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """After the step's last backward: gradients are summed over ranks and unscaled; returns (), their L2 norm, on the
        device and equal on all ranks."""
        ...

    def clip_and_step(
        self, optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor], max_norm: float, norm: Tensor
    ) -> None:
        """Scale the gradients to at most `max_norm` and let the optimizer step.

        Args:
            max_norm: 0: no clipping.
            norm: As `finish` gave it.
        """
        ...

    def discard(self, parameters: Sequence[Tensor]) -> None:
        """Drop all gradients."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the last bits of sums over ranks; noted in checkpoints."""
        ...

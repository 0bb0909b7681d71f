"""How the models of a stage lie over its ranks: what a strategy must do for the step, the update, checkpoints and export."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from burnish.engine.runtime import Runtime

T = TypeVar("T")


class Parallel(Protocol):
    """A strategy: one process, equal copies, or shards.

    Attributes:
        kind: "single", "replicated" or "fsdp2".
        sharded: Each rank holds a part of the parameters; every forward of a model then needs all ranks.
        runtime: The ranks, and the control traffic between them.
    """

    kind: str
    sharded: bool
    runtime: Runtime

    def build(self, make: Callable[[], T]) -> T:
        """What `make` builds; a sharded strategy lets rank 0 alone make it and leaves the parameters of the others on the
        meta device until `prepare`.

        Raises:
            BurnishError: As `make` raised it, on every rank.
        """
        ...

    def prepare(self, models: Mapping[str, nn.Module]) -> None:
        """Move the models to the device and lay them over the ranks, in place; before parameters are taken and the optimizer
        is built."""
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

    def save_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]], folder: Path | None) -> None:
        """Write the tensors of a checkpoint; every rank must come here.

        Args:
            tensors: Name of a file → its tensors.
            folder: Where to, on rank 0; None on the others.
        """
        ...

    def load_tensors(self, folder: Path, parameters: Mapping[str, Tensor], *, only: str = "") -> dict[str, Tensor]:
        """The tensors of a checkpoint, whatever strategy wrote it, laid out as this one needs them; every rank must come here.

        Args:
            parameters: The parameters in training by name: a tensor "<what>/<name>" of a parameter's shape is laid out as
                that parameter.
            only: Prefix of the names that are wanted.
        """
        ...

    def full_tensors(self, model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Parameters and buffers of a model, one after the other, whole, on rank 0; the other ranks must exhaust it too, and
        get none."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides the last bits of sums over ranks; noted in checkpoints."""
        ...

"""One process: nothing is exchanged."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from burnish.engine.parallel.files import read_tensors, write_tensors
from burnish.engine.runtime import Runtime

T = TypeVar("T")


def scale_in_place(tensors: Sequence[Tensor], factor: float | Tensor) -> None:
    """Multiply all tensors by a factor, in one launch where the device has it."""
    torch._foreach_mul_(list(tensors), factor)  # pyright: ignore[reportPrivateImportUsage]


class Single:
    """The models as they are, on this process's device."""

    kind = "single"
    sharded = False

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime

    def build(self, make: Callable[[], T]) -> T:
        """Each rank makes its own."""
        return make()

    def prepare(self, models: Mapping[str, nn.Module]) -> None:
        """Move them to the device."""
        for model in models.values():
            model.to(self.runtime.device)

    def micro(self, last: bool) -> AbstractContextManager[None]:
        """Nothing to do."""
        return nullcontext()

    def backward(self, tensors: Sequence[Tensor], grads: Sequence[Tensor] | None = None) -> None:
        """Back-propagate; gradients add up on the parameters."""
        torch.autograd.backward(list(tensors), None if grads is None else list(grads))

    def finish(self, parameters: Sequence[Tensor], scale: float | None) -> Tensor:
        """Undo the loss scale; returns (), the gradients' L2 norm."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if scale is not None and grads:
            scale_in_place(grads, 1.0 / scale)
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

    def save_tensors(self, tensors: Mapping[str, Mapping[str, Tensor]], folder: Path | None) -> None:
        """Rank 0 writes a file for each part."""
        if folder is not None:
            for name, part in tensors.items():
                write_tensors(folder / f"{name}.safetensors", part)

    def load_tensors(self, folder: Path, parameters: Mapping[str, Tensor], *, only: str = "") -> dict[str, Tensor]:
        """Whole tensors, on the CPU."""
        return read_tensors(folder, only)

    def full_tensors(self, model: nn.Module, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """The model's own tensors, on rank 0."""
        held = model.state_dict(keep_vars=True) if self.runtime.is_main else {}
        yield from ((name, held[name].detach()) for name in names if name in held)

    def identity(self) -> dict[str, Any]:
        """One process."""
        return {"strategy": self.kind, "ranks": 1}

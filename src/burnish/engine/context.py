"""What stays the same for all steps of a stage: models, method, processes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from burnish.core.batch import Outputs, PackedBatch
from burnish.core.logits import Functional, HeadInput
from burnish.engine.method import Method
from burnish.engine.parallel.interface import Parallel
from burnish.engine.runtime import Runtime


class ModelLike(Protocol):
    """What the engine needs of a model: one call from a batch to flat outputs, and its two modes."""

    training: bool

    def train(self, mode: bool = True) -> Any: ...

    def __call__(
        self,
        batch: PackedBatch,
        want: frozenset[str],
        *,
        functionals: Sequence[Functional] = (),
        against: HeadInput | None = None,
    ) -> Outputs: ...


class ReferenceLike(Protocol):
    """A reference model, without gradient: (S,) log-probs of the scored tokens, or what its head reads."""

    def logprobs(self, batch: PackedBatch) -> Tensor: ...

    def head_input(self, batch: PackedBatch) -> HeadInput: ...


class Stopped(Exception):
    """A signal arrived between micro-batches; the step is dropped, no state has changed."""


@dataclass
class StepContext:
    """What a step needs beside its examples.

    Attributes:
        models: Name → model; "policy" computes the functionals.
        parameters: What the optimizer moves, of all models.
        reference: For methods that read one and whose examples carry no `ref_logprobs` column.
        reseed: The models have dropout: its generator is set anew for each micro-batch.
        scale: fp16 loss scale; None when not fp16.
        should_stop: Asked between micro-batches; true drops the step.
    """

    models: Mapping[str, ModelLike]
    method: Method
    parallel: Parallel
    parameters: Sequence[Tensor]
    seed: int
    reference: ReferenceLike | None = None
    reseed: bool = True
    scale: float | None = None
    should_stop: Callable[[], bool] = lambda: False

    @property
    def runtime(self) -> Runtime:
        """The ranks of the run."""
        return self.parallel.runtime

    @property
    def can_tell_others(self) -> bool:
        """A rank that runs out of memory can say so: equal copies meet only between the passes of a step. Where models are
        sharded, every forward needs all ranks, and the others would wait for ever.
        """
        return self.runtime.world > 1 and not self.parallel.sharded

    def train(self, mode: bool) -> None:
        """Switch all models to training or evaluation mode."""
        for model in self.models.values():
            model.train(mode)

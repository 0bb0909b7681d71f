"""What a stage trains with, and what became of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from burnish.config.batch import compute_batch
from burnish.config.train import TrainSettings
from burnish.core.group import Group
from burnish.engine.context import ReferenceLike
from burnish.engine.method import Method
from burnish.engine.parallel.interface import Parallel
from burnish.engine.runtime import Runtime
from burnish.engine.source import OfflineSource, Source


@dataclass
class TrainJob:
    """All that a stage needs to train; the pipeline puts it together.

    Attributes:
        models: Name → model (a `models.policy.Policy`, or any module with its call); "policy" is always there.
        source: Where the examples of each step come from.
        trainable: "<model>.<parameter>" → parameter that the optimizer moves.
        rates: Model → its own peak learning rate, where it has one.
        no_decay, head: Names without weight decay; names of a new head.
        reference: For methods that need one and whose groups carry no `ref_logprobs` column.
        parallel: How the models lie over the ranks; None: one process, or equal copies.
        stage_dir: Where metrics and checkpoints go; None keeps nothing (benchmarks, tests).
        stamp: Goes into each checkpoint's manifest; on resume it must be equal.
        sinks: Called with each metrics row.
        best_metric: (name, greater is better) by default for the best checkpoint.
        export_bytes: What the result will take on the disk; part of the figure printed at the start.
    """

    models: Mapping[str, Any]
    method: Method
    settings: TrainSettings
    source: Source
    held_out: Sequence[Group]
    trainable: dict[str, nn.Parameter]
    runtime: Runtime
    parallel: Parallel | None = None
    stage_dir: Path | None = None
    rates: Mapping[str, float] = field(default_factory=dict)
    no_decay: frozenset[str] = frozenset()
    head: frozenset[str] = frozenset()
    reference: ReferenceLike | None = None
    resume: bool = False
    resume_from: Path | None = None
    fp16: bool = False
    stamp: dict[str, Any] = field(default_factory=dict)
    sinks: Sequence[Callable[[Mapping[str, Any]], None]] = ()
    label: str = ""
    dropout: bool = True
    export_bytes: int = 0
    best_metric: tuple[str, bool] = ("eval_loss", False)
    on_step: Callable[[int, Mapping[str, float], float], None] | None = None

    @property
    def run_id(self) -> str | None:
        """Id of the run that the stage belongs to; None outside one."""
        return self.stamp.get("run_id")


@dataclass
class TrainOutcome:
    """What became of a stage: counts, last figures, and whether the best or the last parameters are in the model."""

    steps: int
    updates: int
    tokens: int
    seconds: float
    figures: dict[str, float]
    evaluation: dict[str, float]
    best_step: int | None
    stopped_early: bool
    resumed_from: int | None
    ledger: str


def build_source(
    settings: TrainSettings,
    train: Sequence[Group],
    world: int,
    method: Method,
    complete: Callable[[Sequence[Group]], Sequence[Group]] = list,
) -> OfflineSource:
    """The order in which a stage reads a fixed set of examples; `complete` as in `OfflineSource`."""
    return OfflineSource(
        train,
        batch_size=compute_batch(settings, world).batch_size,
        epochs=settings.num_train_epochs,
        max_steps=settings.max_steps,
        seed=settings.seed,
        shuffle=settings.shuffle,
        arrange=list if method.partners is None else method.partners.arrange,
        complete=complete,
    )

"""How much disk a training stage takes at most: known before its first step, printed, and checked against what is free."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from burnish.config.train import TrainSettings
from burnish.disk import check_space, format_bytes
from burnish.track.log import LOG_BYTES
from burnish.track.metrics import TAIL_BYTES

ROW_BYTES = 2048  # a row of metrics.jsonl, with room to spare: about 30 figures
TIMING_BYTES = 96
_FEW_8BIT = 4096  # bitsandbytes keeps the moments of smaller tensors in fp32


@dataclass(frozen=True, slots=True)
class DiskPlan:
    """Bytes that a stage takes at most.

    Attributes:
        checkpoint: One checkpoint.
        copies: Checkpoints at the same time, the one that is being written included.
        rows: metrics.jsonl, timing.jsonl and the margins of steps.
        export: final/.
        other: What lies in the stage's folder already and stays (cached reference log-probs).
    """

    checkpoint: int
    copies: int
    rows: int
    export: int = 0
    other: int = 0

    @property
    def total(self) -> int:
        """All of it, with the run's log."""
        return self.checkpoint * self.copies + self.rows + self.export + self.other + LOG_BYTES

    def __str__(self) -> str:
        parts = [f"{self.copies} checkpoints of {format_bytes(self.checkpoint)}", f"rows {format_bytes(self.rows)}"]
        if self.export:
            parts.append(f"result {format_bytes(self.export)}")
        if self.other:
            parts.append(f"reference {format_bytes(self.other)}")
        return f"{self.total:,} bytes ({format_bytes(self.total)}): " + ", ".join(
            [*parts, f"log {LOG_BYTES >> 20} MiB"]
        )


def estimate_checkpoint(shapes: Iterable[Sequence[int]], optim: str, *, item: int = 4, logs: int = 2) -> int:
    """Bytes of one checkpoint at most.

    Args:
        shapes: Shapes of the trainable tensors.
        optim: The optimizer's name.
        item: Bytes of one element.
        logs: Files of rows whose ends are kept in it.
    """
    size = 64_000 + logs * TAIL_BYTES  # JSON, manifest, the ends of the logs
    for shape in shapes:
        count = math.prod(shape)
        size += count * item + _moments(shape, count, optim, item) + 1024  # names in headers
    return size


def _moments(shape: Sequence[int], count: int, optim: str, item: int) -> int:
    if optim == "sgd":
        return 0
    if optim == "adafactor":
        return (count // max(shape[-1], 1) + count // max(shape[-2], 1)) * item if len(shape) > 1 else count * item
    if optim == "adamw_8bit":
        return 8 * count if count < _FEW_8BIT else math.ceil(2.25 * count)
    return 2 * count * item


def plan_disk(
    settings: TrainSettings,
    checkpoint: int,
    *,
    total_steps: int,
    save_every: int,
    steps_per_epoch: int,
    export: int = 0,
    other: int = 0,
    examples: int = 0,
) -> DiskPlan:
    """The plan of a stage of `total_steps` steps of `examples` that saves every `save_every` of them."""
    saves = total_steps // max(save_every, 1) + 2  # the last step's, and one when it is stopped
    copies = saves if settings.save_total_limit == 0 else min(settings.save_total_limit + 1, saves)
    copies += settings.load_best_model_at_end
    every = settings.eval_steps or steps_per_epoch
    evaluations = 2 + (total_steps // every if every > 0 else 0)
    rows = (total_steps // settings.logging_steps + 1 + evaluations) * ROW_BYTES + total_steps * TIMING_BYTES
    rows += total_steps * _margin_bytes(settings, examples)
    return DiskPlan(checkpoint, copies, rows, export, other)


def _margin_bytes(settings: TrainSettings, examples: int) -> int:
    """Of a step's record of margins, with the vector if it is kept."""
    records = getattr(settings, "margin_records", None)
    if records is None:
        return 0
    vector = 8 * examples + 4096 if records.vectors else 0  # in blocks of the file system
    return ROW_BYTES + 24 * min(records.sample, examples) + vector


def check_disk(plan: DiskPlan, folder: Path, *, what: str) -> None:
    """Refuse to begin when the plan does not fit on the disk beside what the stage has already written.

    The log's cap is left out: few runs come near it.

    Raises:
        ResourceError: Too little is free.
    """
    check_space(folder, max(plan.total - LOG_BYTES - measure_folder(folder), plan.checkpoint), what=what)


def measure_folder(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when it is not there."""
    return sum(place.stat().st_size for place in folder.rglob("*") if place.is_file() and not place.is_symlink())

"""The arithmetic of batches: examples per optimizer step = per device × accumulation × processes."""

from __future__ import annotations

from dataclasses import dataclass

from burnish.config.train import TrainSettings

DEFAULT_BATCH_SIZE = 8


@dataclass(frozen=True, slots=True)
class BatchArithmetic:
    """How many examples make an optimizer step.

    Args:
        batch_size: Examples per optimizer step over everything.
        per_device: At most this many examples in one micro-batch; None: only tokens bound it.
        accumulation: Accumulation that was asked for; None: derived from the micro-batches.
        processes: Processes that share the batch.
    """

    batch_size: int
    per_device: int | None
    accumulation: int | None
    processes: int

    def __str__(self) -> str:
        processes = f"{self.processes} process" + ("es" if self.processes > 1 else "")
        if self.per_device is None or self.accumulation is None:
            cap = f", at most {self.per_device} in a micro-batch" if self.per_device else ""
            return f"effective batch {self.batch_size} examples ({processes}{cap})"
        return (
            f"effective batch {self.batch_size} examples = "
            f"{self.per_device} per device × {self.accumulation} accumulation × {processes}"
        )


def compute_batch(settings: TrainSettings, processes: int = 1) -> BatchArithmetic:
    """The effective batch of a stage; settings that contradict each other were refused before."""
    per_device, accumulation = settings.per_device_train_batch_size, settings.gradient_accumulation_steps
    total = settings.batch_size
    if total is None and (per_device or accumulation):
        per_device, accumulation = per_device or DEFAULT_BATCH_SIZE, accumulation or 1
        total = per_device * accumulation * processes
    total = total or DEFAULT_BATCH_SIZE
    if per_device is None and accumulation is not None:
        per_device = max(1, total // (accumulation * processes))
    elif per_device is not None and accumulation is None and total % (per_device * processes) == 0:
        accumulation = total // (per_device * processes)
    return BatchArithmetic(total, per_device, accumulation, processes)

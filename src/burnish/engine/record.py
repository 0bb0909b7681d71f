"""What a stage writes down while it trains: rows of metrics, timings and margins, sinks, warnings."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from burnish.engine.checkpoint import restore_log
from burnish.engine.job import TrainJob
from burnish.engine.observe import StepRecord
from burnish.engine.state import Counters
from burnish.track.margins import MarginLog
from burnish.track.metrics import MetricsLog, read_metrics

log = logging.getLogger("burnish")


class StageRecord:
    """The files of a stage that grow by a row a step; on ranks other than 0 nothing is written.

    Attributes:
        figures: Of the last good step.
        evaluation: Of the last evaluation, with its "step".
    """

    def __init__(self, job: TrainJob) -> None:
        folder = job.stage_dir if job.runtime.is_main else None
        observer = job.method.observer
        self._main, self._sinks, self._every = job.runtime.is_main, job.sinks, job.settings.logging_steps
        self._metrics = MetricsLog(folder / "metrics.jsonl") if folder else None
        self._timing = MetricsLog(folder / "timing.jsonl") if folder else None
        self._margins = MarginLog(folder) if folder and observer is not None and observer.records else None
        self._warned: set[str] = set()  # kinds of warnings given
        self.figures: dict[str, float] = {}
        self.evaluation: dict[str, float] = {}

    @property
    def logs(self) -> list[MetricsLog]:
        """The files that a checkpoint keeps the ends of."""
        return [file for file in (self._metrics, self._timing, self._margins) if file]

    def write(self, row: dict[str, Any]) -> None:
        """A row of metrics, to the file and to every sink."""
        if self._metrics:
            self._metrics.append(row)
        for sink in self._sinks:
            sink(row)

    def write_step(
        self, step: int, epoch: float, figures: Mapping[str, float], told: StepRecord | None, *, last: bool
    ) -> None:
        """A good step: its figures, and what the method tells of it.

        Args:
            last: It is the stage's last step, whose row is written whatever `logging_steps` says.
        """
        self.figures = dict(figures)
        if told:
            self.figures |= told.figures
            if self._margins and told.row is not None:
                self._margins.write({"step": step, "epoch": epoch, **told.row}, told.vectors)
            for kind, text in told.warnings.items():
                self.warn_once(kind, f"step {step}: {text}")
        if step % self._every == 0 or last:
            self.write({"step": step, "epoch": epoch, "kind": "train", **self.figures})

    def write_timing(self, step: int, seconds: float, tokens: int) -> None:
        """How long a step took."""
        if self._timing:
            self._timing.append({"step": step, "seconds": round(seconds, 4), "tokens": tokens})

    def write_evaluation(self, step: int, figures: Mapping[str, float]) -> None:
        """An evaluation's figures."""
        self.evaluation = {"step": step, **figures}
        self.write({"step": step, "kind": "eval", **figures})

    def evaluation_at(self, step: int) -> dict[str, float]:
        """The figures of the last evaluation if it was made at this step, else nothing."""
        return self.evaluation if self.evaluation.get("step") == step else {}

    def warn_once(self, kind: str, text: str) -> None:
        """Log a warning, once for each kind."""
        if kind not in self._warned and self._main:
            log.warning("%s", text)
        self._warned.add(kind)

    def mark(self, counters: Counters) -> dict[str, Any]:
        """Note in the counters how far the files go; returns what the checkpoint's manifest notes beside them."""
        if self._metrics and self._timing:
            counters.metrics_mark, counters.timing_mark = self._metrics.mark(), self._timing.mark()
        return {"margins_mark": self._margins.mark()} if self._margins else {}

    def restore(self, checkpoint: Path, counters: Counters, meta: Mapping[str, Any]) -> None:
        """Cut the files back to where the checkpoint was made, and take the last figures from them."""
        if self._metrics and self._timing:
            restore_log(checkpoint, self._metrics, counters.metrics_mark, log.warning)
            restore_log(checkpoint, self._timing, counters.timing_mark, log.warning)
            self._read_last(self._metrics.path)
        if self._margins:
            restore_log(checkpoint, self._margins, meta.get("margins_mark", 0), log.warning)
            self._margins.drop_vectors(counters.step)

    def clear(self) -> None:
        """Begin anew: no rows."""
        for file in self.logs:
            file.cut_back(0)
        if self._margins:
            self._margins.drop_vectors(0)

    def _read_last(self, path: Path) -> None:
        for row in read_metrics(path)[0]:
            kind = row.pop("kind", "")
            if kind == "eval":
                self.evaluation = row
            elif kind == "train":
                self.figures = {k: v for k, v in row.items() if k not in ("step", "epoch")}

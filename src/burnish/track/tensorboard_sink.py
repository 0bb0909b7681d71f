"""Metrics for TensorBoard, in `<stage>/tensorboard/`; uses its writer directly, without torch or TensorFlow."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping
from typing import Any

from burnish.track.sinks import SinkContext, missing_library


class TensorBoardSink:
    """Writes scalars to an event file."""

    def __init__(self, context: SinkContext) -> None:
        try:
            from tensorboard.compat.proto import event_pb2, summary_pb2
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as exc:
            raise missing_library("tensorboard") from exc
        events: Any = event_pb2  # generated code: its names are made when it is imported
        summaries: Any = summary_pb2
        self._event, self._summary = events.Event, summaries.Summary
        self._writer = EventFileWriter(str(context.folder / "tensorboard"))
        if context.start_step:  # readers drop what an earlier start wrote from this step on
            session = events.SessionLog(status=events.SessionLog.START)
            self._writer.add_event(self._event(wall_time=_label(), step=context.start_step + 1, session_log=session))

    def write(self, row: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""
        values = [self._summary.Value(tag=k, simple_value=v) for k, v in row.items() if math.isfinite(v)]
        self._writer.add_event(self._event(wall_time=_label(), step=step, summary=self._summary(value=values)))

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


def _label() -> float:
    """Now, as the number that the format wants beside each value; never used for durations."""
    return datetime.datetime.now().timestamp()

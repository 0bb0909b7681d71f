"""The two clocks: `mono` for durations, `wall` for labels that people read."""

from __future__ import annotations

import datetime
import time


def mono() -> float:
    """Seconds on a clock that never jumps; only differences mean anything."""
    return time.monotonic()


def wall() -> str:
    """Now, as ISO 8601 with the time zone, to the second; a label, never used for durations or order."""
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

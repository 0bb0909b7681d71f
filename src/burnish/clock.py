"""The two clocks: `mono` for durations, `wall` for labels that people read; and durations in words.

With `BURNISH_TESTING=1`, `BURNISH_CLOCK` names a file that holds the seconds by which `wall` is wrong, so that a test can
set the clock back or forward while a run goes on. `mono` never jumps.
"""

from __future__ import annotations

import datetime
import math
import os
import time
from pathlib import Path

_OFFSET = os.environ.get("BURNISH_CLOCK", "") if os.environ.get("BURNISH_TESTING") == "1" else ""


def mono() -> float:
    """Seconds on a clock that never jumps; only differences mean anything."""
    return time.monotonic()


def wall() -> str:
    """Now, as ISO 8601 with the time zone, to the second; a label, never used for durations or order."""
    now = datetime.datetime.now().astimezone()
    if _OFFSET:
        now += datetime.timedelta(seconds=float(Path(_OFFSET).read_text(encoding="ascii")))
    return now.isoformat(timespec="seconds")


def show_seconds(seconds: float) -> str:
    """A duration: `8.2 s`, `4 min 12 s`, `2 h 5 min`."""
    if not math.isfinite(seconds):
        return "an unknown time"
    if seconds < 10:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min" + (f" {rounded % 60} s" if rounded % 60 else "")
    minutes = round(rounded / 60)
    if minutes < 24 * 60:
        return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")
    hours = round(minutes / 60)
    return f"{hours // 24} d" + (f" {hours % 24} h" if hours % 24 else "")

"""The two clocks: `mono` for durations, `wall` for labels that people read.

With `BURNISH_TESTING=1`, `BURNISH_CLOCK` names a file that holds the seconds by which `wall` is wrong, so that a test can
set the clock back or forward while a run goes on. `mono` never jumps.
"""

from __future__ import annotations

import datetime
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

"""How much of the machine other programs used while a measurement ran (Linux; None elsewhere)."""

from __future__ import annotations

import os
import time
from pathlib import Path

MOST = 0.05  # above this share of all processors, a measurement counts as disturbed


def parse_busy(stat: str) -> float:
    """Ticks of all processors that were not idle, from /proc/stat; time that a host took from this machine included."""
    user, nice, system, _idle, _wait, irq, soft, steal = map(float, stat.splitlines()[0].split()[1:9])
    return user + nice + system + irq + soft + steal


class Disturbance:
    """Watches from its making until `share()`."""

    def __init__(self) -> None:
        self._start = self._read(), time.process_time(), time.perf_counter()

    @staticmethod
    def _read() -> float | None:
        file = Path("/proc/stat")
        return parse_busy(file.read_text(encoding="ascii")) / os.sysconf("SC_CLK_TCK") if file.exists() else None

    def share(self) -> float | None:
        """Processor time of everything but this process, as a share of what all processors had."""
        busy, own, wall = self._start
        now = self._read()
        if busy is None or now is None:
            return None
        others = now - busy - (time.process_time() - own)
        return max(others, 0.0) / (time.perf_counter() - wall) / (os.cpu_count() or 1)


def is_disturbed(share: float | None) -> bool:
    """Whether the share is too large for the measurement to stand."""
    return share is not None and share > MOST

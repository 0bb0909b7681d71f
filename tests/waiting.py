"""Waiting for events: the one place of the tests that sleeps. No test is judged by how fast the machine is.

A bound here ends a test that hangs; no run on any machine that works comes near to it.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

BOUND = 1800.0  # seconds


def wait_until(holds: Callable[[], object], what: str) -> None:
    """Return as soon as `holds()` is true; fail with `what` after `BOUND` seconds."""
    end = time.monotonic() + BOUND
    while not holds():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.005)


def read_process_state(pid: int) -> str:
    """The letter that the system (Linux) gives a process: R, S, T (stopped), Z …; "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return ""


def wait_for_stop(pid: int) -> bool:
    """Whether a child stopped itself (as by the fault `stop`), once it has done so; False: it ended instead."""
    _, status = os.waitpid(pid, os.WUNTRACED)
    return os.WIFSTOPPED(status)


@contextmanager
def bounded(cpu_seconds: int = 120) -> Iterator[None]:
    """Fail when the block takes this much processor time: a hundred times what it takes, a tenth of what it took if it hung."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise AssertionError(f"not done after {cpu_seconds} s of processor time")

    before = signal.signal(signal.SIGVTALRM, give_up)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)

"""SIGINT and SIGTERM set a flag that the loop reads at safe moments; a second Ctrl-C leaves at once."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from types import FrameType
from typing import Any, Self

from burnish.clock import mono

# A launcher passes on the Ctrl-C that the terminal already sent to the whole process group: one key press, two signals.
_SAME_PRESS = 0.2


class SignalFlag:
    """While open, SIGINT and SIGTERM only set a flag.

        with SignalFlag() as stop:
            for step in steps:
                ...
                if stop:
                    save(); raise InterruptedRun(..., signum=stop.signum)

    The second SIGINT ends the process at once with status 130 (what is on disk stays whole: writes are atomic). Earlier
    handlers come back at the end. Outside the main thread, where Python allows no handlers, nothing happens.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._pressed: float | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            now = mono()
            if self._pressed is not None and now - self._pressed > _SAME_PRESS:
                _leave()
            if self._pressed is None:
                self._pressed = now
                _say("\nstopping after this step and saving; Ctrl-C again leaves at once\n")
        self.signum = number if self.signum is None else self.signum


def _leave() -> None:
    _say("\x1b[?25h\nleft at once; the last checkpoint is intact\n" if sys.stderr.isatty() else "left at once\n")
    os._exit(130)


def _say(text: str) -> None:
    """Straight to the file descriptor: a handler may run in the middle of a write to the stream."""
    with contextlib.suppress(OSError):
        os.write(2, text.encode())

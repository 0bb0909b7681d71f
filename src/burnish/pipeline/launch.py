"""Several processes on this machine: one command started N times with the variables of a process group."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from burnish.clock import mono

log = logging.getLogger("burnish")

GRACE_SECONDS = 20.0


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `burnish argv…` in `processes` processes and wait for all.

    Signals are passed on. When one process fails the others are stopped within `GRACE_SECONDS`.

    Returns:
        The exit status of the first process that failed, else 0.
    """
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    children = []
    for rank in range(processes):
        env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        env.setdefault("OMP_NUM_THREADS", str(threads))
        children.append(subprocess.Popen([sys.executable, "-m", "burnish", *argv], env=env))

    def forward(signum: int, frame: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signum)

    before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        return _wait(children)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def _wait(children: Sequence[subprocess.Popen[bytes]]) -> int:
    first_failure = 0
    deadline: float | None = None
    while any(child.poll() is None for child in children):
        for rank, child in enumerate(children):
            status = child.poll()
            if status and not first_failure:
                first_failure = 128 - status if status < 0 else status
                log.error("process %d (pid %d) ended with status %d; stopping the others", rank, child.pid, status)
                deadline = mono() + GRACE_SECONDS
                _signal(children, signal.SIGTERM)
        if deadline is not None and mono() > deadline:
            _signal(children, signal.SIGKILL)
        time.sleep(0.05)
    for child in children:
        status = child.wait()
        if status and not first_failure:
            first_failure = 128 - status if status < 0 else status
    return first_failure


def _signal(children: Sequence[subprocess.Popen[bytes]], signum: int) -> None:
    for child in children:
        if child.poll() is None:
            child.send_signal(signum)

"""Several processes on this machine: one command started N times with the variables of a process group, and watched."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from burnish.clock import mono
from burnish.engine.memory import describe_remedy
from burnish.errors import BurnishError, ResourceError
from burnish.track.whereabouts import BEAT_VARIABLE, PEER_LOST, Whereabouts, read_beat, read_timeout

log = logging.getLogger("burnish")

GRACE_SECONDS = 20.0
PAUSE = 0.05
RESUME = "give the same command again: the run goes on from its last checkpoint"


@dataclass
class Child:
    """One process of the run.

    Attributes:
        beat: The file into which it writes where it is.
        count, heard: Its last beat, and when (monotonic) it came.
    """

    rank: int
    process: subprocess.Popen[bytes]
    beat: Path
    count: int = -1
    heard: float = 0.0

    @property
    def place(self) -> Whereabouts:
        return read_beat(self.beat) or Whereabouts()

    def __str__(self) -> str:
        return f"process {self.rank} (pid {self.process.pid})"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(argv: Sequence[str], processes: int) -> int:
    """Run `burnish argv…` in `processes` processes and wait for all.

    Signals are passed on. When one process fails, dies or falls silent for BURNISH_PEER_TIMEOUT seconds, the others are
    stopped within `GRACE_SECONDS`.

    Returns:
        The exit status of the first process that failed and has said why, else 0.

    Raises:
        ResourceError: A process was killed: its rank, pid, signal and place, and what to change if memory ran out.
        BurnishError: A process was ended by another signal, or was silent.
    """
    limit = read_timeout()
    threads = max(1, (os.cpu_count() or 1) // processes)
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(processes)}
    with tempfile.TemporaryDirectory(prefix="burnish-") as folder:
        children = []
        for rank in range(processes):
            beat = Path(folder) / str(rank)
            env = os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), BEAT_VARIABLE: str(beat)}
            env.setdefault("OMP_NUM_THREADS", str(threads))
            children.append(Child(rank, subprocess.Popen([sys.executable, "-m", "burnish", *argv], env=env), beat))

        def forward(signum: int, frame: FrameType | None) -> None:
            _signal(children, signum)

        before = {s: signal.signal(s, forward) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            return _wait(children, limit)
        finally:
            _signal(children, signal.SIGKILL)
            for child in children:
                child.process.wait()
            for signum, handler in before.items():
                signal.signal(signum, handler)


def _wait(children: Sequence[Child], limit: float) -> int:
    """Watch until all have ended; see `launch`."""
    failure: BurnishError | int = 0
    deadline: float | None = None
    last = mono()
    while any(child.process.poll() is None for child in children):
        now = mono()
        if now - last > 1:  # this process was stopped itself, and most likely the others with it
            for child in children:
                child.heard = now
        last = now
        if not failure:
            failure = _find_failure(children, limit) or _find_silence(children, now, limit) or 0
            if failure:
                deadline = now + GRACE_SECONDS
                _signal(children, signal.SIGTERM)
        if deadline is not None and now > deadline:
            _signal(children, signal.SIGKILL)
        time.sleep(PAUSE)
    failure = failure or _find_failure(children, limit) or 0
    if isinstance(failure, BurnishError):
        raise failure
    return failure


def _find_failure(children: Sequence[Child], limit: float) -> BurnishError | int | None:
    """What ended a process: a signal before an exit status, which may only be the answer to another one's death.

    When the others were lost to a process that still runs, that one hangs.
    """
    if not any(child.process.poll() for child in children):
        return None
    time.sleep(PAUSE)
    ended = [(child, child.process.poll() or 0) for child in children]
    for child, status in ended:
        if status < 0:
            return _describe_death(child, -status)
    own = next((status for _, status in ended if status not in (0, PEER_LOST)), None)
    if own is not None:
        return own
    hanging = [child for child, _ in ended if child.process.poll() is None]
    if hanging:
        return _end_silent(min(hanging, key=lambda child: child.place.step), limit)
    return 1


def _describe_death(child: Child, signum: int) -> BurnishError:
    place = child.place
    name = signal.Signals(signum).name if signum in set(signal.Signals) else "unknown"
    text = f"{child} was ended by signal {signum} ({name}) in phase {place.phase} after step {place.step}"
    where = place.stage or "start"
    if signum != signal.SIGKILL:
        return BurnishError(text, where=where, remedy=RESUME)
    return ResourceError(
        f"{text}; if nobody did that, the system did because memory ran out",
        where=where,
        remedy=f"{describe_remedy(place)}; {RESUME}",
    )


def _find_silence(children: Sequence[Child], now: float, limit: float) -> BurnishError | None:
    """A process whose beat has stopped: it is stopped (SIGSTOP), or the machine no longer lets it run."""
    for child in children:
        place = read_beat(child.beat)
        if place is None or child.process.poll() is not None:
            continue
        if place.beat != child.count:
            child.count, child.heard = place.beat, now
        elif now - child.heard > limit:
            return _end_silent(child, now - child.heard)
    return None


def _end_silent(child: Child, seconds: float) -> BurnishError:
    place, state = child.place, _read_state(child.process.pid)
    child.process.kill()
    return BurnishError(
        f"{child} has not answered for {seconds:.0f} s{state}: phase {place.phase} after step {place.step}; "
        f"it was ended with signal {signal.SIGKILL.value} (SIGKILL)",
        where=place.stage or "start",
        remedy=RESUME,
    )


def _read_state(pid: int) -> str:
    """What the system says of a process (Linux)."""
    try:
        letter = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""
    return {"T": " (it is stopped, as by SIGSTOP)", "D": " (it waits for a device)"}.get(letter, "")


def _signal(children: Sequence[Child], signum: int) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(signum)

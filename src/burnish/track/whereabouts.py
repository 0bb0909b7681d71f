"""Where this process is in its work: stage, step, phase.

Messages say it when memory runs out. Of several processes each also writes it to a small file, twice a second even if
nothing moves, so that the process which started them can say where one of them died or fell silent.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from dataclasses import asdict, dataclass
from pathlib import Path

from burnish.errors import ConfigError

BEAT_VARIABLE = "BURNISH_BEAT"
PEER_LOST = 77  # exit status of one of several processes when another one is gone: the one that watches says which
TIMEOUT_VARIABLE = "BURNISH_PEER_TIMEOUT"
DEFAULT_TIMEOUT = 3600.0  # seconds; one process evaluates alone while the others wait
_LENGTH = 512
_PAUSE = 0.5


@dataclass
class Whereabouts:
    """A place in the work of a process.

    Attributes:
        stage: The stage's label; "" before the first.
        step: Optimizer steps done in it.
        phase: "start", "load", "scores", "reference", "forward", "backward", "optimizer", "save", "evaluate", "generate",
            "export".
        tokens: Tokens of the micro-batch at hand; 0 where there is none.
        budget: `micro_batch_tokens` of the stage; 0 where it has none.
        rows: Completions in that micro-batch, or prompts answered together; a single one cannot be cut.
        beat: Grows as long as the process lives and runs.
    """

    stage: str = ""
    step: int = 0
    phase: str = "start"
    tokens: int = 0
    budget: int = 0
    rows: int = 0
    beat: int = 0

    def __str__(self) -> str:
        if not self.stage:
            return "before the first stage"
        return f"stage {self.stage}, {self.phase}, after step {self.step}"


_HERE = Whereabouts()
_FILE: list[int] = []  # the descriptor of the file that is written, if there is one


def here() -> Whereabouts:
    """The place of this process, as it changes."""
    return _HERE


def enter_stage(label: str) -> None:
    """A stage begins."""
    for name, value in vars(Whereabouts(label, phase="load", beat=_HERE.beat)).items():
        setattr(_HERE, name, value)
    _write()


def note_budget(budget: int) -> None:
    """How many tokens a micro-batch of the stage holds at most."""
    _HERE.budget = budget
    _write()


def enter_phase(phase: str, tokens: int = 0, rows: int = 0) -> None:
    """A phase of the stage begins; tokens and completions of the micro-batch, 0 = as before."""
    _HERE.phase = phase
    _HERE.tokens, _HERE.rows = tokens or _HERE.tokens, rows or _HERE.rows
    _write()


def note_step(step: int) -> None:
    """So many optimizer steps are done."""
    _HERE.step = step
    _write()


def start_beat() -> None:
    """Write the whereabouts to a file from now on, if the environment names one.

    When the process that started this one is gone, this one gets SIGTERM: it saves and ends instead of going on alone.
    """
    place = os.environ.get(BEAT_VARIABLE)
    if not place or _FILE or not hasattr(os, "pwrite"):
        return
    _FILE.append(os.open(place, os.O_WRONLY | os.O_CREAT, 0o600))
    _write()
    threading.Thread(target=_beat, args=(os.getppid(),), daemon=True, name="beat").start()


def _beat(parent: int) -> None:
    pause = threading.Event()
    while not pause.wait(_PAUSE):
        _HERE.beat += 1
        _write()
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)
            return


def _write() -> None:
    if _FILE:
        fields = {**asdict(_HERE), "stage": _HERE.stage[-40:]}
        with contextlib.suppress(OSError):
            os.pwrite(_FILE[0], json.dumps(fields, ensure_ascii=False).encode().ljust(_LENGTH), 0)


def read_beat(path: Path) -> Whereabouts | None:
    """What another process last wrote; None before its first word."""
    try:
        return Whereabouts(**json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError):
        return None


def read_timeout() -> float:
    """Seconds that a process waits for the others, from the environment.

    Raises:
        ConfigError: It is no positive number.
    """
    text = os.environ.get(TIMEOUT_VARIABLE, "")
    try:
        seconds = float(text or DEFAULT_TIMEOUT)
        if not 0 < seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise ConfigError(
            f"{TIMEOUT_VARIABLE}={text!r} is no number of seconds",
            where=TIMEOUT_VARIABLE,
            remedy="set it to a positive number, or unset it",
        ) from None
    return seconds

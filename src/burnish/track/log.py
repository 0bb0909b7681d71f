"""The logger "burnish": coloured on a terminal, one handler however often it is set up, quiet on ranks other than 0."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Callable
from logging.handlers import RotatingFileHandler
from pathlib import Path
from typing import Any, TextIO

from burnish.clock import wall
from burnish.disk import disk_error
from burnish.errors import BurnishError
from burnish.faults import fault_point

SUCCESS = 25
NAME = "burnish"
LOG_BYTES = 32 << 20  # the log and the older one beside it
_COLOURS = {
    logging.DEBUG: "\x1b[2m",
    logging.INFO: "",
    SUCCESS: "\x1b[32m",
    logging.WARNING: "\x1b[33m",
    logging.ERROR: "\x1b[31m",
    logging.CRITICAL: "\x1b[1;31m",
}
_RESET = "\x1b[0m"

logging.addLevelName(SUCCESS, "SUCCESS")
logging.getLogger(NAME).addHandler(logging.NullHandler())


def get_logger(name: str = "") -> logging.Logger:
    """The logger "burnish", or one below it."""
    return logging.getLogger(f"{NAME}.{name}" if name else NAME)


def success(message: str, *args: object) -> None:
    """Log that something has been brought to a good end."""
    logging.getLogger(NAME).log(SUCCESS, message, *args)


def setup_logging(
    verbosity: int = 0,
    *,
    redact: Callable[[str], str],
    rank: int | None = None,
    stream: TextIO | None = None,
    colour: bool | None = None,
) -> logging.Logger:
    """Set up the console. Calling it again replaces what an earlier call set up.

    Args:
        verbosity: -1 = warnings and errors only, 0 = normal, 1 = everything, with memory figures.
        redact: Masks secrets in a line (`burnish.artifacts.redact.redact`).
        rank: This process among those of the run; default: the environment's RANK, else 0. Ranks other than 0 print
            warnings and errors only, each with its rank.
        stream: Where to; default: standard error, looked up at each line.
        colour: Default: when the stream is a terminal, NO_COLOR is not set and TERM is not "dumb".
    """
    logger = logging.getLogger(NAME)
    _drop(logger, _Console)
    number = current_rank() if rank is None else rank
    level = logging.WARNING if number or verbosity < 0 else (logging.DEBUG if verbosity else logging.INFO)
    handler = _Console(stream)
    handler.setLevel(level)
    handler.setFormatter(_ConsoleFormat(redact, number, verbosity > 0, handler, colour))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    logger.propagate = False
    return logger


def attach_log_file(path: Path, *, redact: Callable[[str], str], rank: int | None = None) -> None:
    """Also write everything (debug lines too) to `path`, appended, at most 16 MB and one older file; rank 0 only."""
    logger = logging.getLogger(NAME)
    _drop(logger, _File)
    if current_rank() if rank is None else rank:
        return
    handler = _File(path)
    handler.setFormatter(_FileFormat(redact))
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)


def check_log_file() -> None:
    """Raise what went wrong with the log file, if anything did.

    Raises:
        ResourceError: It can no longer be written.
    """
    for handler in logging.getLogger(NAME).handlers:
        if isinstance(handler, _File) and handler.failure is not None:
            raise handler.failure


def detach_log_file() -> None:
    """Stop writing to the log file."""
    _drop(logging.getLogger(NAME), _File)


def current_rank() -> int:
    """This process's rank by the launcher's environment; 0 without one."""
    try:
        return int(os.environ.get("RANK") or 0)
    except ValueError:
        return 0


def wants_colour(stream: Any) -> bool:
    """Whether to colour what goes to `stream` (no-color.org; FORCE_COLOR turns it on)."""
    if os.environ.get("NO_COLOR"):
        return False
    if os.environ.get("FORCE_COLOR"):
        return True
    return os.environ.get("TERM") != "dumb" and is_terminal(stream)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal; a closed one is not."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):
        return False


def memory_text() -> str:
    """Memory of this process, and of the GPU if it uses one: `rss 812 MB, gpu 3.1 GB (peak 4.0 GB)`."""
    parts = [f"rss {resident_bytes() / 1e6:,.0f} MB"]
    torch = sys.modules.get("torch")  # never imported here
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        now, peak = torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9
        parts.append(f"gpu {now:.1f} GB (peak {peak:.1f} GB)")
    return ", ".join(parts)


def resident_bytes() -> int:
    """Resident memory of this process in bytes; 0 where it cannot be told."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError, AttributeError):
        pass
    try:
        import psutil  # comes with peft
    except ImportError:
        return 0
    return int(psutil.Process().memory_info().rss)


class _Console(logging.StreamHandler):
    """To a fixed stream, or to whatever standard error is at the moment (a live bar replaces it for a while)."""

    def __init__(self, stream: TextIO | None) -> None:
        logging.Handler.__init__(self)
        self._fixed = stream

    @property
    def stream(self) -> TextIO:
        return self._fixed or sys.stderr

    @stream.setter
    def stream(self, value: TextIO) -> None:
        self._fixed = value


class _ConsoleFormat(logging.Formatter):
    def __init__(
        self, redact: Callable[[str], str], rank: int, verbose: bool, handler: _Console, colour: bool | None
    ) -> None:
        super().__init__()
        self._redact, self._rank, self._verbose, self._handler, self._colour = redact, rank, verbose, handler, colour

    def format(self, record: logging.LogRecord) -> str:
        text = self._redact(super().format(record))
        if record.levelno >= logging.WARNING:
            text = f"{record.levelname.lower()}: {text}"
        if self._rank:
            text = f"[rank {self._rank}] {text}"
        if self._verbose:
            text = f"{text}  [{memory_text()}]"
        colour = wants_colour(self._handler.stream) if self._colour is None else self._colour
        code = _COLOURS.get(record.levelno, "")
        return f"{code}{text}{_RESET}" if colour and code else text


class _FileFormat(logging.Formatter):
    def __init__(self, redact: Callable[[str], str]) -> None:
        super().__init__()
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        text = self._redact(super().format(record))
        head = f"{wall()} {record.levelname:<8}"
        tail = f"  [{memory_text()}]" if record.levelno <= logging.DEBUG else ""
        return f"{head} {text}{tail}"


class _File(RotatingFileHandler):
    """A log that cannot be written says so once, loudly; `check_log_file` then stops the run after its next save."""

    def __init__(self, path: Path) -> None:
        super().__init__(
            path, maxBytes=LOG_BYTES // 2, backupCount=1, encoding="utf-8", errors="backslashreplace", delay=True
        )
        self.failure: BurnishError | None = None

    def _open(self) -> Any:
        stream = super()._open()
        with contextlib.suppress(OSError, ValueError):  # the line that a crash tore ends here
            with Path(self.baseFilename).open("rb") as file:
                file.seek(-1, os.SEEK_END)
                torn = file.read(1) != b"\n"
            if torn:
                stream.write("\n")
        return stream

    def emit(self, record: logging.LogRecord) -> None:
        if self.failure is None:
            try:
                fault_point("log.write")
            except OSError:
                self.handleError(record)
                return
            super().emit(record)

    def handleError(self, record: logging.LogRecord) -> None:
        exc = sys.exc_info()[1]
        path = Path(self.baseFilename)
        if not isinstance(exc, OSError):
            sys.stderr.write(f"warning: a line of {path} could not be written ({type(exc).__name__}: {exc})\n")
            return
        self.failure = disk_error(exc, path, doing=f"write {path.name}")
        sys.stderr.write(f"error: {self.failure}\n")


def _drop(logger: logging.Logger, kind: type[logging.Handler]) -> None:
    for handler in [h for h in logger.handlers if isinstance(h, kind)]:
        logger.removeHandler(handler)
        if not isinstance(handler, _Console):
            handler.close()

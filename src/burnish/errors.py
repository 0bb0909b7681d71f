"""The errors burnish raises on purpose.

Each says what is wrong, where, what was found and what to do, and carries the exit status that the command line returns.
"""

from __future__ import annotations

import errno


class BurnishError(Exception):
    """An error with a place and a remedy.

    Args:
        message: What is wrong, one sentence, with the offending value.
        where: File, line, key or object that it concerns.
        found: What was found there (already part of most messages; kept apart for machines).
        remedy: What the user should do. Required.
    """

    exit_code = 1

    def __init__(self, message: str, *, remedy: str, where: str = "", found: object = None) -> None:
        if not remedy:
            raise ValueError(f"{type(self).__name__} without a remedy: {message}")
        self.message, self.where, self.found, self.remedy = message, where, found, remedy
        super().__init__(str(self))

    def __reduce__(self) -> tuple[object, ...]:
        return _restore, (type(self), dict(vars(self)))

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.message}\n  → {self.remedy}"


def _restore(cls: type[BurnishError], fields: dict[str, object]) -> BurnishError:
    """The same error in another process: rank 0 decides, every rank raises."""
    error = cls.__new__(cls)
    vars(error).update(fields)
    error.args = (str(error),)
    return error


class UsageError(BurnishError):
    """A wrong use of the command line or of the library."""

    exit_code = 2


class ConfigError(UsageError):
    """Wrong settings."""


class DataError(UsageError):
    """Wrong data."""


class NumericStop(BurnishError):
    """Training stopped because of its numbers (non-finite losses or gradients)."""

    exit_code = 4


class ResourceError(BurnishError):
    """Disk or memory ran out, or a folder cannot be written."""

    exit_code = 5


class ServiceError(BurnishError):
    """An outside service (hub, server, judge) failed."""

    exit_code = 6


class PeerLost(BurnishError):
    """Another process of the same run is gone or no longer answers."""


class InterruptedRun(BurnishError):
    """A signal stopped the run after its state was saved; `exit_code` is 128 + the signal's number."""

    def __init__(self, message: str, *, signum: int, remedy: str, where: str = "") -> None:
        super().__init__(message, remedy=remedy, where=where)
        self.exit_code = 128 + signum


_MEMORY_WORDS = (
    "can't allocate memory",
    "cannot allocate memory",
    "out of memory",
    "not enough memory",
    "bad_alloc",
    "alloc_failed",  # CUBLAS_STATUS_ALLOC_FAILED, and the like of cuDNN, cuSOLVER, cuSPARSE, cuFFT
    "allocation_failed",  # CURAND_STATUS_ALLOCATION_FAILED
    "cudaerrormemoryallocation",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out: Python's, torch's for a device or for the host, that of a library
    under torch (cuBLAS cannot make its workspace, NCCL its buffers), or the system's.
    """
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in text for word in _MEMORY_WORDS)

"""The C library's allocator, kept from handing memory back between the tensors of a step.

glibc maps every block above a threshold afresh and returns it to the kernel when it is freed, so that each large tensor of each
step costs page faults: 65,000 a step of the benchmark's model, 5 % of its processor time. Freed memory stays with the process
instead; the peak is the same. Linux with glibc only; elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of <malloc.h>
_VARIABLES = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_MMAP_MAX_", "LD_PRELOAD")


@functools.cache
def keep_freed_memory() -> str:
    """Ask the allocator to reuse freed memory for the rest of this process; who set it up otherwise is left alone.

    Returns:
        What became of it, for people: "glibc, freed memory is reused", or why nothing was changed.
    """
    chosen = [name for name in (*_VARIABLES, "GLIBC_TUNABLES") if os.environ.get(name)]
    if chosen:
        return f"as {', '.join(chosen)} says"
    library = _find_glibc()
    if library is None:
        return "the system's"
    # −1: never shrink the heap. No mapped blocks: freed ones would go back to the kernel.
    if library.mallopt(_TRIM_THRESHOLD, -1) and library.mallopt(_MMAP_MAX, 0):
        return "glibc, freed memory is reused"
    return "glibc"


def release_freed_memory() -> None:
    """Hand memory that is free now back to the system."""
    library = _find_glibc()
    if library is not None:
        library.malloc_trim(0)


def _find_glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    try:
        library = ctypes.CDLL(None)
        library.gnu_get_libc_version  # noqa: B018  # absent in other C libraries
    except (OSError, AttributeError):
        return None
    library.malloc_trim.argtypes = [ctypes.c_size_t]
    return library

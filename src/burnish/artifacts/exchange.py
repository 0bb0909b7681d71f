"""Exchange two folders' names in one step, where the operating system can."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_UNSUPPORTED = {errno.ENOSYS, errno.EINVAL, getattr(errno, "ENOTSUP", errno.EINVAL), errno.EPERM}


def exchange_folders(one: Path, other: Path) -> bool:
    """Let two existing folders swap names atomically. Returns False, with nothing done, where that is not possible.

    Linux has renameat2(RENAME_EXCHANGE), macOS renamex_np(RENAME_SWAP); some file systems support neither.
    """
    try:
        library = ctypes.CDLL(None, use_errno=True)
        first, second = os.fsencode(one), os.fsencode(other)
        if sys.platform == "linux":
            result = library.renameat2(-100, first, -100, second, 2)  # AT_FDCWD, RENAME_EXCHANGE
        elif sys.platform == "darwin":
            result = library.renamex_np(first, second, 2)  # RENAME_SWAP
        else:
            return False
    except (OSError, AttributeError, TypeError):
        return False
    if result == 0:
        return True
    code = ctypes.get_errno()
    if code in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code), str(other))

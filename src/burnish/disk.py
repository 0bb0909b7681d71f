"""Disk: free space, and errors of the operating system in words that say what to do."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from burnish.errors import BurnishError, ResourceError

FULL = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_BLOCK = 4096
_DISK = FULL | {errno.EIO, errno.EROFS, getattr(errno, "ESTALE", errno.EIO)}
_OS_ERROR = re.compile(r"os error (\d+)")
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def cache_root() -> Path | None:
    """The cache's folder: BURNISH_CACHE, or ~/.cache/burnish; None when BURNISH_CACHE is "off"."""
    chosen = os.environ.get("BURNISH_CACHE", "")
    if chosen.lower() == "off":
        return None
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "burnish"


def format_bytes(count: float) -> str:
    """A number of bytes for people: `1.4 GB` (powers of 1,000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def free_bytes(path: Path) -> int:
    """Free bytes for this user where `path` is or would be."""
    return shutil.disk_usage(_nearest(path)).free


def check_space(path: Path, needed: int, *, what: str = "this run") -> None:
    """Refuse to start when `path` has fewer than `needed` free bytes.

    Raises:
        ResourceError: Not enough space.
    """
    free = free_bytes(path)
    if free < needed:
        raise ResourceError(
            f"{what} needs {needed:,} bytes ({format_bytes(needed)}) and {free:,} ({format_bytes(free)}) are free",
            where=str(path),
            found=free,
            remedy="free some space there, choose another --output-dir, or set a smaller save_total_limit",
        )


def disk_error(exc: OSError, path: Path, *, doing: str, needed: int | None = None) -> BurnishError:
    """The `ResourceError` that tells a person what an operating system error at `path` means and what to do."""
    name = os.strerror(exc.errno) if exc.errno else str(exc)
    if exc.errno in FULL:
        try:
            free = free_bytes(path)
            state = f"{free:,} bytes ({format_bytes(free)}) are free"
        except OSError:
            state = "the free space cannot be read"
        wanted = f"{needed:,} bytes ({format_bytes(needed)})" if needed is not None else f"at least {_BLOCK:,} bytes"
        return ResourceError(
            f"cannot {doing}: {name}; {wanted} needed, {state}",
            where=str(path),
            found=name,
            remedy="what was saved before is intact: free space there (or set a smaller save_total_limit, or another "
            "--output-dir) and run the same command again to go on",
        )
    if exc.errno in _DENIED:
        remedy = "make the folder writable for this user, or choose another --output-dir"
    elif exc.errno == errno.ENOENT:
        remedy = (
            "the folder was removed or its disk is gone: bring it back, or choose another --output-dir, "
            "then run the same command again"
        )
    else:
        remedy = "check the disk (its system log names the fault) or choose another --output-dir, then run the same "
        remedy += "command again: what was saved before is intact"
    return ResourceError(f"cannot {doing}: {name}; {describe_owner(path)}", where=str(path), found=name, remedy=remedy)


def describe_owner(path: Path) -> str:
    """Whom `path` (or the nearest folder above it that exists) belongs to, and who asks."""
    place = _nearest(path)
    try:
        status = place.stat()
    except OSError:
        return f"{place} cannot be examined"
    owner = str(status.st_uid)
    with contextlib.suppress(ImportError, KeyError):
        import pwd

        owner = pwd.getpwuid(status.st_uid).pw_name
    me = f", this process is user {os.geteuid()}" if hasattr(os, "geteuid") else ""
    return f"{place} belongs to {owner} (mode {status.st_mode & 0o777:03o}){me}"


def _nearest(path: Path) -> Path:
    """`path`, or the nearest folder above it that exists and may be seen."""
    place = Path(path)
    while place != place.parent and not os.path.lexists(place):
        place = place.parent
    return place


def find_disk_failure(exc: BaseException, folder: Path | None = None) -> OSError | None:
    """The disk's error behind an exception, whatever library it came through; None for any other.

    Args:
        exc: safetensors and tokenizers raise types of their own with the operating system's text in them.
        folder: Any error of the operating system about a path below it counts too.
    """
    if isinstance(exc, BurnishError):
        return None
    if isinstance(exc, OSError):
        if exc.errno in _DISK:
            return exc
        named = exc.errno and folder is not None and isinstance(exc.filename, (str, bytes))
        return exc if named and folder and Path(os.fsdecode(exc.filename)).is_relative_to(folder) else None
    found = _OS_ERROR.search(str(exc))
    number = int(found[1]) if found else next((n for n in _DISK if os.strerror(n) in str(exc)), 0)
    return OSError(number, os.strerror(number)) if number in _DISK else None

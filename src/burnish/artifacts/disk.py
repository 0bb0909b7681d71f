"""Disk: errors that say what to do, free space, fsync of folders, and paths that stay inside a root."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from pathlib import Path

from burnish.errors import BurnishError, ResourceError, UsageError

_FULL = {errno.ENOSPC, errno.EDQUOT} if hasattr(errno, "EDQUOT") else {errno.ENOSPC}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}


def format_bytes(count: float) -> str:
    """A number of bytes for people: `1.4 GB` (powers of 1,000)."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def free_bytes(path: Path) -> int:
    """Free bytes for this user where `path` is or would be."""
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


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
    if exc.errno in _FULL:
        try:
            free = free_bytes(path)
            state = f"{free:,} bytes ({format_bytes(free)}) are free"
        except OSError:
            state = "the free space cannot be read"
        wanted = f"{needed:,} bytes ({format_bytes(needed)}) needed, " if needed is not None else ""
        return ResourceError(
            f"cannot {doing}: {name}; {wanted}{state}",
            where=str(path),
            found=name,
            remedy="what was saved before is intact: free space there (or set a smaller save_total_limit, or another "
            "--output-dir) and run the same command again to go on",
        )
    if exc.errno in _DENIED:
        return ResourceError(
            f"cannot {doing}: {name}; {_ownership(path)}",
            where=str(path),
            found=name,
            remedy="make the folder writable for this user, or choose another --output-dir",
        )
    return ResourceError(
        f"cannot {doing}: {name}",
        where=str(path),
        found=name,
        remedy="check that the folder still exists and that the disk is healthy, then run the same command again",
    )


def _ownership(path: Path) -> str:
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
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


def fsync_folder(path: Path) -> None:
    """Make the entries of a folder durable. Does nothing where the system cannot (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(path, os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
    try:
        os.fsync(fd)
    except OSError as exc:  # some network and FUSE file systems have no fsync for folders
        if exc.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(fd)


def inside(root: Path, path: Path | str) -> Path:
    """`path` (relative to `root`, or absolute) as a path below `root` that reaches its end through no link.

    Raises:
        UsageError: It leaves the root, is the root itself, holds NUL, or a part of it is a symbolic link.
    """
    text = os.fspath(path)
    relative = Path(text)
    if relative.is_absolute():
        with contextlib.suppress(ValueError):
            relative = relative.relative_to(root)
    parts = relative.parts
    if not parts or relative.is_absolute() or "\0" in text or any(part in ("..", ".", "") for part in parts):
        raise _outside(root, text)
    if os.open not in os.supports_dir_fd or not hasattr(os, "O_NOFOLLOW"):
        whole = root.joinpath(*parts)
        if not whole.resolve().is_relative_to(root.resolve()) or whole.is_symlink():
            raise _outside(root, text)
        return whole
    fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for at, part in enumerate(parts):
            try:
                found = os.stat(part, dir_fd=fd, follow_symlinks=False)
            except FileNotFoundError:
                break
            if (found.st_mode & 0o170000) == 0o120000:
                raise _outside(root, text)
            if at + 1 < len(parts):
                below = os.open(part, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=fd)
                os.close(fd)
                fd = below
    except (NotADirectoryError, OSError) as exc:
        raise _outside(root, text) from exc
    finally:
        os.close(fd)
    return root.joinpath(*parts)


def _outside(root: Path, text: str) -> UsageError:
    return UsageError(
        f"{text!r} is not a plain path inside {root}",
        where=str(root),
        found=text,
        remedy="give the name of something directly in that folder, without '..' and without links",
    )

"""Folders on disk: making their entries durable, and paths that stay inside a root."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from burnish.errors import UsageError


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
        place = root.joinpath(*parts)
        if not place.resolve().is_relative_to(root.resolve()) or place.is_symlink():
            raise _outside(root, text)
        return place
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

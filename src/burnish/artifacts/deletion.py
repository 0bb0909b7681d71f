"""Deleting a run: only a run, only directly under the root, never one in use, links never followed."""

from __future__ import annotations

import shutil
from pathlib import Path

from burnish.artifacts.disk import inside
from burnish.artifacts.files import TEMPORARY, temporary_name
from burnish.artifacts.lock import RunLock
from burnish.artifacts.run_folder import RUN, check_name
from burnish.disk import disk_error
from burnish.errors import UsageError
from burnish.faults import fault_point


def delete_run(root: Path, name: str) -> Path:
    """Delete the run `name`; returns the path that it had. The caller has asked for the name to be typed.

    The folder is renamed first, so that a crash leaves all of the run or none of it.

    Raises:
        UsageError: Not a run directly under `root`, reached through a link, or in use.
    """
    path = inside(Path(root), check_name(name))
    if path.parent != Path(root) or path.is_symlink() or not path.is_dir() or not (path / RUN).is_file():
        raise UsageError(
            f"{name!r} is not a run", where=str(root), found=name, remedy="name a run that `burnish runs list` shows"
        )
    lock = RunLock(path).acquire()
    try:
        trash = temporary_name(path)
        fault_point("delete.rename")
        path.rename(trash)
        fault_point("delete.remove")
        shutil.rmtree(trash, ignore_errors=True)
    except OSError as exc:
        raise disk_error(exc, path, doing="delete the run") from exc
    finally:
        lock.release()
    return path


def empty_trash(root: Path) -> None:
    """Remove what a deletion that was killed left behind: renamed run folders directly under `root`."""
    for place in sorted(Path(root).iterdir()) if Path(root).is_dir() else ():
        if place.name.startswith(TEMPORARY) and place.is_dir() and not place.is_symlink() and (place / RUN).is_file():
            shutil.rmtree(place, ignore_errors=True)

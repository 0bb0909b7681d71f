"""One process per run folder. The operating system frees the lock the moment its holder dies, however it dies."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
import weakref
from pathlib import Path
from typing import Any, Self

from burnish.clock import mono, wall
from burnish.disk import disk_error
from burnish.errors import UsageError
from burnish.faults import fault_point

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
try:
    import msvcrt
except ImportError:  # everywhere else
    msvcrt = None

LOCK = ".lock"
_FAR = 1 << 30  # msvcrt locks bytes; one far behind the text leaves the text readable
_HELD: weakref.WeakSet[RunLock] = weakref.WeakSet()
# File systems (types, mount options) whose locks do not reach other hosts.
_LOCAL_LOCKS = {"beegfs", "cifs", "smb3", "fuse.sshfs"}
_LOCAL_OPTIONS = ("nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl")


class RunLock:
    """The lock of a run folder, held from `acquire` to `release` or the process's end.

    Args:
        folder: The run folder.
    """

    def __init__(self, folder: Path) -> None:
        self.path = Path(folder) / LOCK
        self._fd: int | None = None

    def acquire(self) -> Self:
        """Take the lock.

        Raises:
            UsageError: Another process has it; names its pid, host and start.
            ResourceError: The folder cannot be written.
        """
        while True:
            try:
                fd = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            except OSError as exc:
                raise disk_error(exc, self.path, doing="lock the run folder") from exc
            if not _take(fd) or self._held_elsewhere(fd):
                holder = _read(fd)
                os.close(fd)
                raise self._refused(holder)
            if _is_at(fd, self.path):
                break
            os.close(fd)  # the folder was deleted, or replaced, while this process waited
        text = json.dumps(_me()).encode()
        try:
            fault_point("lock.write")
            os.ftruncate(fd, 0)
            os.pwrite(fd, text, 0) if hasattr(os, "pwrite") else os.write(fd, text)
        except OSError as exc:
            os.close(fd)
            raise disk_error(exc, self.path, doing="lock the run folder", needed=len(text)) from exc
        self._fd = fd
        _HELD.add(self)
        return self

    def release(self) -> None:
        """Free the lock; harmless when it is not held."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, 0)
            if msvcrt is not None and fcntl is None:
                with contextlib.suppress(OSError):
                    os.lseek(self._fd, _FAR, os.SEEK_SET)
                    msvcrt.locking(self._fd, msvcrt.LK_UNLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
            os.close(self._fd)
            self._fd = None
            _HELD.discard(self)

    def _held_elsewhere(self, fd: int) -> bool:
        """Whether another host may hold it although this one got it: locks of some shared disks stop at the host."""
        holder = _read(fd)
        return bool(holder) and holder.get("host") not in (None, platform.node()) and not _locks_reach_hosts(self.path)

    def _refused(self, holder: dict[str, Any]) -> UsageError:
        if holder:
            who = f"process {holder.get('pid')} on {holder.get('host')}, started {holder.get('start')}"
        else:
            who = "another process that did not say which"
        elsewhere = holder.get("host") not in (None, platform.node())
        return UsageError(
            f"this run is in use by {who}",
            where=str(self.path.parent),
            found=holder,
            remedy="wait for it, stop it, or give this run another name with --run-name"
            + (f"; if that process is gone for good, delete {self.path}" if elsewhere else ""),
        )

    def _forget_in_child(self) -> None:
        """A forked child must not keep its parent's lock alive."""
        if self._fd is not None:
            with contextlib.suppress(OSError):
                os.close(self._fd)
            self._fd = None


def _forget_all() -> None:
    for lock in list(_HELD):
        lock._forget_in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)


def lock_holder(folder: Path) -> dict[str, Any] | None:
    """Who holds the lock of a run folder now: {pid, host, start, boot, began}; None when nobody does."""
    try:
        fd = os.open(Path(folder) / LOCK, os.O_RDWR)
    except FileNotFoundError:
        return None
    except OSError:
        try:
            fd = os.open(Path(folder) / LOCK, os.O_RDONLY)
        except OSError:
            return None
    try:
        return None if _take(fd, shared=True, patience=0.0) else (_read(fd) or {"pid": None})
    finally:
        os.close(fd)


def _take(fd: int, *, shared: bool = False, patience: float = 0.5) -> bool:
    """Lock an open file without waiting longer than `patience` seconds (a reader's probe holds it for an instant)."""
    deadline = mono() + patience
    while True:
        try:
            if fcntl is not None:
                fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            elif msvcrt is not None:
                os.lseek(fd, _FAR, os.SEEK_SET)
                msvcrt.locking(fd, msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
                if shared:
                    os.lseek(fd, _FAR, os.SEEK_SET)
                    msvcrt.locking(fd, msvcrt.LK_UNLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
                os.lseek(fd, 0, os.SEEK_SET)
            else:
                return _take_by_pid(fd)
            return True
        except (BlockingIOError, PermissionError):
            if mono() >= deadline:
                return False
            time.sleep(0.02)
        except OSError:  # the file system has no locks at all
            return _take_by_pid(fd)


def _take_by_pid(fd: int) -> bool:
    """Without locks: the text decides; a holder of this boot of this host must be alive, any other is believed."""
    holder = _read(fd)
    if any(lock._fd is not None and os.path.sameopenfile(fd, lock._fd) for lock in _HELD):
        return False
    if not holder or holder.get("pid") == os.getpid():
        return True
    if holder.get("host") != platform.node():
        return False
    if holder.get("boot") != boot_id():
        return True
    try:
        os.kill(int(holder["pid"]), 0)
    except ProcessLookupError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        return False
    began = holder.get("began")  # another process may have got the number of a holder that died
    return bool(began) and began != process_began(int(holder["pid"]))


def _is_at(fd: int, path: Path) -> bool:
    """Whether an open file is still the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except OSError:
        return False


def _read(fd: int) -> dict[str, Any]:
    os.lseek(fd, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(fd, 4096) or b"{}")
    except (ValueError, OSError):
        return {}
    return found if isinstance(found, dict) else {}


def _me() -> dict[str, Any]:
    pid = os.getpid()
    return {"pid": pid, "host": platform.node(), "start": wall(), "boot": boot_id(), "began": process_began(pid)}


def boot_id() -> str:
    """An id that changes when the machine starts anew; empty where there is none."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return ""


def process_began(pid: int) -> str:
    """When a process of this host began, in clock ticks since the machine's start; empty where that cannot be told."""
    with contextlib.suppress(OSError, IndexError):
        text = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
        return text.rpartition(")")[2].split()[19]  # field 22; the name in brackets may hold blanks
    return ""


def _locks_reach_hosts(path: Path) -> bool:
    """Whether a lock on `path` is seen by other hosts (or no other host can see the file)."""
    best, verdict = "", True
    with contextlib.suppress(OSError, IndexError):
        where = str(path.resolve())
        for line in Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            left, _, right = line.partition(" - ")
            point = left.split()[4].replace("\\040", " ")
            if len(point) >= len(best) and (where == point or where.startswith(point.rstrip("/") + "/")):
                kind, _, options = [*right.split(), "", "", ""][:3]
                best = point
                verdict = kind not in _LOCAL_LOCKS and not any(o in options.split(",") for o in _LOCAL_OPTIONS)
    return verdict

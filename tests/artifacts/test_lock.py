"""R-28: one process per run folder, and a dead one holds nothing."""

import json
import os
import platform
import signal
import subprocess
import sys

import pytest

from burnish.artifacts import lock as lock_module
from burnish.artifacts.lock import LOCK, RunLock, boot_id, lock_holder, process_began
from burnish.errors import UsageError

HOLD = """
import signal, sys
from pathlib import Path
from burnish.artifacts.lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("held", flush=True)
signal.pause()
"""


@pytest.fixture
def holder(tmp_path):
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    yield child
    child.kill()
    child.wait()


def test_r28_the_second_is_refused_with_pid_host_and_start(tmp_path, holder):
    with pytest.raises(UsageError) as found:
        RunLock(tmp_path).acquire()
    text = str(found.value)
    assert found.value.exit_code == 2
    assert f"process {holder.pid} on {platform.node()}, started 20" in text
    assert lock_holder(tmp_path)["pid"] == holder.pid


def test_r28_a_killed_holder_frees_it_at_once(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert lock_holder(tmp_path) is None
    lock = RunLock(tmp_path).acquire()
    assert lock_holder(tmp_path)["pid"] == os.getpid()
    lock.release()
    assert lock_holder(tmp_path) is None


def test_r28_a_reused_pid_after_a_reboot_does_not_matter(tmp_path):
    stale = {"pid": os.getpid(), "host": platform.node(), "start": "2020-01-01", "boot": "another"}
    (tmp_path / LOCK).write_text(json.dumps(stale))
    assert lock_holder(tmp_path) is None
    RunLock(tmp_path).acquire().release()


def test_r28_a_folder_that_is_deleted_meanwhile_is_not_locked_in_the_bin(tmp_path, monkeypatch):
    """The lock was taken, but on a file that a deletion has moved away: the new folder's file is locked instead."""
    run = tmp_path / "r"
    run.mkdir()
    real = lock_module._take
    moved = []

    def take(fd: int, **kw) -> bool:
        if not moved:
            moved.append(run.rename(tmp_path / "bin"))
            run.mkdir()
        return real(fd, **kw)

    monkeypatch.setattr(lock_module, "_take", take)
    lock = RunLock(run).acquire()
    assert lock_holder(run)["pid"] == os.getpid() and lock_holder(tmp_path / "bin") is None
    lock.release()


def test_r28_twice_in_one_process(tmp_path):
    lock = RunLock(tmp_path).acquire()
    with pytest.raises(UsageError):
        RunLock(tmp_path).acquire()
    lock.release()
    lock.release()
    RunLock(tmp_path).acquire().release()


def test_r28_a_forked_child_does_not_keep_it(tmp_path):
    """A data worker that outlives its killed parent must not hold the run."""
    lock = RunLock(tmp_path).acquire()
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(write)
        os.read(read, 1)
        os._exit(0)
    lock.release()
    RunLock(tmp_path).acquire().release()
    os.close(write)
    os.close(read)
    os.waitpid(pid, 0)


def test_a_probe_does_not_take_it_from_a_run_that_starts(tmp_path):
    looker = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
from pathlib import Path
from burnish.artifacts.lock import lock_holder
print("go", flush=True)
while True: lock_holder(Path({str(tmp_path)!r}))
""",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    RunLock(tmp_path).acquire().release()
    assert looker.stdout is not None and looker.stdout.readline() == "go\n"
    for _ in range(30):
        RunLock(tmp_path).acquire().release()
    looker.kill()
    looker.wait()


def test_r28_other_host_on_a_disk_whose_locks_stop_at_the_host(tmp_path, monkeypatch):
    (tmp_path / LOCK).write_text(json.dumps({"pid": 1, "host": "elsewhere", "start": "2026-01-01", "boot": "x"}))
    monkeypatch.setattr(lock_module, "_locks_reach_hosts", lambda path: False)
    with pytest.raises(UsageError, match="elsewhere") as found:
        RunLock(tmp_path).acquire()
    assert str(tmp_path / LOCK) in found.value.remedy
    monkeypatch.setattr(lock_module, "_locks_reach_hosts", lambda path: True)
    RunLock(tmp_path).acquire().release()


class _Windows:
    """Stands in for msvcrt: one set of locked files for all descriptors."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.locked: dict[int, int] = {}

    def locking(self, fd: int, mode: int, count: int) -> None:
        inode = os.fstat(fd).st_ino
        if mode == self.LK_UNLCK:
            del self.locked[inode]
        elif inode in self.locked:
            raise PermissionError(13, "locked")
        else:
            self.locked[inode] = fd


def test_windows(tmp_path, monkeypatch):
    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "msvcrt", _Windows())
    lock = RunLock(tmp_path).acquire()
    assert lock_holder(tmp_path)["pid"] == os.getpid()
    with pytest.raises(UsageError, match=f"process {os.getpid()}"):
        RunLock(tmp_path).acquire()
    lock.release()
    assert lock_holder(tmp_path) is None
    RunLock(tmp_path).acquire().release()


def _alive(began: str) -> dict[str, object]:
    return {"pid": os.getppid(), "host": platform.node(), "boot": boot_id(), "began": began}


@pytest.mark.parametrize(
    ("holder", "free"),
    [
        ({}, True),
        ({"pid": 2**22 + 5, "host": platform.node(), "boot": boot_id()}, True),  # no such process
        ({"pid": os.getppid(), "host": platform.node(), "boot": boot_id()}, False),
        (_alive(began=process_began(os.getppid())), False),
        (_alive(began="1"), True),  # the holder died and its number went to another process
        ({"pid": os.getppid(), "host": platform.node(), "boot": "another"}, True),
        ({"pid": os.getppid(), "host": "elsewhere", "boot": "another"}, False),
    ],
)
def test_r28_without_any_locks_the_text_decides(tmp_path, monkeypatch, holder, free):
    monkeypatch.setattr(lock_module, "fcntl", None)
    monkeypatch.setattr(lock_module, "msvcrt", None)
    if holder:
        (tmp_path / LOCK).write_text(json.dumps(holder))
    if free:
        RunLock(tmp_path).acquire().release()
    else:
        with pytest.raises(UsageError):
            RunLock(tmp_path).acquire()

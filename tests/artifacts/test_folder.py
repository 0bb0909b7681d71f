"""The atomic writer: R-03 damage, R-04 interruption, R-14 full disk, R-33 no half folder under a final name."""

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from burnish.artifacts import folder as folder_module
from burnish.artifacts.folder import (
    MANIFEST,
    DamagedFolder,
    FolderWriter,
    NewerFormat,
    clean_leftovers,
    load_manifest,
    verify_folder,
)
from burnish.errors import ResourceError, UsageError
from tests.artifacts.damage import DAMAGES, damage

FILES = {
    "model.safetensors": b"weights" * 3000,
    "optimizer.safetensors": bytes(range(256)) * 200,
    "sub/state.json": b"{}",
}


def write(final: Path, files: dict[str, bytes], step: int = 1) -> FolderWriter:
    with FolderWriter(final, kind="checkpoint", meta={"step": step}) as w:
        for name, data in files.items():
            w.write_bytes(name, data)
    return w


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("how", DAMAGES)
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
def test_r03_every_damage_to_every_file_is_found_and_named(tmp_path, name, how):
    final = tmp_path / "checkpoint-1"
    write(final, FILES)
    assert verify_folder(final).meta == {"step": 1}
    damage(final, name, how, [*FILES, MANIFEST])
    with pytest.raises(DamagedFolder) as found:
        verify_folder(final)
    first_line = str(found.value).splitlines()[0]
    assert "checkpoint-1" in first_line
    assert name in first_line or how in ("swap", "stray")
    assert found.value.exit_code != 0 and found.value.remedy


def test_r03_every_single_byte_of_the_manifest_counts(tmp_path):
    final = tmp_path / "c"
    write(final, {"a": b"1"})
    sealed = (final / MANIFEST).read_bytes()
    for at in range(len(sealed)):
        for bit in (1, 32):
            (final / MANIFEST).write_bytes(sealed[:at] + bytes([sealed[at] ^ bit]) + sealed[at + 1 :])
            with pytest.raises((DamagedFolder, NewerFormat)):
                verify_folder(final)
    (final / MANIFEST).write_bytes(sealed + b" ")
    with pytest.raises(DamagedFolder):
        verify_folder(final)


def test_r03_links_and_empty_folders(tmp_path):
    final = tmp_path / "c"
    write(final, {"a": b"1", "b": b"1"})
    (final / "b").unlink()
    (final / "b").symlink_to(final / "a")
    with pytest.raises(DamagedFolder, match="b is missing"):
        verify_folder(final)
    with pytest.raises(DamagedFolder, match="no manifest"):
        verify_folder(tmp_path / "nothing")


def test_sizes_only_is_faster_and_says_less(tmp_path):
    final = tmp_path / "c"
    write(final, FILES)
    damage(final, "model.safetensors", "flip", FILES)
    verify_folder(final, sizes_only=True)
    damage(final, "model.safetensors", "truncate", FILES)
    with pytest.raises(DamagedFolder, match=r"20,999 bytes instead of 21,000"):
        verify_folder(final, sizes_only=True)


def test_a_pinned_checkpoint_is_not_damaged(tmp_path):
    final = tmp_path / "c"
    write(final, FILES)
    (final / "pinned").touch()
    verify_folder(final)


def test_r39_a_later_format_is_refused_and_named(tmp_path):
    final = tmp_path / "c"
    write(final, FILES)
    body = json.loads((final / MANIFEST).read_bytes())
    body.update(format=99, burnish="7.0")
    (final / MANIFEST).write_text(json.dumps(body))
    with pytest.raises(NewerFormat, match=r"use burnish 7\.0 or later"):
        load_manifest(final)


def test_r04_order_of_operations(tmp_path):
    w = write(tmp_path / "c", FILES)
    operations = [op for op, _ in w.operations]
    assert operations == [
        "mkdir",
        "write",
        "fsync_file",
        "write",
        "fsync_file",
        "write",
        "fsync_file",
        "manifest",
        "fsync_dir",
        "fsync_dir",
        "rename",
        "fsync_parent",
    ]
    assert w.operations[operations.index("manifest") + 1] == ("fsync_dir", "sub")
    replaced = [op for op, _ in write(tmp_path / "c", {"x": b"2"}).operations]
    assert replaced[-3:] == ["rename", "fsync_parent", "remove_old"]
    assert not [p for p in tmp_path.iterdir() if p.name != "c"]


def test_r04_everything_is_flushed_before_the_rename_and_the_parent_after(tmp_path, monkeypatch):
    """What really reaches fsync, by file descriptor: an operation that is logged but not done would show here."""
    flushed: list[str] = []
    real_fsync, real_rename = os.fsync, Path.rename

    def fsync(fd: int) -> None:
        flushed.append(re.sub(r"\.tmp-c-\w+", "TMP", str(Path(f"/proc/self/fd/{fd}").readlink().relative_to(tmp_path))))
        real_fsync(fd)

    def rename(self: Path, target: Path) -> Path:
        flushed.append("RENAME")
        return real_rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", rename)
    with FolderWriter(tmp_path / "c", kind="x", meta={}) as w:
        w.write_bytes("a", b"1")
        w.path("sub/b").write_bytes(b"2")
    expected = ["TMP/a", "TMP/sub/b", "TMP/manifest.json", "TMP/sub", "TMP", "RENAME", "."]
    assert flushed == expected


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("before", [True, False])
def test_r04_an_exception_at_any_operation_leaves_old_or_new(tmp_path, monkeypatch, before, exchange):
    if not exchange:
        monkeypatch.setattr(folder_module, "exchange_folders", lambda one, other: False)
    old, new = {"a": b"old", "b": b"old"}, {"a": b"new", "c": b"new"}
    final = tmp_path / "checkpoint-1"
    points: list[str] = []
    nth = 0
    outcomes = set()
    while True:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        if before:
            write(final, old)
        nth, seen = nth + 1, []

        def fault(name: str, due: int = nth, seen: list[str] = seen) -> bool:
            seen.append(name)
            if len(seen) == due:
                raise RuntimeError(name)
            return False

        monkeypatch.setattr(folder_module, "fault_point", fault)
        try:
            write(final, new)
        except RuntimeError as exc:
            points.append(str(exc))
        else:
            break
        finally:
            monkeypatch.setattr(folder_module, "fault_point", lambda name: False)
        found = contents(final) if final.exists() else None
        if found is not None:
            verify_folder(final)
            found.pop(MANIFEST)
        assert found in (new, old if before else None)
        outcomes.add("new" if found == new else "old")
        assert not [p for p in tmp_path.iterdir() if p.name.startswith(".tmp-")]
    expected = {"folder.mkdir", "folder.write", "folder.fsync_file", "folder.manifest", "folder.fsync_dir"}
    expected |= {"folder.rename", "folder.fsync_parent"}
    expected |= ({"folder.remove_old"} | (set() if exchange else {"folder.move_aside"})) if before else set()
    assert set(points) == expected
    assert outcomes == {"old", "new"}


KILLED = """
import sys
from pathlib import Path
from burnish.artifacts import folder
if sys.argv[2] == "two-steps":
    folder.exchange_folders = lambda one, other: False
with folder.FolderWriter(Path(sys.argv[1]), kind="checkpoint", meta={"step": 2}) as w:
    w.write_bytes("a", b"new"); w.write_bytes("c", b"new")
"""


@pytest.mark.parametrize("how", ["exchange", "two-steps"])
def test_r04_sigkill_at_any_operation(tmp_path, how):
    """A real kill at every fault point in turn; after the next start's cleaning old or new is there, whole."""
    old, new = {"a": b"old", "b": b"old"}, {"a": b"new", "c": b"new"}
    final = tmp_path / "c"
    nth, outcomes = 0, set()
    while True:
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        write(final, old)
        nth += 1
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(final), how],
            env={**os.environ, "BURNISH_TESTING": "1", "BURNISH_FAULT": f"*:{nth}:kill"},
            check=False,
        )
        clean_leftovers(tmp_path)
        verify_folder(final)
        found = contents(final)
        found.pop(MANIFEST)
        assert found in (old, new)
        assert [p.name for p in tmp_path.iterdir()] == ["c"]
        outcomes.add("new" if found == new else "old")
        if done.returncode == 0:
            break
    assert nth > 8 and outcomes == {"old", "new"}


def test_r04_a_reader_never_sees_a_gap_while_a_folder_is_replaced(tmp_path):
    final = tmp_path / "c"
    write(final, {"a": b"0"})
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"""
import itertools, sys
from pathlib import Path
from burnish.artifacts.folder import FolderWriter
for i in itertools.count(1):
    with FolderWriter(Path({str(final)!r}), kind="x", meta={{}}) as w:
        w.write_bytes("a", str(i).encode())
""",
        ]
    )
    seen: set[str] = set()
    while len(seen) < 40:
        assert child.poll() is None
        seen.add((final / MANIFEST).read_text())
    child.kill()
    child.wait()
    clean_leftovers(tmp_path)
    verify_folder(final)


def test_an_exception_inside_the_block_changes_nothing(tmp_path):
    final = tmp_path / "c"
    write(final, {"a": b"old"})
    with pytest.raises(KeyboardInterrupt), FolderWriter(final, kind="x", meta={}) as w:
        w.write_bytes("a", b"new")
        raise KeyboardInterrupt
    verify_folder(final)
    assert contents(final)["a"] == b"old" and len(list(tmp_path.iterdir())) == 1


def test_libraries_write_into_paths_and_the_folder(tmp_path):
    with FolderWriter(tmp_path / "c", kind="model", meta={}) as w:
        w.path("deep/er/tokenizer.json").write_text("{}")
        (w.folder / "model.safetensors").write_bytes(b"w" * 10)
        w.write_json("config.json", {"a": 1})
    manifest = verify_folder(tmp_path / "c")
    assert set(manifest.files) == {"deep/er/tokenizer.json", "model.safetensors", "config.json"}
    assert manifest.size == 2 + 10 + len((tmp_path / "c/config.json").read_bytes())
    assert w.manifest == manifest


def test_a_file_that_bypasses_the_writer_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="sneaky"), FolderWriter(tmp_path / "c", kind="x", meta={}) as w:
        (w._state().temporary / "sneaky").touch()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "manifest.json", "a//b", "./a", "a\0b"])
def test_bad_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError), FolderWriter(tmp_path / "c", kind="x", meta={}) as w:
        w.write_bytes(name, b"")
    assert not list(tmp_path.iterdir())


def test_buffers_of_every_sort(tmp_path):
    import numpy as np

    array = np.arange(700_000, dtype=np.float32).reshape(700, 1000)
    with FolderWriter(tmp_path / "c", kind="x", meta={}) as w:
        w.write_bytes("array", memoryview(array))
        w.write_bytes("pieces", (array[i].data for i in range(700)))
        w.write_bytes("empty", memoryview(np.zeros((0, 4))))
        w.write_bytes("none", [])
    files = verify_folder(tmp_path / "c").files
    assert files["array"] == files["pieces"] and files["array"].size == array.nbytes
    assert files["empty"].size == files["none"].size == 0
    assert (tmp_path / "c/array").read_bytes() == array.tobytes()


def test_meta_survives_as_json(tmp_path):
    meta = {"step": 3, "nan": float("nan"), "text": "ü\ud800", "tuple": (1, 2), 5: "int key", "float": 0.1 + 0.2}
    with FolderWriter(tmp_path / "c", kind="x", meta=meta) as w:
        w.write_bytes("a", b"")
    found = verify_folder(tmp_path / "c").meta
    assert found["float"] == 0.1 + 0.2 and found["text"] == "ü\ud800" and found["5"] == "int key"


@pytest.mark.parametrize("point", ["mkdir", "write", "fsync_file", "manifest", "fsync_dir", "rename", "fsync_parent"])
def test_r14_a_full_disk_is_a_resource_error_with_figures(tmp_path, monkeypatch, point):
    final = tmp_path / "c"
    write(final, {"a": b"old"})

    def fault(name: str) -> bool:
        if name == f"folder.{point}":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return False

    monkeypatch.setattr(folder_module, "fault_point", fault)
    with pytest.raises(ResourceError) as found:
        write(final, {"a": b"new" * 1000})
    text = str(found.value)
    assert found.value.exit_code == 5
    assert str(final) in text and "are free" in text and "save_total_limit" in text
    assert point != "write" or "3,000 bytes" in text
    verify_folder(final)
    assert contents(final)["a"] == (b"new" * 1000 if point == "fsync_parent" else b"old")


def test_r14_the_space_is_checked_before_writing(tmp_path):
    with (
        pytest.raises(ResourceError, match="needs 1,000,000,000,000,000,000 bytes"),
        FolderWriter(tmp_path / "c", kind="x", meta={}, expected=10**18),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_r14_a_library_that_hides_the_full_disk(tmp_path):
    """safetensors raises an exception of its own, with the operating system's text in it."""
    with pytest.raises(ResourceError, match="No space left"), FolderWriter(tmp_path / "c", kind="x", meta={}):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(OSError, match="connection"), FolderWriter(tmp_path / "c", kind="x", meta={}):
        raise OSError("connection reset")  # of something else: passed on as it is
    assert not list(tmp_path.iterdir())


REAL_DISK = """
set -e
mount -t tmpfs -o size=2m tmpfs "$1"
"$2" - "$1" <<'PY'
import sys
from pathlib import Path
from burnish.artifacts.folder import FolderWriter, verify_folder
from burnish.errors import ResourceError
from burnish.track.metrics import MetricsLog, read_metrics
root = Path(sys.argv[1])
def save(name, size):
    with FolderWriter(root / name, kind="checkpoint", meta={"step": 1}) as w:
        w.write_bytes("a", b"x" * size)
log = MetricsLog(root / "metrics.jsonl")
log.append({"step": 0})
save("one", 1_200_000)
try:
    save("two", 1_200_000)
except ResourceError as exc:
    assert exc.exit_code == 5 and "1,200,000 bytes" in str(exc) and str(root) in str(exc), exc
else:
    raise SystemExit("no error")
verify_folder(root / "one")
assert sorted(p.name for p in root.iterdir()) == ["metrics.jsonl", "one"]
(root / "fill").write_bytes(b"")
with open(root / "fill", "wb", buffering=0) as f:
    try:
        while True: f.write(b"x" * 4096)
    except OSError: pass
rows = 1
try:
    while True:
        log.append({"step": rows, "text": "x" * 1000}); rows += 1
except ResourceError as exc:
    assert "free" in str(exc)
found, note = read_metrics(root / "metrics.jsonl")
assert len(found) == rows and note is None, (len(found), rows, note)
(root / "fill").unlink()
log.append({"step": rows})
assert len(read_metrics(root / "metrics.jsonl")[0]) == rows + 1
save("two", 500_000)
verify_folder(root / "two")
print("ok")
PY
"""


def test_r14_a_really_full_disk(tmp_path):
    probe = (
        subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    if probe is None or probe.returncode:
        pytest.skip("no private mounts here")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", REAL_DISK, "sh", str(tmp_path), sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == "ok", done.stderr


def test_r38_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def fault(name: str) -> bool:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(folder_module, "fault_point", fault)
    with pytest.raises(ResourceError, match="Read-only file system") as found:
        write(tmp_path / "c", {"a": b""})
    assert "belongs to" in str(found.value) and "--output-dir" in found.value.remedy


def test_r38_the_folder_vanishes_during_the_run(tmp_path):
    parent = tmp_path / "stage"
    with pytest.raises(ResourceError), FolderWriter(parent / "c", kind="x", meta={}) as w:
        w.write_bytes("a", b"1")
        shutil.rmtree(parent)
        w.write_bytes("b", b"2")


def test_something_else_under_the_name_is_not_replaced(tmp_path):
    (tmp_path / "c").write_text("a file")
    with pytest.raises(UsageError, match="not a folder"):
        write(tmp_path / "c", {"a": b""})
    assert (tmp_path / "c").read_text() == "a file" and len(list(tmp_path.iterdir())) == 1


def test_long_and_strange_names(tmp_path):
    for name in ("ü 日本 'x' #1 %", "n" * 250, "-rf"):
        write(tmp_path / name, {"a": b"1"})
        write(tmp_path / name, {"a": b"2"})
        verify_folder(tmp_path / name)

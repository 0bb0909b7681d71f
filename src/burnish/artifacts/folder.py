"""The one atomic writer: a folder appears under its name complete and sealed, or not at all.

Temporary sibling → files (hashed while written) → fsync → `manifest.json` last → fsync of the folder → rename →
fsync of the parent. A folder without a manifest that fits it, byte for byte, is damaged, whatever else it holds.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self, TypeVar

from burnish import __version__
from burnish.artifacts.disk import fsync_folder
from burnish.artifacts.exchange import exchange_folders
from burnish.artifacts.files import TEMPORARY, dump_json, temporary_name
from burnish.disk import check_space, disk_error, find_disk_failure
from burnish.errors import ResourceError, UsageError
from burnish.faults import fault_point

FORMAT = 1
MANIFEST = "manifest.json"
REPLACED = ".old-"
PINNED = "pinned"
_SEAL = b',\n "seal": "%s"\n}\n'
_PIECE = 1 << 20

_Result = TypeVar("_Result")
Buffer = bytes | bytearray | memoryview


class DamagedFolder(ResourceError):
    """A sealed folder whose files are not what its manifest says, or that has no manifest."""


class NewerFormat(UsageError):
    """A folder that a later version of burnish wrote."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a sealed folder: size in bytes and SHA-256 in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a sealed folder holds."""

    kind: str
    meta: dict[str, Any]
    files: dict[str, FileEntry]
    format: int = FORMAT
    burnish: str = __version__

    @property
    def size(self) -> int:
        """Bytes in all files together, without the manifest."""
        return sum(entry.size for entry in self.files.values())

    def to_bytes(self) -> bytes:
        """JSON whose last key is the SHA-256 of all the text before it: a flipped byte of the manifest shows too."""
        body: dict[str, Any] = {
            "format": self.format,
            "kind": self.kind,
            "burnish": self.burnish,
            "meta": self.meta,
            "files": {n: {"size": e.size, "sha256": e.sha256} for n, e in sorted(self.files.items())},
        }
        text = dump_json(body).removesuffix(b"\n}\n")
        return text + _SEAL % hashlib.sha256(text).hexdigest().encode()


@dataclass(slots=True)
class _Open:
    """What the writer knows while it is open."""

    temporary: Path
    files: dict[str, FileEntry] = field(default_factory=dict)
    by_library: set[str] = field(default_factory=set)


class FolderWriter:
    """Writes one folder atomically.

        with FolderWriter(stage / "checkpoint-10", kind="checkpoint", meta={"step": 10}) as w:
            w.write_bytes("model.safetensors", pieces)
            model.save_pretrained(w.path("adapter"))

    Leaving the block normally seals the folder and gives it its name; an exception removes what was written and leaves
    whatever was under that name as it was. `operations` lists what was done, in order, as (operation, name).

    Args:
        final: The name that the folder gets; something already there is replaced in one step. Its parent must exist: a
            run folder that was removed meanwhile is not made again.
        kind: What it is, e.g. "checkpoint".
        meta: Further facts for the manifest, plain JSON.
        expected: Bytes that will be written, if known: checked against the free space first.
    """

    def __init__(self, final: Path, *, kind: str, meta: dict[str, Any], expected: int | None = None) -> None:
        self.final, self.kind, self.meta, self.expected = Path(final), kind, meta, expected
        self.operations: list[tuple[str, str]] = []
        self.manifest: Manifest | None = None
        self._open: _Open | None = None

    def __enter__(self) -> Self:
        if self.expected is not None:
            check_space(self.final.parent, self.expected, what=self.final.name)
        temporary = temporary_name(self.final)
        self._open = _Open(temporary)
        try:
            self._do("mkdir", "", lambda: temporary.mkdir())
        except BaseException:
            self._drop()
            raise
        return self

    def write_bytes(self, name: str, data: Buffer | Iterable[Buffer]) -> FileEntry:
        """Write one file from bytes, a memoryview, or pieces of them; hashed on the way, flushed to the disk."""
        state, path = self._state(), self._place(name)
        pieces: Iterable[Any] = (data,) if isinstance(data, (bytes, bytearray, memoryview)) else data
        digest, size = hashlib.sha256(), 0

        def write() -> None:
            nonlocal size
            with path.open("xb") as stream:
                for piece in pieces:
                    view = memoryview(piece)
                    if not view.nbytes:
                        continue
                    view = view.cast("B")
                    for start in range(0, len(view), _PIECE):
                        part = view[start : start + _PIECE]
                        digest.update(part)
                        stream.write(part)
                        size += len(part)
                stream.flush()
                self._do("fsync_file", name, lambda: os.fsync(stream.fileno()))

        needed = memoryview(data).nbytes if isinstance(data, (bytes, bytearray, memoryview)) else None
        self._do("write", name, write, needed=needed)
        state.files[name] = FileEntry(size, digest.hexdigest())
        return state.files[name]

    def write_json(self, name: str, obj: Any) -> FileEntry:
        """Write one JSON file."""
        return self.write_bytes(name, dump_json(obj))

    def path(self, name: str) -> Path:
        """Where a library may write a file or folder of its own; hashed and flushed when the block ends."""
        place = self._place(name)
        self._state().by_library.add(name)
        return place

    @property
    def folder(self) -> Path:
        """The temporary folder itself, for libraries that write several files of their own names into one folder."""
        state = self._state()
        state.by_library.add("")
        return state.temporary

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if exc is not None:
            ours, needed = find_disk_failure(exc, self._state().temporary), self._size()
            self._drop()
            if ours is not None:
                raise disk_error(ours, self.final, doing=f"write {self.final.name}", needed=needed) from exc
            return
        try:
            self._seal()
            self._publish()
        except BaseException:
            self._drop()
            raise
        self._open = None

    def _seal(self) -> None:
        state = self._state()
        present = _regular_files(state.temporary)
        if lost := sorted(set(state.files) - present):
            gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise disk_error(gone, self.final / lost[0], doing=f"seal {self.final.name}")
        strangers = sorted(present - set(state.files))
        if strangers and not state.by_library:
            raise ValueError(f"{self.final.name}: {strangers[0]} was not written through this writer")

        def flush(name: str) -> FileEntry:
            place = state.temporary / name
            entry = hash_file(place)
            with place.open("rb+") as stream:
                os.fsync(stream.fileno())
            return entry

        def flush_all() -> None:
            state.files.update(zip(strangers, _each_file(flush, strangers, _PIECE * len(strangers))))

        if strangers:
            self._do("fsync_file", ", ".join(strangers), flush_all)
        self.manifest = Manifest(self.kind, self.meta, dict(sorted(state.files.items())))
        sealed = self.manifest.to_bytes()

        def write_manifest() -> None:
            with (state.temporary / MANIFEST).open("xb") as stream:
                stream.write(sealed)
                stream.flush()
                os.fsync(stream.fileno())

        self._do("manifest", MANIFEST, write_manifest, needed=len(sealed))
        below = sorted({parent for name in state.files for parent in PurePosixPath(name).parents if parent.name})
        for folder in reversed(below):
            self._do("fsync_dir", str(folder), lambda folder=folder: fsync_folder(state.temporary / folder))
        self._do("fsync_dir", "", lambda: fsync_folder(state.temporary))

    def _publish(self) -> None:
        state, final = self._state(), self.final
        aside: Path | None = None
        if final.is_symlink() or (final.exists() and not final.is_dir()):
            raise UsageError(
                f"{final.name} is not a folder", where=str(final), remedy="move it away, then run the command again"
            )
        if not final.exists():
            self._do("rename", final.name, lambda: state.temporary.rename(final))
        elif self._do("rename", final.name, lambda: exchange_folders(state.temporary, final)):
            aside = state.temporary  # the two names were exchanged in one step: the old folder is here now
        else:
            aside = self._replace_in_two_steps(state.temporary)
        self._do("fsync_parent", "", lambda: fsync_folder(final.parent))
        if aside is not None:
            self._do("remove_old", aside.name, lambda: shutil.rmtree(aside, ignore_errors=True))

    def _replace_in_two_steps(self, temporary: Path) -> Path:
        """Where names cannot be exchanged: a crash in between leaves `.old-…`, which `clean_leftovers` puts back."""
        aside = self.final.with_name(f"{REPLACED}{self.final.name}-{secrets.token_hex(4)}")
        self._do("move_aside", aside.name, lambda: self.final.rename(aside))
        try:
            self._do("rename", self.final.name, lambda: temporary.rename(self.final))
        except BaseException:
            if not self.final.exists():
                aside.rename(self.final)
            raise
        return aside

    def _do(self, operation: str, name: str, action: Callable[[], Any], *, needed: int | None = None) -> Any:
        self.operations.append((operation, name))
        try:
            fault_point(f"folder.{operation}")
            return action()
        except OSError as exc:
            place = self.final / name if name else self.final
            raise disk_error(exc, place, doing=f"write {self.final.name}", needed=needed or self._size()) from exc

    def _size(self) -> int | None:
        """Bytes that the folder takes, as far as that is known; None when nothing is."""
        written = sum(entry.size for entry in self._open.files.values()) if self._open else 0
        return self.expected or written or None

    def _state(self) -> _Open:
        if self._open is None:
            raise RuntimeError(f"the writer of {self.final.name} is not open")
        return self._open

    def _place(self, name: str) -> Path:
        state, pure = self._state(), PurePosixPath(name)
        bad = not pure.parts or pure.is_absolute() or ".." in pure.parts or "\0" in name or str(pure) != name
        if bad or name == MANIFEST or name in state.files:
            raise ValueError(f"{name!r} is no name for a new file in {self.final.name}")
        place = state.temporary.joinpath(*pure.parts)
        if not state.temporary.is_dir():
            gone = FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
            raise disk_error(gone, self.final, doing=f"write {self.final.name}: its folder was removed")
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
        except OSError as exc:
            raise disk_error(exc, self.final / name, doing=f"write {self.final.name}") from exc
        return place

    def _drop(self) -> None:
        if self._open is not None:
            shutil.rmtree(self._open.temporary, ignore_errors=True)
            self._open = None


def hash_file(path: Path) -> FileEntry:
    """Size and SHA-256 of a file, read once in pieces."""
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256")
        return FileEntry(stream.tell(), digest.hexdigest())


def _each_file(action: Callable[[str], _Result], names: list[str], size: int) -> Iterator[_Result]:
    """The action's result for each file, in order; large folders on several threads (hashing frees the interpreter)."""
    threads = min(len(names), 4, os.cpu_count() or 1)
    if threads < 2 or size < _PIECE:
        yield from map(action, names)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(action, names)


def _regular_files(folder: Path) -> set[str]:
    """Names of all files below `folder`, links and other oddities included, folders not."""
    names: set[str] = set()
    for place, folders, files in os.walk(folder):
        base = Path(place)
        names.update((base / n).relative_to(folder).as_posix() for n in files)
        names.update((base / n).relative_to(folder).as_posix() for n in folders if (base / n).is_symlink())
    return names


def load_manifest(path: Path) -> Manifest:
    """Read and check the manifest of a folder, without looking at the other files.

    Raises:
        DamagedFolder: There is none, or it is not exactly what a writer sealed.
        NewerFormat: A later version of burnish wrote it.
    """
    place = Path(path) / MANIFEST
    try:
        raw = place.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise _damaged(path, f"no {MANIFEST}: it was never finished, or is none of burnish's folders") from None
    except OSError as exc:
        raise _damaged(path, f"{MANIFEST} cannot be read ({os.strerror(exc.errno or 0)})") from exc
    if not raw.strip(b" \r\n\t\0"):
        raise _damaged(path, f"{MANIFEST} is empty")
    try:
        found = json.loads(raw)
        version = found["format"]
    except (ValueError, RecursionError, KeyError, TypeError):
        raise _damaged(path, f"{MANIFEST} is not readable JSON of this kind") from None
    check_format(version, found, path, FORMAT)
    try:
        files = {n: FileEntry(int(e["size"]), str(e["sha256"])) for n, e in found["files"].items()}
        manifest = Manifest(found["kind"], found["meta"], files, version, found["burnish"])
    except (KeyError, TypeError, ValueError, AttributeError):
        manifest = None
    text = raw[: -len(_SEAL % (b"0" * 64))]
    if manifest is None or raw != text + _SEAL % hashlib.sha256(text).hexdigest().encode():
        raise _damaged(path, f"{MANIFEST} was altered: its seal does not fit")
    return manifest


def check_format(version: object, found: dict[str, Any], place: Path, readable: int) -> None:
    """Refuse what a later version of burnish wrote, naming the version that reads it.

    Raises:
        NewerFormat: The format is above `readable`.
    """
    if isinstance(version, int) and not isinstance(version, bool) and version > readable:
        writer = found.get("burnish")
        raise NewerFormat(
            f"written in format {version} by burnish {writer or '(unknown)'}; this version reads up to {readable}",
            where=str(place),
            found=version,
            remedy=f"use burnish {writer} or later for this folder"
            if writer
            else "use a later burnish for this folder",
        )


def verify_folder(path: Path, *, sizes_only: bool = False) -> Manifest:
    """Check a folder against its manifest, every byte of it.

    Args:
        path: The folder.
        sizes_only: Compare sizes and names only (fast; misses altered bytes).

    Raises:
        DamagedFolder: Naming the file and how: missing, size, content, stray, or no manifest.
        NewerFormat: A later version of burnish wrote it.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    present = _regular_files(folder) - {MANIFEST}
    for name, entry in manifest.files.items():
        place = folder / name
        if name not in present or place.is_symlink() or not place.is_file():
            raise _damaged(folder, f"{name} is missing")
        if (size := place.stat().st_size) != entry.size:
            raise _damaged(folder, f"{name} has {size:,} bytes instead of {entry.size:,}")
    if strays := sorted(present - set(manifest.files) - {PINNED}):
        raise _damaged(folder, f"{strays[0]} does not belong here")
    if sizes_only:
        return manifest

    def check(name: str) -> str | None:
        try:
            fits = hash_file(folder / name) == manifest.files[name]
        except OSError as exc:
            return f"{name} cannot be read ({os.strerror(exc.errno or 0)})"
        return None if fits else f"{name} was altered: its SHA-256 differs from the manifest's"

    for problem in _each_file(check, list(manifest.files), manifest.size):
        if problem:
            raise _damaged(folder, problem)
    return manifest


def _damaged(path: Path, how: str) -> DamagedFolder:
    return DamagedFolder(
        how,
        where=str(path),
        found=how,
        remedy="use an earlier checkpoint, restore the folder from a backup, or remove it",
    )


def clean_leftovers(folder: Path) -> list[str]:
    """Remove what a killed writer left in `folder`, and put back a folder it had moved aside. Returns what was done.

    Only for the process that holds the run's lock: another one's unfinished work looks the same.

    Raises:
        ResourceError: The folder cannot be read or written.
    """
    try:
        return _clean(folder)
    except OSError as exc:
        raise disk_error(exc, folder, doing="clear up what a killed run left") from exc


def _clean(folder: Path) -> list[str]:
    done: list[str] = []
    if not folder.is_dir():
        return done
    for place in sorted(folder.iterdir()):
        if place.name.startswith(TEMPORARY):
            _remove(place)
            done.append(f"removed {place.name}, left by a run that was killed")
        elif place.name.startswith(REPLACED):
            final = place.with_name(place.name[len(REPLACED) :].rpartition("-")[0])
            if final.name and not final.exists():
                place.rename(final)
                done.append(f"put back {final.name}, which a killed run was about to replace")
            else:
                _remove(place)
                done.append(f"removed {place.name}, left by a run that was killed")
    return done


def _remove(place: Path) -> None:
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)

"""A cache of tokenised groups on disk, named by a hash of everything that they depend on.

An entry is one `.npz` file (arrays and JSON, never a pickle), written to a temporary name and renamed. An entry that
cannot be read is made again. The folder is bounded: the entries that were used longest ago go first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from burnish.core.group import Completion, Group
from burnish.faults import fault_point

LIMIT_BYTES = 4 * 10**9
_STALE_SECONDS = 86_400
_SUFFIX = ".npz"
_BAD = (OSError, ValueError, KeyError, TypeError, EOFError, IndexError, zipfile.BadZipFile)


@dataclass(frozen=True, slots=True)
class Entry:
    """A cached file: its key, size in bytes and the time of its last use (a label, from the file system)."""

    key: str
    path: Path
    size: int
    used: float


def data_folder(root: Path | None) -> Path | None:
    """Where tokenised data lie below the cache's folder (None = no cache)."""
    return None if root is None else root / "data"


@lru_cache(maxsize=1)
def code_version() -> str:
    """Hash of this package's own source: changed code makes new entries."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def build_key(parts: dict[str, Any]) -> str:
    """The name of an entry."""
    text = json.dumps({"code": code_version(), **parts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def save_entry(
    folder: Path, key: str, splits: Sequence[Sequence[Group]], meta: dict[str, Any], limit: int = LIMIT_BYTES
) -> None:
    """Write an entry, then remove the oldest ones beyond the limit.

    Raises:
        OSError: The folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    groups = [group for split in splits for group in split]
    described = {
        "key": key,
        "meta": meta,
        "splits": [len(split) for split in splits],
        "names": [[group.id, dict(group.columns), dict(group.tags)] for group in groups],
        "sizes": [[len(group.prompt), *(len(c.ids) for c in group.completions)] for group in groups],
    }
    arrays = [part for group in groups for part in (group.prompt, *(c.ids for c in group.completions))]
    masks = [completion.mask for group in groups for completion in group.completions]
    text = json.dumps(described, ensure_ascii=False).encode("utf-8", "surrogatepass")
    handle, temporary = tempfile.mkstemp(prefix=f".{key[:16]}-", suffix=".tmp", dir=folder)
    try:
        with os.fdopen(handle, "wb") as stream:
            fault_point("cache.write")
            np.savez(
                stream,
                ids=np.concatenate(arrays) if arrays else np.zeros(0, np.int32),
                mask=np.packbits(np.concatenate(masks)) if masks else np.zeros(0, np.uint8),
                described=np.frombuffer(text, dtype=np.uint8),
            )
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(folder / f"{key}{_SUFFIX}")
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _trim(folder, limit, keep=key)


def load_entry(folder: Path, key: str) -> tuple[list[list[Group]], dict[str, Any]] | None:
    """The groups of each split and the data saved with them; None when there is no entry, or it is damaged."""
    path = folder / f"{key}{_SUFFIX}"
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as archive:
            ids, mask = archive["ids"], archive["mask"]
            described = json.loads(archive["described"].tobytes().decode("utf-8", "surrogatepass"))
        if described["key"] != key:
            return None
        groups = _rebuild(described, ids, mask)
        os.utime(path)
    except _BAD:
        return None
    splits, start = [], 0
    for count in described["splits"]:
        splits.append(groups[start : start + count])
        start += count
    return splits, described["meta"]


def _rebuild(described: dict[str, Any], ids: np.ndarray, packed: np.ndarray) -> list[Group]:
    sizes = described["sizes"]
    scored = sum(sum(row[1:]) for row in sizes)
    if len(ids) != sum(map(sum, sizes)) or len(sizes) != len(described["names"]):
        raise ValueError("the entry's arrays do not fit its description")
    mask = np.unpackbits(packed, count=scored).astype(np.bool_)
    groups, at, at_mask = [], 0, 0
    for (name, columns, tags), row in zip(described["names"], sizes):
        prompt = ids[at : at + row[0]]
        at += row[0]
        completions = []
        for size in row[1:]:
            completions.append(Completion(ids[at : at + size], mask[at_mask : at_mask + size]))
            at, at_mask = at + size, at_mask + size
        groups.append(Group(name, prompt, tuple(completions), columns, tags))
    return groups


def list_entries(folder: Path) -> list[Entry]:
    """The entries, longest unused first."""
    found = []
    for path in folder.glob(f"*{_SUFFIX}") if folder.is_dir() else []:
        try:
            stat = path.stat()
        except OSError:  # removed by another process meanwhile
            continue
        found.append(Entry(path.stem, path, stat.st_size, stat.st_mtime))
    return sorted(found, key=lambda entry: (entry.used, entry.key))


def _trim(folder: Path, limit: int, keep: str) -> None:
    for left in folder.glob(".*.tmp"):  # by a process that was killed: no write takes a day
        with contextlib.suppress(OSError):
            if left.stat().st_mtime < (folder / f"{keep}{_SUFFIX}").stat().st_mtime - _STALE_SECONDS:
                left.unlink()
    entries = list_entries(folder)
    total = sum(entry.size for entry in entries)
    for entry in entries:
        if total <= limit:
            return
        if entry.key != keep:
            entry.path.unlink(missing_ok=True)
            total -= entry.size

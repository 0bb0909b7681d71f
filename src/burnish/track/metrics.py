"""Metrics as JSON Lines: one row at a time, flushed, the same bytes for the same run, and readable after any crash.

A row is `{"kind": "train", "loss": …, "step": 3, …}` with sorted keys and floats in their shortest exact form. What
differs between two equal runs (seconds, tokens per second) goes to a second file, `timing.jsonl`. Numbers that JSON has
not are the strings "NaN", "Infinity" and "-Infinity".
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from burnish.disk import disk_error
from burnish.faults import fault_point

METRICS = "metrics.jsonl"
TIMING = "timing.jsonl"
TAIL_BYTES = 1 << 16
_SPECIAL = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


class MetricsLog:
    """An append-only JSON Lines file.

    A torn last line, as a crash leaves it, is cut away when the file is opened.

    Args:
        path: The file; its folder must exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            raw = self.path.read_bytes() if self.path.exists() else b""
            self._file = self.path.open("ab", buffering=0)
            self._cut(_find_sound_length(raw))
            if self._end and raw[self._end - 1 : self._end] != b"\n":
                self._write(b"\n")
        except OSError as exc:
            raise disk_error(exc, self.path, doing=f"write {self.path.name}") from exc

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one row and hand it to the operating system.

        Raises:
            ResourceError: The disk is full or gone; the file still ends with a whole row.
        """
        line = dump_row(row)
        try:
            fault_point("metrics.write")
            self._write(line)
        except OSError as exc:
            with contextlib.suppress(OSError):
                self._cut(self._end)
            raise disk_error(exc, self.path, doing=f"write {self.path.name}", needed=len(line)) from exc

    def mark(self) -> int:
        """Make all rows durable; returns the file's length, for `cut_back`.

        Raises:
            ResourceError: The disk failed, or the file is no longer in its folder (the folder was removed).
        """
        try:
            fault_point("metrics.fsync")
            os.fsync(self._file.fileno())
            if not os.path.samestat(os.fstat(self._file.fileno()), self.path.stat()):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        except OSError as exc:
            raise disk_error(exc, self.path, doing=f"write {self.path.name}") from exc
        return self._end

    def cut_back(self, mark: int, tail: bytes = b"") -> str | None:
        """Drop every row after `mark` (those steps will be done again); write missing or damaged bytes before it again.

        Args:
            mark: What `mark()` returned when the checkpoint was made.
            tail: What `tail()` returned then: the bytes that must stand before `mark`.

        Returns:
            None, or a note when the file is not the one in which the mark was made (too short, or altered).
        """
        start = max(mark - len(tail), 0)
        kept = self.path.read_bytes()[:mark]
        if kept[start:] != tail and len(kept) >= start:
            kept = kept[:start] + tail
            self._rewrite(start, tail)
        if mark > len(kept):
            missing = mark - len(kept)
            return f"{self.path.name} is {missing:,} bytes shorter than when the checkpoint was made; rows are missing"
        end = kept.rfind(b"\n") + 1
        self._cut(end)
        return None if end == mark else f"{self.path.name} was altered: byte {mark:,} is not the end of a row"

    def tail(self) -> bytes:
        """The file's last bytes (at most 64 kB), for `cut_back` in a later start."""
        with self.path.open("rb") as file:
            file.seek(max(self._end - TAIL_BYTES, 0))
            return file.read()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _write(self, data: bytes) -> None:
        rest = memoryview(data)
        while len(rest):
            rest = rest[self._file.write(rest) or 0 :]
        self._end += len(data)

    def _rewrite(self, start: int, data: bytes) -> None:
        """Write `data` at `start` and end the file there; the length never shrinks below what is sound before it."""
        self._cut(start)
        self._write(data)

    def _cut(self, end: int) -> None:
        self._file.truncate(end)
        self._end = end


def dump_row(row: Mapping[str, Any]) -> bytes:
    """One row as bytes: sorted keys, shortest exact floats, a newline."""
    return (json.dumps(_plain(row), sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode(
        "utf-8", "surrogatepass"
    )


def _plain(value: Any) -> Any:
    if isinstance(value, (str, bool, int)) or value is None:
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return float(value)
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):  # numpy and torch numbers
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} is nothing that a row of metrics can hold")


def _restore(value: Any) -> Any:
    if isinstance(value, str):
        return _SPECIAL.get(value, value)
    if isinstance(value, dict):
        return {k: _restore(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restore(v) for v in value]
    return value


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line.decode("utf-8"))
    except (ValueError, RecursionError):
        return None
    return _restore(row) if isinstance(row, dict) else None


def _find_sound_length(raw: bytes) -> int:
    """Length of what is sound: up to the last newline, or further if the rest is a whole row without its newline."""
    sound = len(raw.rstrip(b"\0"))
    cut = raw.rfind(b"\n", 0, sound) + 1
    return sound if _parse(raw[cut:sound]) is not None else cut


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], str | None]:
    """All whole rows of a file, and a note about what was skipped (None if nothing was).

    A missing file has no rows. The last line may be torn, hold half a character or end in NUL bytes.
    """
    try:
        raw = Path(path).read_bytes()
    except FileNotFoundError:
        return [], None
    name, notes = Path(path).name, []
    stripped = raw.rstrip(b"\0")
    if len(stripped) < len(raw):
        notes.append(f"{name} ends in {len(raw) - len(stripped):,} NUL bytes")
    rows: list[dict[str, Any]] = []
    bad: list[int] = []
    lines = stripped.split(b"\n")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = _parse(line)
        if row is not None:
            rows.append(row)
        elif number == len(lines):
            notes.append(f"the last line of {name} is torn and was skipped")
        else:
            bad.append(number)
    if bad:
        some = ", ".join(map(str, bad[:5])) + (" …" if len(bad) > 5 else "")
        notes.append(f"{len(bad)} unreadable lines of {name} were skipped (line {some})")
    return rows, "; ".join(notes) or None

"""Lines of a file in bounded memory: bytes in, decoded text out; encodings and wrong formats are recognised."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

from burnish.data.problems import SKIP_REMEDY, FileError, ProblemLog, RowError

LINE_LIMIT = 32 * 2**20
_CHUNK = 1 << 20

_MAGIC: tuple[tuple[bytes, str, str], ...] = (
    (b"\x1f\x8b", "gzip data", "rename it to end in .gz (data.jsonl.gz)"),
    (b"PAR1", "a Parquet file", "rename it to end in .parquet"),
    (b"PK\x03\x04", "a zip archive (or an .xlsx sheet)", "unpack it, or export it as CSV"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "decompress it (zstd -d), or compress it with gzip"),
    (b"BZh", "bzip2 data", "decompress it (bunzip2), or compress it with gzip"),
    (b"\xfd7zXZ", "xz data", "decompress it (unxz), or compress it with gzip"),
    (b"ARROW1", "an Arrow file", "save it as Parquet or JSON Lines"),
    (b"%PDF", "a PDF", "give a .jsonl, .json, .csv or .parquet file"),
)
_BOMS: tuple[tuple[bytes, str], ...] = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
BOM = b"\xef\xbb\xbf"
DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error)


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its number from 1, its byte offset, its bytes without the line end; None = longer than the limit."""

    number: int
    offset: int
    data: bytes | None


def open_bytes(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed if its name ends in .gz."""
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def read_head(path: Path, shown: str, log: ProblemLog) -> bytes:
    """The first bytes of a text file; none: it is empty.

    Raises:
        FileError: It is not a text file in UTF-8.
        OSError, EOFError, zlib.error: It cannot be read.
    """
    with open_bytes(path) as stream:
        head = stream.read(4096)
    for magic, name, remedy in _MAGIC:
        if head.startswith(magic):
            raise FileError(f"the name says text, but byte 0 begins {name}", remedy, kind="format")
    encoding = _wide_encoding(head)
    if encoding:
        remedy = f"convert it: iconv -f {encoding} -t UTF-8"
        raise FileError(f"not UTF-8: byte 0 looks like {encoding}", remedy, kind="encoding")
    if head.startswith(BOM):
        log.note(shown, "begins with a UTF-8 byte-order mark (stripped)")
    return head


def _wide_encoding(head: bytes) -> str | None:
    for mark, name in _BOMS:
        if head.startswith(mark):
            return name
    sample = head[:200]
    if len(sample) >= 8:
        if sample[1::2].count(0) > 0.4 * len(sample) and sample[0] != 0:
            return "UTF-16LE"
        if sample[0::2].count(0) > 0.4 * len(sample) and sample[1] != 0:
            return "UTF-16BE"
    return None


def iter_lines(stream: IO[bytes], limit: int = LINE_LIMIT) -> Iterator[Line]:
    """Lines ended by LF, CRLF or a lone CR; a line over the limit comes as `data=None`, and is not kept in memory."""
    number, offset, rest, size, long = 1, 0, b"", 0, False
    first, held = True, b""
    while True:
        chunk = stream.read(_CHUNK)
        data = held + chunk
        held = b""
        if not data:
            break
        if first:
            if data.startswith(BOM):
                data, offset = data[3:], 3
            first = False
        if chunk and data.endswith(b"\r"):
            data, held = data[:-1], b"\r"
        for piece, end in _pieces(data):
            size += len(piece)
            if not long:
                long = size > limit
                rest = b"" if long else (rest + piece if rest else piece)
            if end:
                yield Line(number, offset, None if long else rest)
                number, offset, rest, size, long = number + 1, offset + size + end, b"", 0, False
        if not chunk:
            break
    if size:
        yield Line(number, offset, None if long else rest)


def _pieces(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Pieces of a chunk with the length of the line end behind them; the last one has 0."""
    if b"\r" not in data:
        *pieces, last = data.split(b"\n")
        for piece in pieces:
            yield piece, 1
        yield last, 0
        return
    for kept in data.splitlines(keepends=True):
        bare = kept.rstrip(b"\r\n")
        ends = len(kept) - len(bare)
        yield bare, ends
    if data.endswith((b"\n", b"\r")):
        yield b"", 0


def decode_line(line: Line) -> str:
    """The text of a line.

    Raises:
        RowError: It is too long or not UTF-8.
    """
    if line.data is None:
        raise RowError(
            f"this line is longer than {LINE_LIMIT // 2**20} MB",
            kind="line length",
            remedy=f"one JSON object a line; split the file; {SKIP_REMEDY}",
        )
    try:
        return line.data.decode("utf-8")
    except UnicodeDecodeError as error:
        byte, place, guess = line.data[error.start], line.offset + error.start, _guess(line.data)
        raise RowError(
            f"not UTF-8: byte 0x{byte:02x} at byte offset {place} of the file looks like {guess}",
            kind="encoding",
            remedy=f"convert the file: iconv -f {guess} -t UTF-8; {SKIP_REMEDY}",
        ) from error


def _guess(data: bytes) -> str:
    if data.count(0) > len(data) // 4:
        return "UTF-16"
    return "WINDOWS-1252" if any(0x80 <= byte <= 0x9F for byte in data) else "ISO-8859-1"

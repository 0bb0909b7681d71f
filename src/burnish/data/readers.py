"""Files to rows: JSON Lines, JSON, CSV, Parquet, plain or gzipped; every row with its file and line.

A reader yields *records* cheaply (so that a slice need not parse what it leaves out) and turns those that are wanted
into rows.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.data.lines import DAMAGED, LINE_LIMIT, Line, decode_line, iter_lines, open_bytes, read_head
from burnish.data.problems import SKIP_REMEDY, FileError, ProblemLog, RowError
from burnish.data.strict_json import as_object, parse_json, parse_row, skip_space

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ACCEPTED = ".jsonl, .json, .csv, .tsv, .parquet (each also with .gz)"
JSON_LIMIT = 2**30
_ONE_ROW = "give a file with at least one row"
_ONE_ARRAY = "a .json file holds [{…}, {…}]; one object a line is .jsonl"


@dataclass(frozen=True, slots=True)
class Row:
    """A row as it stands in the file.

    Attributes:
        file: The file as the user named it.
        line: Its line (JSON Lines, CSV), else its number, from 1.
        data: Column to value.
    """

    file: str
    line: int
    data: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Record:
    """A row that is not parsed yet."""

    line: int
    load: Callable[[], dict[str, Any]]


def file_kind(path: Path) -> str | None:
    """The kind of file by its name: one of `ENDINGS`, or None."""
    name = path.name.lower().removesuffix(".gz")
    return next((ending for ending in ENDINGS if name.endswith(ending)), None)


def iter_records(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    """The records of a file; problems that concern the whole file are logged as fatal."""
    try:
        yield from _find_reader(path)(path, shown, log)
    except FileError as error:
        log.add(error.at(shown))
    except DAMAGED as error:
        remedy = "download or compress it again"
        log.add(FileError(f"the compressed data are damaged: {error}", remedy, kind="damaged").at(shown))
    except OSError as error:
        message = f"cannot be read: {error.strerror or error}"
        log.add(FileError(message, "check the file and its permissions").at(shown))


def read_rows(
    files: Iterable[tuple[Path, str]], log: ProblemLog, span: tuple[int, int | None] = (0, None)
) -> Iterator[Row]:
    """The rows of files in order; only those whose position lies in `span`. Malformed ones go to the log.

    Args:
        files: Paths, each with the name to show.
        log: Takes the problems.
        span: First position and the one behind the last (None = to the end), counted over all files.
    """
    start, stop = span
    position = 0
    for path, shown in files:
        if stop is not None and position >= stop:
            return
        for record in iter_records(path, shown, log):
            if stop is not None and position >= stop:
                return
            position += 1
            if position <= start:
                continue
            try:
                yield Row(shown, record.line, record.load())
            except RowError as error:
                log.add(error.at(shown, record.line))


def count_rows(files: Iterable[tuple[Path, str]]) -> int:
    """How many rows the files hold (malformed ones count)."""
    return sum(_count(path, shown) for path, shown in files)


def _count(path: Path, shown: str) -> int:
    if file_kind(path) == ".parquet" and path.suffix != ".gz":
        import pyarrow as pa
        import pyarrow.parquet as pq

        try:
            return pq.ParquetFile(path).metadata.num_rows
        except (OSError, pa.ArrowException):  # the reader will say what is wrong
            return 0
    quiet = ProblemLog()
    return sum(1 for _ in iter_records(path, shown, quiet))


def _find_reader(path: Path) -> Callable[[Path, str, ProblemLog], Iterator[Record]]:
    kind = file_kind(path)
    if kind is None:
        raise FileError(f"the ending {''.join(path.suffixes) or '(none)'} is not known", f"accepted are {ACCEPTED}")
    return {".json": _json_array, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}.get(kind, _json_lines)


def _empty(head: bytes) -> FileError:
    found = "is empty" if not head else "holds only blank lines"
    return FileError(f"the file {found}", _ONE_ROW)


def _json_lines(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = read_head(path, shown, log)
    seen = 0
    with open_bytes(path) as stream:
        for line in iter_lines(stream):
            bare = line.data.strip() if line.data is not None else None
            if bare == b"":
                continue
            if not seen and bare is not None and (bare == b"[" or bare.startswith(b"[{")):
                message = "holds one JSON array, but .jsonl means one object a line"
                raise FileError(message, "rename it to end in .json", line=1)
            seen += 1
            yield Record(line.number, lambda line=line: parse_row(decode_line(line)))
    if not seen:
        raise _empty(head)


def _json_array(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = read_head(path, shown, log)
    with open_bytes(path) as stream:
        data = stream.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        raise FileError("is larger than 1 GB", "convert it to JSON Lines, which is read line by line")
    try:
        text = decode_line(Line(1, 0, data)).removeprefix("\ufeff")
    except RowError as error:
        raise FileError(error.message, error.remedy) from error
    bare = text.lstrip()
    if not bare:
        raise _empty(head)
    if bare[0] == "{":
        yield from _single_object(text, shown, log)
    elif bare[0] == "[":
        yield from _elements(text, len(text) - len(bare) + 1)
    else:
        raise FileError(f"expected an array of objects, found {bare[:20]!r}", _ONE_ARRAY, line=1)


def _single_object(text: str, shown: str, log: ProblemLog) -> Iterator[Record]:
    """A .json file that begins with an object: JSON Lines by mistake, or an array under one key."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines[:2]) and lines[0].rstrip().endswith("}"):
        message = "holds JSON Lines, but .json means one array of objects"
        raise FileError(message, "rename it to end in .jsonl", line=1)
    try:
        value = parse_row(text)
    except RowError as error:
        raise FileError(error.message, "fix the file", line=1) from error
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) != 1:
        message = f"expected an array of objects, found one object with {', '.join(list(value)[:8])}"
        raise FileError(message, _ONE_ARRAY, line=1)
    log.note(shown, f"rows are taken from the array under {lists[0]!r}; line means its element")
    for i, item in enumerate(value[lists[0]], 1):
        yield Record(i, lambda item=item: as_object(item))


def _elements(text: str, position: int) -> Iterator[Record]:
    """The elements of an array, with the line on which each begins."""
    line, counted, seen = 1, 0, 0
    while True:
        position = skip_space(text, position)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                raise FileError("further text after the array", "one array a file; one object a line is .jsonl")
            if not seen:
                raise FileError("the array is empty", _ONE_ROW)
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = parse_json(text, position)
        except RowError as error:
            remedy = "fix the file; an array cannot be read on behind such an error"
            raise FileError(error.message, remedy, line=line) from error
        seen += 1
        yield Record(line, lambda value=value: as_object(value))
        position = skip_space(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise FileError(f"expected , or ] after element {seen}", "fix the file", line=line)


def _csv(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = read_head(path, shown, log)
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    delimiter = "\t" if file_kind(path) == ".tsv" else ","
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header or not any(header):
                raise _empty(head)
            _check_header(header, delimiter)
            yield from _csv_rows(reader, header)
        except UnicodeDecodeError as error:
            message = f"not UTF-8: byte 0x{error.object[error.start]:02x} after line {reader.line_num}"
            remedy = "convert the file: iconv -f WINDOWS-1252 -t UTF-8"
            raise FileError(message, remedy, line=reader.line_num + 1) from error
        except csv.Error as error:
            remedy = "fix the quotes, or save it as JSON Lines"
            raise FileError(f"not valid CSV: {error}", remedy, line=reader.line_num) from error


def _check_header(header: list[str], delimiter: str) -> None:
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise FileError(f"the column {twice!r} stands twice in the header", "rename one of the two", line=1)
    mark = next((mark for mark in ";\t|" if mark in header[0]), None) if len(header) == 1 else None
    if mark is not None:
        message = f"the columns are divided by {mark!r}, not {delimiter!r}"
        raise FileError(message, "save it with commas (or tabs, as .tsv)", line=1)


def _csv_rows(reader: Any, header: list[str]) -> Iterator[Record]:
    seen, line = 0, reader.line_num + 1
    for fields in reader:
        start, line = line, reader.line_num + 1
        if not fields:
            continue
        seen += 1
        yield Record(start, lambda fields=fields: _csv_row(fields, header))
    if not seen:
        raise FileError("the file holds a header and no rows", _ONE_ROW)


def _csv_row(fields: list[str], header: list[str]) -> dict[str, Any]:
    if len(fields) != len(header):
        raise RowError(
            f"this row has {len(fields)} fields, the header has {len(header)}",
            kind="csv",
            remedy=f"quote fields that hold commas or line breaks; {SKIP_REMEDY}",
        )
    return {name: CsvText(value) for name, value in zip(header, fields)}


class CsvText(str):
    """A text from a CSV file, where numbers and lists are texts too."""

    __slots__ = ()


def _parquet(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    source: Any = path
    if path.suffix == ".gz":
        with open_bytes(path) as stream:
            source = io.BytesIO(stream.read())
    try:
        table = pq.ParquetFile(source)
        number = 0
        for batch in table.iter_batches(batch_size=1024):
            for values in batch.to_pylist():
                number += 1
                yield Record(number, lambda values=values: values)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
        message = f"not a readable Parquet file: {str(error)[:200]}"
        raise FileError(message, "check the file's real format; write it again") from error
    if not number:
        raise FileError("the table has no rows", _ONE_ROW)

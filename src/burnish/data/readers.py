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

from burnish.data.lines import DAMAGED, LINE_LIMIT, Line, damaged, decode_line, iter_lines, open_bytes, sniff
from burnish.data.problems import SKIP_REMEDY, Problem, ProblemLog, RowError
from burnish.data.strict_json import as_object, parse_json, parse_row

ENDINGS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
ACCEPTED = ".jsonl, .json, .csv, .tsv, .parquet (each also with .gz)"
JSON_LIMIT = 2**30


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
    kind = file_kind(path)
    reader = {
        ".jsonl": _json_lines,
        ".ndjson": _json_lines,
        ".json": _json_array,
        ".csv": _csv,
        ".tsv": _csv,
        ".parquet": _parquet,
    }.get(kind or "")
    if reader is None:
        log.add(
            _file_problem(
                shown, f"the ending {''.join(path.suffixes) or '(none)'} is not known", f"accepted are {ACCEPTED}"
            )
        )
        return
    try:
        yield from reader(path, shown, log)
    except DAMAGED as error:
        log.add(damaged(shown, error))
    except OSError as error:
        log.add(
            _file_problem(shown, f"cannot be read: {error.strerror or error}", "check the file and its permissions")
        )


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


def _file_problem(shown: str, message: str, remedy: str, line: int | None = None) -> Problem:
    return Problem(shown, line, "", message, remedy, "file", fatal=True)


def _empty(shown: str, head: bytes) -> Problem:
    found = "is empty" if not head else "holds only blank lines"
    return _file_problem(shown, f"the file {found}", "give a file with at least one row")


def _json_lines(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = sniff(path, shown, log)
    if head is None:
        return
    seen = 0
    with open_bytes(path) as stream:
        for line in iter_lines(stream):
            if line.data is not None and not line.data.strip():
                continue
            if (not seen and line.data is not None and line.data.strip() in (b"[", b"[{")) or _is_array(line, seen):
                log.add(
                    _file_problem(
                        shown,
                        "holds one JSON array, but .jsonl means one object a line",
                        "rename it to end in .json",
                        1,
                    )
                )
                return
            seen += 1
            yield Record(line.number, lambda line=line: parse_row(decode_line(line)))
    if not seen:
        log.add(_empty(shown, head))


def _is_array(line: Line, seen: int) -> bool:
    return not seen and line.data is not None and line.data.lstrip().startswith(b"[{")


def _json_array(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = sniff(path, shown, log)
    if head is None:
        return
    with open_bytes(path) as stream:
        data = stream.read(JSON_LIMIT + 1)
    if len(data) > JSON_LIMIT:
        log.add(_file_problem(shown, "is larger than 1 GB", "convert it to JSON Lines, which is read line by line"))
        return
    try:
        text = decode_line(Line(1, 0, data)).removeprefix("\ufeff")
    except RowError as error:
        log.add(_file_problem(shown, error.message, error.remedy))
        return
    bare = text.lstrip()
    if not bare:
        log.add(_empty(shown, head))
        return
    if bare[0] == "{":
        yield from _single_object(text, shown, log)
        return
    if bare[0] != "[":
        message = f"expected an array of objects, found {bare[:20]!r}"
        log.add(_file_problem(shown, message, "a .json file holds [{…}, {…}]; one object a line is .jsonl", 1))
        return
    yield from _elements(text, len(text) - len(bare) + 1, shown, log)


def _single_object(text: str, shown: str, log: ProblemLog) -> Iterator[Record]:
    """A .json file that begins with an object: JSON Lines by mistake, or an array under one key."""
    lines = [line for line in text.splitlines() if line.strip()]
    if len(lines) > 1 and all(line.lstrip().startswith("{") for line in lines[:2]) and lines[0].rstrip().endswith("}"):
        log.add(
            _file_problem(
                shown, "holds JSON Lines, but .json means one array of objects", "rename it to end in .jsonl", 1
            )
        )
        return
    try:
        value = parse_row(text)
    except RowError as error:
        log.add(_file_problem(shown, error.message, "fix the file", 1))
        return
    lists = [key for key, item in value.items() if isinstance(item, list) and item and isinstance(item[0], dict)]
    if len(lists) != 1:
        message = f"expected an array of objects, found one object with {', '.join(list(value)[:8])}"
        log.add(_file_problem(shown, message, "a .json file holds [{…}, {…}]; one object a line is .jsonl", 1))
        return
    log.note(shown, f"rows are taken from the array under {lists[0]!r}; line means its element")
    for i, item in enumerate(value[lists[0]], 1):
        yield Record(i, lambda item=item: as_object(item))


def _elements(text: str, position: int, shown: str, log: ProblemLog) -> Iterator[Record]:
    """The elements of an array, with the line on which each begins."""
    line, counted, seen = 1, 0, 0
    while True:
        position = _after_space(text, position)
        if text[position : position + 1] == "]":
            if text[position + 1 :].strip():
                log.add(
                    _file_problem(
                        shown, "further text after the array", "one array a file; one object a line is .jsonl"
                    )
                )
            elif not seen:
                log.add(_file_problem(shown, "the array is empty", "give a file with at least one row"))
            return
        line += text.count("\n", counted, position)
        counted = position
        try:
            value, position = parse_json(text, position)
        except RowError as error:
            log.add(
                _file_problem(
                    shown, error.message, "fix the file; an array cannot be read on behind such an error", line
                )
            )
            return
        seen += 1
        yield Record(line, lambda value=value: as_object(value))
        position = _after_space(text, position)
        if text[position : position + 1] == ",":
            position += 1
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            log.add(_file_problem(shown, f"expected , or ] after element {seen}", "fix the file", line))
            return


def _after_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _csv(path: Path, shown: str, log: ProblemLog) -> Iterator[Record]:
    head = sniff(path, shown, log)
    if head is None:
        return
    csv.field_size_limit(max(csv.field_size_limit(), LINE_LIMIT))
    delimiter = "\t" if file_kind(path) == ".tsv" else ","
    with open_bytes(path) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header or not any(header):
                log.add(_empty(shown, head))
                return
            if not _check_header(header, delimiter, shown, log):
                return
            yield from _csv_rows(reader, header, shown, log)
        except UnicodeDecodeError as error:
            message = f"not UTF-8: byte 0x{error.object[error.start]:02x} after line {reader.line_num}"
            log.add(
                _file_problem(shown, message, "convert the file: iconv -f WINDOWS-1252 -t UTF-8", reader.line_num + 1)
            )
        except csv.Error as error:
            log.add(
                _file_problem(
                    shown, f"not valid CSV: {error}", "fix the quotes, or save it as JSON Lines", reader.line_num
                )
            )


def _check_header(header: list[str], delimiter: str, shown: str, log: ProblemLog) -> bool:
    twice = [name for name in dict.fromkeys(header) if header.count(name) > 1]
    if twice:
        log.add(_file_problem(shown, f"the column {twice[0]!r} stands twice in the header", "rename one of the two", 1))
        return False
    if len(header) == 1 and any(mark in header[0] for mark in ";\t|"):
        mark = next(mark for mark in ";\t|" if mark in header[0])
        log.add(
            _file_problem(
                shown,
                f"the columns are divided by {mark!r}, not {delimiter!r}",
                "save it with commas (or tabs, as .tsv)",
                1,
            )
        )
        return False
    return True


def _csv_rows(reader: Any, header: list[str], shown: str, log: ProblemLog) -> Iterator[Record]:
    seen, line = 0, reader.line_num + 1
    for fields in reader:
        start, line = line, reader.line_num + 1
        if not fields:
            continue
        seen += 1
        yield Record(start, lambda fields=fields: _csv_row(fields, header))
    if not seen:
        log.add(_file_problem(shown, "the file holds a header and no rows", "give a file with at least one row"))


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
        log.add(
            _file_problem(
                shown,
                f"not a readable Parquet file: {str(error)[:200]}",
                "check the file's real format; write it again",
            )
        )
        return
    if not number:
        log.add(_file_problem(shown, "the table has no rows", "give a file with at least one row"))

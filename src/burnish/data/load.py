"""Sources to examples: read, map columns, normalise, note duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace

from burnish.data.columns import ColumnMapping, apply_mapping
from burnish.data.example import Example, Reading, content_text, identical, refuse_identical
from burnish.data.formats import normalise
from burnish.data.problems import SKIP_REMEDY, ProblemLog, RowDropped, RowError, row_name
from burnish.data.readers import Row
from burnish.data.report import SplitReport
from burnish.data.slices import Split
from burnish.data.sources import Source


def load_examples(
    source: Source,
    split: Split,
    reading: Reading,
    mapping: ColumnMapping | None,
    log: ProblemLog,
    report: SplitReport,
    *,
    drop_identical: bool = False,
) -> list[Example]:
    """The examples of a split; malformed rows go to the log and the report."""
    refused = report.malformed.count
    with log.counting(report.refuse):
        found = list(iter_examples(source, split, reading, mapping, log, report, drop_identical))
    report.rows_read += report.malformed.count - refused
    _count_duplicates(found, report)
    return found


def iter_examples(
    source: Source,
    split: Split,
    reading: Reading,
    mapping: ColumnMapping | None,
    log: ProblemLog,
    report: SplitReport,
    drop_identical: bool,
) -> Iterator[Example]:
    """The examples of a split one by one; malformed rows go to the log."""
    if mapping is not None and mapping.chat and reading.format == "auto":
        reading = replace(reading, format="instruct")
    ids: dict[str, str] = {}
    for row in source.rows(split, log):
        try:
            _check_id(row, ids)
            example = normalise(Row(row.file, row.line, apply_mapping(row.data, mapping)), reading)
        except RowDropped as dropped:
            log.drop(dropped.at(row.file, row.line))
            continue
        except RowError as error:
            log.add(error.at(row.file, row.line))
            continue
        if identical(example) and not drop_identical:
            log.add(refuse_identical(example))
            continue
        report.rows_read += 1
        if identical(example):
            report.identical.add(example.place)
            continue
        example.source = source.name
        yield example


def _check_id(row: Row, ids: dict[str, str]) -> None:
    value = row.data.get("id")
    if not isinstance(value, str | int) or isinstance(value, bool):
        return
    key, place = f"{type(value).__name__}:{value}", row_name(row.file, row.line)
    if key in ids:
        raise RowError(
            f"the id {value!r} stands at {ids[key]} already",
            kind="duplicate id",
            field="id",
            remedy=f"give each row an id of its own, or remove the column; {SKIP_REMEDY}",
        )
    ids[key] = place


def _count_duplicates(examples: list[Example], report: SplitReport) -> None:
    seen: dict[bytes, str] = {}
    for example in examples:
        key = hashlib.blake2b(content_text(example).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in seen:
            report.duplicates.add(f"{example.place} (= {seen[key]})")
        else:
            seen[key] = example.place

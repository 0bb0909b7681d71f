"""Readers of all file kinds (D-01, D-04 … D-08)."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.problems import ProblemLog
from burnish.data.readers import count_rows, file_kind, read_rows
from tests.data.toys import write_lines

ROWS = [{"prompt": f"p{i}", "completion": f'c {i}, with "quotes"\nand lines'} for i in range(7)]


def read(path: Path, **options: Any) -> tuple[list[tuple[int, dict[str, Any]]], ProblemLog]:
    log = ProblemLog()
    return [(row.line, row.data) for row in read_rows([(path, path.name)], log, **options)], log


def write_as(path: Path, kind: str) -> None:
    if kind == ".jsonl":
        data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    elif kind == ".json":
        data = json.dumps(ROWS, indent=1).encode()
    elif kind in (".csv", ".tsv"):
        text = io.StringIO()
        writer = csv.DictWriter(text, ["prompt", "completion"], delimiter="\t" if kind == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(ROWS)
        data = text.getvalue().encode()
    else:
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(ROWS), buffer)
        data = buffer.getvalue()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("compressed", ["", ".gz"])
def test_every_kind_gives_the_same_rows(tmp_path: Path, kind: str, compressed: str) -> None:
    path = tmp_path / f"a{kind}{compressed}"
    write_as(path, kind)
    rows, log = read(path)
    assert [data for _, data in rows] == ROWS
    assert log.total == 0
    assert count_rows([(path, "a")]) == len(ROWS)
    sliced, _ = read(path, span=(2, 5))
    assert [data for _, data in sliced] == ROWS[2:5]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('a,b\n1,"x\ny"\n\n2,z\n')
    rows, _ = read(path)
    assert [line for line, _ in rows] == [2, 5]
    path = tmp_path / "a.json"
    path.write_text('[\n {"a": 1},\n\n {"a": 2}, {"a": 3}\n]')
    assert [line for line, _ in read(path)[0]] == [2, 4, 4]


def test_slices_reach_over_files_and_do_not_parse_what_they_leave_out(tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"n": 0}, "broken", {"n": 2}])
    second = write_lines(tmp_path / "b.jsonl", [{"n": 3}, "broken", {"n": 5}])
    files = [(Path(first), "a"), (Path(second), "b")]
    log = ProblemLog()
    assert [row.data["n"] for row in read_rows(files, log, (2, 4))] == [2, 3]
    assert log.total == 0
    assert [row.data["n"] for row in read_rows(files, log, (1, None))] == [2, 3, 5]
    assert [(p.file, p.line) for p in log.problems] == [("a", 2), ("b", 2)]


def test_d01_a_broken_line_in_the_middle(tmp_path: Path) -> None:
    rows: list[Any] = [{"text": str(i)} for i in range(20)]
    rows[6] = '{"text": "six'
    path = Path(write_lines(tmp_path / "a.jsonl", rows))
    found, log = read(path)
    assert len(found) == 19
    (problem,) = log.problems
    assert (problem.line, problem.kind) == (7, "json")
    assert "column 10" in problem.message
    assert "fix or set on_error: skip (then counted and reported)" in problem.remedy


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", "", "the file is empty"),
        ("a.jsonl", "\n  \n\r\n", "only blank lines"),
        ("a.json", "", "the file is empty"),
        ("a.json", "[]", "the array is empty"),
        ("a.json", '{"a": 1}\n{"a": 2}\n', "holds JSON Lines"),
        ("a.json", '{"a": 1}', "expected an array of objects"),
        ("a.json", '"text"', "expected an array of objects"),
        ("a.json", '[{"a": 1} {"a": 2}]', "expected , or ]"),
        ("a.json", '[{"a": 1}] x', "further text after the array"),
        ("a.json", '[{"a": 1},', "not valid JSON"),
        ("a.json", '[{"a": 1}', "expected , or ]"),
        ("a.jsonl", '[{"a": 1}, {"a": 2}]', "holds one JSON array"),
        ("a.jsonl", '[\n{"a": 1}\n]', "holds one JSON array"),
        ("a.csv", "a,b\n", "a header and no rows"),
        ("a.csv", "", "the file is empty"),
        ("a.csv", "a;b\n1;2\n", "divided by ';'"),
        ("a.csv", "a,a\n1,2\n", "'a' stands twice"),
        ("a.csv", 'a,b\n1,"2\n', "not valid CSV"),
        ("a.parquet", "no parquet", "not a readable Parquet file"),
        ("a.txt", "hello", "the ending .txt is not known"),
    ],
)
def test_d04_whole_files_that_cannot_be_read(tmp_path: Path, name: str, content: str, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content.encode())
    _, log = read(path)
    assert log.fatal and words in log.fatal[0].message
    assert log.fatal[0].remedy


def test_json_under_one_key_is_read_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps({"version": 1, "data": ROWS}))
    rows, log = read(path)
    assert [data for _, data in rows] == ROWS and "'data'" in next(iter(log.notes))


def test_csv_rows_of_the_wrong_length(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n1,2\n1,2,3\n1,2\n")
    rows, log = read(path)
    assert len(rows) == 2 and log.problems[0].line == 3 and "3 fields, the header has 2" in log.problems[0].message


def test_d08_csv_in_latin_1(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes("a,b\n1,café\n".encode("latin-1"))
    _, log = read(path)
    assert log.fatal[0].kind == "file" and "0xe9" in log.fatal[0].message and "iconv" in log.fatal[0].remedy


def test_missing_files_and_folders(tmp_path: Path) -> None:
    _, log = read(tmp_path / "none.jsonl")
    assert "cannot be read" in log.fatal[0].message
    assert file_kind(Path("A.JSONL.GZ")) == ".jsonl" and file_kind(Path("a.xlsx")) is None


texts = st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=20)


@given(st.lists(st.dictionaries(st.sampled_from(["a", "b", "c"]), texts, min_size=1), min_size=1, max_size=8))
def test_json_lines_round_trip(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, str]]) -> None:
    path = tmp_path_factory.mktemp("lines") / "a.jsonl"
    write_lines(path, rows)
    found, log = read(path)
    assert [data for _, data in found] == rows and not log.total


@given(st.binary(max_size=200), st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz"]))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes, ending: str) -> None:
    path = tmp_path_factory.mktemp("bytes") / f"a{ending}"
    path.write_bytes(data)
    rows, log = read(path)
    assert rows or log.total
    assert all(problem.remedy for problem in log.problems)

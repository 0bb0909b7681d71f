"""Lines, line ends, encodings, the limit (D-05 … D-09)."""

import gzip
import io
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data import lines
from burnish.data.lines import iter_lines
from burnish.data.problems import ProblemLog
from burnish.data.readers import read_rows


class Dribble(io.BytesIO):
    """Gives a few bytes at a time, so that borders of chunks fall anywhere."""

    def __init__(self, data: bytes, seed: int) -> None:
        super().__init__(data)
        self.random = random.Random(seed)

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(self.random.randint(1, 4))


@given(st.lists(st.sampled_from([b"a", b"bc", b"\n", b"\r\n", b"\r", b"\xc3\xa9"]), max_size=30), st.integers(0, 99))
def test_d06_lines_do_not_depend_on_chunks(pieces: list[bytes], seed: int) -> None:
    data = b"".join(pieces)
    found = list(iter_lines(Dribble(data, seed)))
    expected = re.split(rb"\r\n|\r|\n", data)
    if expected and not expected[-1]:
        expected.pop()
    assert [line.data for line in found] == expected
    assert [line.number for line in found] == list(range(1, len(expected) + 1))
    for line in found:
        assert line.data is not None
        assert data[line.offset : line.offset + len(line.data)] == line.data


@given(st.integers(0, 40), st.integers(0, 99))
def test_d09_long_lines_are_named_and_passed_over(size: int, seed: int) -> None:
    data = b"one\n" + b"x" * size + b"\nthree"
    found = list(iter_lines(Dribble(data, seed), limit=20))
    assert [line.data for line in found] == [b"one", b"x" * size if size <= 20 else None, b"three"]


def test_d05_byte_order_mark_is_stripped_with_a_note(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"prompt": "a"}\n')
    log = ProblemLog()
    rows = list(read_rows([(path, "a.jsonl")], log))
    assert rows[0].data == {"prompt": "a"}
    assert log.total == 0 and "byte-order mark" in next(iter(log.notes))


@pytest.mark.parametrize("end", [b"\r\n", b"\r", b"\n"])
@pytest.mark.parametrize("last", [True, False])
def test_d06_line_ends_are_accepted_and_contents_kept(tmp_path: Path, end: bytes, last: bool) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a\\r\\nb\\rc "}' + end + end + b'{"text": "d"}' + (end if last else b""))
    log = ProblemLog()
    rows = list(read_rows([(path, "a.jsonl")], log))
    assert [(row.line, row.data["text"]) for row in rows] == [(1, "a\r\nb\rc "), (3, "d")]
    assert not log.total


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (gzip.compress(b"{}", mtime=0), "gzip"),
        (b"PAR1....", "Parquet"),
        (b"PK\x03\x04....", "zip"),
        ('{"a": 1}'.encode("utf-16"), "UTF-16"),
        ('{"a": "some longer text"}'.encode("utf-16-le"), "UTF-16LE"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
    ],
)
def test_d08_other_formats_are_recognised(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(data)
    log = ProblemLog("skip")
    assert not list(read_rows([(path, "a.jsonl")], log))
    assert log.problems[0].fatal and words in log.problems[0].message and "byte 0" in log.problems[0].message


def test_d08_latin_1_gives_the_byte_offset(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    log = ProblemLog()
    assert len(list(read_rows([(path, "a.jsonl")], log))) == 1
    (problem,) = log.problems
    assert problem.line == 2
    assert "byte 0xe9 at byte offset 27" in problem.message and "ISO-8859-1" in problem.message
    assert path.read_bytes()[27] == 0xE9


def test_damaged_gzip_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 5000)[:-20])
    log = ProblemLog("skip")
    list(read_rows([(path, "a.jsonl.gz")], log))
    assert log.fatal and "damaged" in log.fatal[0].message


def test_d09_a_200_mb_line_is_named_in_bounded_memory(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    with path.open("wb") as stream:
        stream.write(b'{"text": "a"}\n{"text": "')
        for _ in range(200):
            stream.write(b"x" * 2**20)
        stream.write(b'"}\n{"text": "b"}\n')
    code = (
        "import re, sys; from pathlib import Path\n"
        "from burnish.data.readers import read_rows; from burnish.data.problems import ProblemLog\n"
        "log = ProblemLog('skip'); rows = list(read_rows([(Path(sys.argv[1]), 'long.jsonl')], log))\n"
        "status = Path('/proc/self/status')\n"
        "peak = re.search(r'VmHWM:\\s+(\\d+)', status.read_text()).group(1) if status.exists() else 0\n"
        "print(len(rows), log.problems[0].line, int(peak) // 1024)\n"
        "print(log.problems[0].message, '|', log.problems[0].remedy)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    path.unlink()
    rows, line, megabytes = map(int, done.stdout.splitlines()[0].split())
    assert (rows, line) == (2, 2)
    assert megabytes < 300
    assert f"longer than {lines.LINE_LIMIT // 2**20} MB" in done.stdout and "split the file" in done.stdout

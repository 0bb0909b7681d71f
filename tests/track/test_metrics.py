"""Metrics files: the same bytes for the same run, and readable after any crash (R-34)."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest

from burnish.errors import ResourceError
from burnish.track import metrics as metrics_module
from burnish.track.metrics import MetricsLog, dump_row, read_metrics

ROWS = [
    {"step": i, "kind": "train", "loss": 2.5 / (i + 1), "note": "größer 日本 😀", "dpo/margin": float(i)}
    for i in range(12)
]


def test_bytes_do_not_depend_on_the_order_of_keys_or_the_type_of_number():
    np = pytest.importorskip("numpy")
    row = {"loss": 0.1, "step": 3, "kind": "train"}
    assert dump_row(row) == dump_row(dict(reversed(row.items()))) == b'{"kind": "train", "loss": 0.1, "step": 3}\n'
    assert dump_row({"loss": np.float64(0.1), "step": np.int64(3), "kind": "train"}) == dump_row(row)
    assert dump_row({"x": 1 / 3, "y": 1e-20, "z": -0.0}) == b'{"x": 0.3333333333333333, "y": 1e-20, "z": -0.0}\n'
    with pytest.raises(TypeError):
        dump_row({"x": object()})


def test_numbers_that_json_has_not(tmp_path):
    with MetricsLog(tmp_path / "m") as log:
        log.append({"a": math.nan, "b": math.inf, "c": [-math.inf], "d": {"e": math.nan}})
    json.loads((tmp_path / "m").read_text(), parse_constant=lambda c: pytest.fail(f"not JSON: {c}"))
    (row,), note = read_metrics(tmp_path / "m")
    assert math.isnan(row["a"]) and row["b"] == math.inf and row["c"] == [-math.inf] and math.isnan(row["d"]["e"])
    assert note is None


def test_r34_cut_at_every_byte_of_the_last_300(tmp_path):
    whole = b"".join(map(dump_row, ROWS))
    path = tmp_path / "metrics.jsonl"
    for cut in range(len(whole) - 300, len(whole) + 1):
        for tail in (b"", b"\0" * 7):
            path.write_bytes(whole[:cut] + tail)
            rows, note = read_metrics(path)
            complete = whole[:cut].count(b"\n")
            assert rows[:complete] == ROWS[:complete] and len(rows) in (complete, complete + 1)
            if len(rows) == complete + 1:  # all but the newline is there
                assert whole[cut : cut + 1] == b"\n" and rows == ROWS[: complete + 1]
            assert (note is None) == (tail == b"" and (whole[cut - 1 : cut] == b"\n" or len(rows) == complete + 1))
            with MetricsLog(path) as log:  # a start after the crash goes on cleanly
                log.append({"next": 1})
            after, note = read_metrics(path)
            assert note is None and after == [*rows, {"next": 1}]


def test_r34_resume_cuts_back_to_the_mark(tmp_path):
    path = tmp_path / "m"
    with MetricsLog(path) as log:
        for row in ROWS[:5]:
            log.append(row)
        mark = log.mark()
        for row in ROWS[5:8]:
            log.append(row)
    path.write_bytes(path.read_bytes() + b'{"torn')
    with MetricsLog(path) as log:
        assert log.cut_back(mark) is None
        for row in ROWS[5:]:
            log.append(row)
        assert log.mark() == path.stat().st_size
    assert path.read_bytes() == b"".join(map(dump_row, ROWS))


def test_r34_marks_that_do_not_fit_are_noted(tmp_path):
    path = tmp_path / "m"
    with MetricsLog(path) as log:
        for row in ROWS[:3]:
            log.append(row)
        end = log.mark()
        assert "shorter" in (log.cut_back(end + 10) or "")
        assert read_metrics(path)[0] == ROWS[:3]
        assert "not the end of a row" in (log.cut_back(end - 4) or "")
        assert read_metrics(path) == (ROWS[:2], None)
        assert log.cut_back(0) is None and path.read_bytes() == b""
        log.append(ROWS[0])
    assert read_metrics(path) == (ROWS[:1], None)


def test_r34_bad_lines_in_the_middle_are_counted(tmp_path):
    path = tmp_path / "m"
    path.write_bytes(dump_row(ROWS[0]) + b"\xff\xfe\n" + dump_row(ROWS[1]) + b"[1, 2]\n\n" + b"[" * 100_000 + b"\n")
    rows, note = read_metrics(path)
    assert rows == ROWS[:2] and note == "3 unreadable lines of m were skipped (line 2, 4, 6)"
    assert read_metrics(tmp_path / "absent") == ([], None)


def test_every_row_is_there_after_a_kill(tmp_path):
    path = tmp_path / "m"
    code = f"""
import os, signal
from pathlib import Path
from burnish.track.metrics import MetricsLog
log = MetricsLog(Path({str(path)!r}))
for i in range(100): log.append({{"step": i}})
os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code], check=False)
    assert read_metrics(path) == ([{"step": i} for i in range(100)], None)


def test_r14_a_full_disk_stops_loudly_and_leaves_whole_rows(tmp_path, monkeypatch):
    path = tmp_path / "m"
    log = MetricsLog(path)
    log.append(ROWS[0])
    real = log._file

    class Full:
        def write(self, data: memoryview) -> int:
            if len(data) > 5:
                return real.write(data[:5])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def truncate(self, end: int) -> int:
            return real.truncate(end)

    log._file = Full()  # type: ignore[assignment]
    with pytest.raises(ResourceError, match="free") as found:
        log.append(ROWS[1])
    assert found.value.exit_code == 5 and str(path) in str(found.value)
    assert read_metrics(path) == (ROWS[:1], None)
    log._file = real
    log.append(ROWS[1])
    assert read_metrics(path) == (ROWS[:2], None)


def test_r14_hooks(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "m")

    def fault(name: str) -> bool:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(metrics_module, "fault_point", fault)
    for action in (lambda: log.append({}), log.mark):
        with pytest.raises(ResourceError):
            action()
    with pytest.raises(ResourceError):
        MetricsLog(tmp_path / "absent" / "m")

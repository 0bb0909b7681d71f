"""The logger: S2-17 (colours, SUCCESS, no duplicates), S0-28 (ranks), R-29 (secrets), R-36 (clocks)."""

import io
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import burnish
from burnish.artifacts.redact import redact
from burnish.errors import ResourceError
from burnish.track import log as log_module
from burnish.track.log import (
    SUCCESS,
    attach_log_file,
    check_log_file,
    detach_log_file,
    get_logger,
    memory_text,
    setup_logging,
    success,
    wants_colour,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def clean(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    logger = logging.getLogger("burnish")
    before = list(logger.handlers), logger.level, logger.propagate
    yield
    detach_log_file()
    logger.handlers[:], logger.level, logger.propagate = before


def test_s2_17_colours_and_success_and_no_duplicates():
    out = Terminal()
    for _ in range(3):
        setup_logging(redact=redact, stream=out)
    get_logger().info("plain")
    success("saved %d", 3)
    get_logger("engine").warning("careful")
    get_logger().error("bad")
    get_logger().debug("unseen")
    assert (
        out.getvalue() == "plain\n\x1b[32msaved 3\x1b[0m\n\x1b[33mwarning: careful\x1b[0m\n\x1b[31merror: bad\x1b[0m\n"
    )
    assert SUCCESS == 25 and logging.getLevelName(25) == "SUCCESS"


def test_s2_17_no_color_and_pipes(monkeypatch):
    plain = io.StringIO()
    setup_logging(redact=redact, stream=plain)
    success("a")
    assert plain.getvalue() == "a\n"
    monkeypatch.setenv("NO_COLOR", "1")
    out = Terminal()
    setup_logging(redact=redact, stream=out)
    success("a")
    assert out.getvalue() == "a\n"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setenv("TERM", "dumb")
    assert not wants_colour(Terminal())
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert wants_colour(io.StringIO())


def test_s2_17_nothing_reaches_the_root_logger():
    seen: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = seen.append  # type: ignore[method-assign]
    logging.getLogger().addHandler(handler)
    try:
        setup_logging(redact=redact, stream=io.StringIO())
        get_logger().warning("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert seen == []


def test_s0_28_other_ranks_only_warn_and_say_who_they_are(tmp_path, monkeypatch):
    out = io.StringIO()
    monkeypatch.setenv("RANK", "3")
    setup_logging(1, redact=redact, stream=out)
    attach_log_file(tmp_path / "log.txt", redact=redact)
    get_logger().info("unseen")
    success("unseen")
    get_logger().warning("seen")
    assert re.fullmatch(r"\[rank 3\] warning: seen  \[rss .*\]\n", out.getvalue())
    assert not (tmp_path / "log.txt").exists()


def test_s0_28_two_processes(tmp_path):
    code = """
from burnish.track.log import get_logger, setup_logging
setup_logging(redact=str)
get_logger().info("hello"); get_logger().warning("careful")
"""
    seen = {}
    for rank in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code], env={**os.environ, "RANK": rank}, capture_output=True, text=True, check=True
        )
        seen[rank] = done.stderr
    assert seen["0"] == "hello\nwarning: careful\n"
    assert seen["1"] == "[rank 1] warning: careful\n"


def test_levels():
    for verbosity, expected in ((-1, ["w"]), (0, ["i", "w"]), (1, ["d", "i", "w"])):
        out = io.StringIO()
        setup_logging(verbosity, redact=redact, stream=out, colour=False)
        get_logger().debug("d"), get_logger().info("i"), get_logger().warning("w")
        assert [line.split("  ")[0].removeprefix("warning: ") for line in out.getvalue().splitlines()] == expected


def test_verbose_lines_say_how_much_memory():
    """S4-29: memory in verbose logs, of the process and of the GPU."""
    assert re.match(r"rss [\d,]+ MB", memory_text())
    out = io.StringIO()
    setup_logging(1, redact=redact, stream=out)
    get_logger().info("x")
    assert re.fullmatch(r"x  \[rss [1-9][\d,]* MB.*\]\n", out.getvalue())


def test_gpu_memory_is_told_when_torch_uses_one(monkeypatch):
    class Cuda:
        is_available = is_initialized = staticmethod(lambda: True)
        memory_allocated = staticmethod(lambda: 3_100_000_000)
        max_memory_allocated = staticmethod(lambda: 4_000_000_000)

    monkeypatch.setitem(sys.modules, "torch", type("torch", (), {"cuda": Cuda}))
    assert memory_text().endswith("gpu 3.1 GB (peak 4.0 GB)")


def test_the_log_file_has_everything_with_time_and_level(tmp_path):
    out = io.StringIO()
    setup_logging(-1, redact=redact, stream=out)
    for _ in range(2):  # attached twice, written once
        attach_log_file(tmp_path / "log.txt", redact=redact)
    get_logger().info("größer 😀 \ud800")
    get_logger().debug("detail")
    success("done")
    detach_log_file()
    get_logger().warning("later")
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    assert len(lines) == 3 and out.getvalue() == "warning: later\n"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\S* INFO     größer 😀 \\ud800", lines[0])
    assert "DEBUG" in lines[1] and "rss" in lines[1] and "SUCCESS  done" in lines[2]
    attach_log_file(tmp_path / "log.txt", redact=redact)
    get_logger().info("appended")
    assert len((tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()) == 4


def test_r29_secrets_in_messages_and_tracebacks(tmp_path):
    out = io.StringIO()
    setup_logging(redact=redact, stream=out)
    attach_log_file(tmp_path / "log.txt", redact=redact)
    token = "hf_canary0123456789canary"
    try:
        raise RuntimeError(f"401 for {token}")
    except RuntimeError:
        get_logger().exception("with %s", token)
    for text in (out.getvalue(), (tmp_path / "log.txt").read_text()):
        assert token not in text and "Traceback" in text and "***" in text


def test_r35_the_log_file_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(log_module, "LOG_BYTES", 20_000)
    attach_log_file(tmp_path / "log.txt", redact=redact)
    for i in range(1000):
        get_logger().info("line %d", i)
    files = list(tmp_path.iterdir())
    assert len(files) == 2 and sum(p.stat().st_size for p in files) < 25_000


def test_a_log_that_cannot_be_written_is_said_once_and_remembered(tmp_path, capsys):
    attach_log_file(tmp_path / "absent" / "log.txt", redact=redact)
    check_log_file()
    get_logger().info("one")
    get_logger().info("two")
    assert capsys.readouterr().err.count("cannot write log.txt") == 1
    with pytest.raises(ResourceError, match=r"log\.txt"):
        check_log_file()


def test_r34_a_torn_line_of_the_log_ends_before_the_next(tmp_path):
    (tmp_path / "log.txt").write_bytes(b"whole\ntorn \xe6\x97")
    attach_log_file(tmp_path / "log.txt", redact=redact)
    get_logger().info("next")
    lines = (tmp_path / "log.txt").read_bytes().splitlines()
    assert lines[:2] == [b"whole", b"torn \xe6\x97"] and lines[2].endswith(b"next")


def test_r36_no_wall_clock_in_durations():
    """`time.time` appears nowhere in these packages: durations come from `clock.mono`, labels from `clock.wall`."""
    root = Path(burnish.__file__).parent
    files = [p for package in ("artifacts", "track", "report") for p in (root / package).rglob("*.py")]
    assert len(files) > 15
    for path in files:
        assert not re.search(r"\btime\.time\b|from time import .*\btime\b|perf_counter", path.read_text()), path

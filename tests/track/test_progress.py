"""Progress: a bar on a terminal, lines elsewhere, nothing when quiet; steady under clock jumps (R-36)."""

import io
import logging
import time

import pytest

from burnish.track import progress as progress_module
from burnish.track.log import get_logger, setup_logging
from burnish.track.progress import Progress, format_count, format_figure, pick_figures


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(progress_module, "mono", clock)
    return clock


@pytest.fixture
def lines():
    logger = logging.getLogger("burnish")
    before = list(logger.handlers), logger.level, logger.propagate
    out = io.StringIO()
    setup_logging(redact=str, stream=out)
    yield out
    logger.handlers[:], logger.level, logger.propagate = before


def run(clock: Clock, total: int, seconds: float, **kw) -> Progress:
    with Progress("01-sft", total, stream=io.StringIO(), **kw) as progress:
        for step in range(progress.done, total):
            clock.now += seconds
            progress.advance({"loss": 2.0 / (step + 1), "grad_norm": 1.0}, tokens=100, seconds=seconds)
    return progress


def test_lines_come_at_a_sensible_interval(clock, lines):
    run(clock, 1000, 1.0)
    said = lines.getvalue().splitlines()
    assert 30 <= len(said) <= 45
    assert said[0] == "01-sft  step 1/1000  loss 2.00 · 100 tok/s · 16 min 39 s left"
    assert said[-1].startswith("01-sft  step 1000/1000") and "left" not in said[-1]
    assert sum("step 1000/1000" in line for line in said) == 1


def test_a_short_stage_says_first_and_last(clock, lines):
    run(clock, 20, 0.01)
    assert [line.split("  ")[1] for line in lines.getvalue().splitlines()] == ["step 1/20", "step 20/20"]


def test_slow_steps_are_each_said(clock, lines):
    run(clock, 4, 60.0)
    assert len(lines.getvalue().splitlines()) == 4


def test_a_resumed_stage_counts_on(clock, lines):
    run(clock, 10, 0.5, done=7)
    assert lines.getvalue().splitlines()[0].startswith("01-sft  step 8/10")


def test_an_interrupted_stage_says_where_it_stopped(clock, lines):
    with pytest.raises(KeyboardInterrupt), Progress("s", 100, stream=io.StringIO()) as progress:
        for _ in range(5):
            clock.now += 0.1
            progress.advance({"loss": 1.0})
        raise KeyboardInterrupt
    assert lines.getvalue().splitlines()[-1].startswith("s  step 5/100")


def test_quiet(clock, lines, monkeypatch):
    run(clock, 100, 1.0, quiet=True)
    setup_logging(-1, redact=str, stream=lines)
    run(clock, 100, 1.0)
    setup_logging(0, redact=str, stream=lines)
    monkeypatch.setenv("RANK", "1")
    run(clock, 100, 1.0)
    assert lines.getvalue() == ""


def test_a_bar_on_a_terminal(lines, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    out = Terminal()
    with Progress("02-dpo", 3, stream=out) as progress:
        for _ in range(3):
            progress.advance({"dpo/loss": 0.69, "dpo/margin": 0.1, "dpo/accuracy": 0.5}, tokens=10, seconds=0.1)
        get_logger().warning("between")
    assert "02-dpo" in out.getvalue() and "3/3" in out.getvalue()
    assert "loss 0.690 · acc 0.500 · margin 0.100" in out.getvalue()
    assert lines.getvalue() == "warning: between\n"


def test_which_figures_are_shown():
    figures = {
        "grad_norm": 1.0,
        "rewards/margins": 0.4,
        "x/kl": 0.01,
        "loss": 0.7,
        "dpo/accuracy": 0.6,
        "loss/aux": 3,
        "s": "t",
    }
    assert pick_figures(figures) == {"loss": 0.7, "acc": 0.6, "margin": 0.4, "kl": 0.01}
    assert pick_figures({}) == {} and pick_figures({"loss": None}) == {}


def test_formats():
    figures = (2.3456, 0.5, 123.4, 12345.6, 1e-5, 0.0, -0.25, float("nan"), 1e9)
    assert [format_figure(f) for f in figures] == [
        "2.35",
        "0.500",
        "123",
        "12346",
        "1.00e-05",
        "0.00",
        "-0.250",
        "nan",
        "1.00e+09",
    ]
    assert [format_count(c) for c in (812, 4096, 1_200_000, 5e9)] == ["812", "4.1k", "1.2M", "5G"]


def test_r36_jumps_of_the_wall_clock_change_nothing(lines, monkeypatch):
    """`time.time` leaps an hour back and a year forward between steps; the speed and time left do not notice."""
    leaps = iter([3600 * 24 * 365.0, -3600.0] * 1000)
    monkeypatch.setattr(time, "time", lambda: 1.7e9 + next(leaps))
    with Progress("s", 10, mode="lines", stream=io.StringIO()) as progress:
        for _ in range(5):
            progress.advance({"loss": 1.0}, tokens=100, seconds=0.5)
            assert progress.seconds_left == pytest.approx((10 - progress.done) * 0.5)
    assert "200 tok/s" in progress.text()


def test_without_a_total(clock, lines):
    with Progress("s", 0, stream=io.StringIO()) as progress:
        clock.now += 1
        progress.advance({"loss": 1.0})
        assert progress.seconds_left is None
    assert "step 1  loss" in lines.getvalue()

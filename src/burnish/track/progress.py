"""What a person watches while a stage trains: a live bar on a terminal, a plain line now and then elsewhere."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Literal, Self, TextIO

from burnish.clock import mono, show_seconds
from burnish.track.log import current_rank, get_logger, is_terminal

Mode = Literal["auto", "bar", "lines", "quiet"]
_WATCHED = (
    ("loss", ("loss",)),
    ("acc", ("accuracy", "accuracies", "mean_token_accuracy")),
    ("reward", ("reward", "score")),
    ("margin", ("margin", "margins")),
    ("kl", ("kl", "approx_kl")),
)
_FIRST_LINES, _SHORTEST, _LONGEST = 2.0, 10.0, 60.0  # seconds between lines
_RECENT = 0.1  # weight of the newest step in the running speed


class Progress:
    """Counts the steps of a stage and shows them.

        with Progress("01-sft", total=300) as progress:
            progress.advance({"loss": 2.31, "grad_norm": 0.7}, tokens=4096, seconds=0.4)

    Args:
        label: Name of the stage.
        total: Steps in all; 0 if unknown.
        done: Steps that an earlier start has done (a resumed stage).
        quiet: Show nothing.
        mode: "auto" = a bar when `stream` is a terminal, else lines through the logger.
        stream: Where the bar goes; default: standard error.
    """

    def __init__(
        self,
        label: str,
        total: int,
        *,
        done: int = 0,
        quiet: bool = False,
        mode: Mode = "auto",
        stream: TextIO | None = None,
    ) -> None:
        self.label, self.total, self.done = label, total, done
        self._stream = stream or sys.stderr
        silent = quiet or current_rank() > 0 or not get_logger().isEnabledFor(logging.INFO) or _silenced()
        chosen: Mode = ("bar" if is_terminal(self._stream) else "lines") if mode == "auto" else mode
        self.mode: Mode = "quiet" if silent and mode == "auto" else chosen
        self._began = done
        self._started = self._last_line = mono()
        self._seconds_per_step: float | None = None
        self._tokens_per_second: float | None = None
        self._figures: dict[str, float] = {}
        self._written = done
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        self._started = self._last_line = mono()
        if self.mode == "bar":
            self._bar, self._task = _open_bar(self.label, self.total, self.done, self._stream)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exc: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self.mode == "lines" and self.done > self._written:
            self._line()

    def advance(
        self, figures: Mapping[str, Any], *, tokens: int = 0, seconds: float | None = None, steps: int = 1
    ) -> None:
        """One more step is done.

        Args:
            figures: Its metrics; the few that a person watches are picked out.
            tokens: Tokens that it trained on.
            seconds: How long it took; default: the time since the last call.
            steps: Steps done, if more than one.
        """
        now = mono()
        self.done += steps
        took = (now - self._started) if seconds is None else seconds
        self._seconds_per_step = _blend(self._seconds_per_step, took / max(steps, 1))
        if tokens and took > 0:
            self._tokens_per_second = _blend(self._tokens_per_second, tokens / took)
        self._figures = pick_figures(figures) or self._figures
        if self._bar is not None:
            self._bar.update(self._task, completed=self.done, figures=self.text())
        elif self.mode == "lines" and self._line_due(now):
            self._line()

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end at the present speed; None when it cannot be told."""
        if not self.total or self._seconds_per_step is None:
            return None
        return max(self.total - self.done, 0) * self._seconds_per_step

    def text(self) -> str:
        """The figures in one line: `loss 2.31 · acc 0.71 · 4.1k tok/s · 2 min left`."""
        parts = [f"{name} {format_figure(value)}" for name, value in self._figures.items()]
        if self._tokens_per_second:
            parts.append(f"{format_count(self._tokens_per_second)} tok/s")
        left = self.seconds_left
        if left is not None and self.done < self.total:
            parts.append(f"{show_seconds(left)} left")
        return " · ".join(parts)

    def _line_due(self, now: float) -> bool:
        first = self.done == self._began + 1 or (
            self._written == self._began + 1 and now - self._last_line > _FIRST_LINES
        )
        interval = min(_LONGEST, max(_SHORTEST, (now - self._started) / 10))  # the longer it runs, the fewer
        return first or self.done == self.total or now - self._last_line >= interval

    def _line(self) -> None:
        self._last_line, self._written = mono(), self.done
        of = f"/{self.total}" if self.total else ""
        get_logger().info("%s  step %d%s  %s", self.label, self.done, of, self.text())


def pick_figures(figures: Mapping[str, Any]) -> dict[str, float]:
    """The figures a person watches, four at most, by the last part of their names: loss, accuracy, reward …"""
    chosen: dict[str, float] = {}
    for short, endings in _WATCHED:
        for name, value in figures.items():
            last = name.rpartition("/")[2]
            if last in endings and isinstance(value, (int, float)) and short not in chosen:
                chosen[short] = float(value)
    return dict(list(chosen.items())[:4])


def format_figure(value: float) -> str:
    """Three significant digits, without exponents where they can be avoided."""
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e5):
        return f"{value:.2e}"
    return f"{value:.0f}" if size >= 1000 else f"{value:#.3g}".rstrip(".")


def format_count(value: float) -> str:
    """A count in three digits: 812, 4.1k, 1.20M."""
    for unit in ("", "k", "M"):
        if abs(value) < 1000:
            return f"{value:.0f}" if not unit else f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _blend(old: float | None, new: float) -> float:
    return new if old is None else (1 - _RECENT) * old + _RECENT * new


def _silenced() -> bool:
    """Whether the console shows warnings and errors only."""
    levels = [h.level for h in get_logger().handlers if type(h) is not logging.NullHandler]
    return bool(levels) and min(levels) > logging.INFO


def _open_bar(label: str, total: int, done: int, stream: TextIO) -> tuple[Any, Any]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    console = Console(file=stream)
    bar = Bar(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=max(4, min(30, console.width - 80))),  # the figures matter more than the bar
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}", markup=False),
        console=console,
        refresh_per_second=4,
    )
    bar.start()
    return bar, bar.add_task(label, total=total or None, completed=done, figures="")

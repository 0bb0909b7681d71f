"""Further places for metrics beside `metrics.jsonl`: TensorBoard and Weights & Biases. The file always comes first."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from burnish.errors import UsageError
from burnish.track.log import get_logger

SINKS = {
    "tensorboard": "burnish.track.tensorboard_sink:TensorBoardSink",
    "wandb": "burnish.track.wandb_sink:WandbSink",
}


@dataclass(frozen=True)
class SinkContext:
    """What a sink may know about the stage.

    Attributes:
        folder: The stage's folder; sinks write below it.
        run: Name of the run.
        stage: Name of the stage within the run, e.g. `01-sft` or `gpt2/01-sft`.
        run_id: The run's id: a resumed stage goes on in the same place.
        project: W&B project.
        settings: Resolved settings of the stage.
        start_step: The step from which this start goes on; later ones are written anew.
        redact: Masks secrets.
    """

    folder: Path
    run: str
    stage: str
    run_id: str
    project: str = "burnish"
    settings: Mapping[str, Any] = field(default_factory=dict)
    start_step: int = 0
    redact: Callable[[str], str] = str


class Sink(Protocol):
    """Takes numbers."""

    def write(self, row: Mapping[str, float], step: int) -> None:
        """The numbers of one step."""
        ...

    def close(self) -> None:
        """The stage is over."""
        ...


class Sinks:
    """Passes rows on to every sink. One that fails is reported once and left out; training goes on."""

    def __init__(self, sinks: Mapping[str, Sink]) -> None:
        self._sinks = dict(sinks)

    def __len__(self) -> int:
        return len(self._sinks)

    def write(self, row: Mapping[str, Any]) -> None:
        """Pass on a row of `metrics.jsonl`: its numbers, under `train/` or `eval/`."""
        step = int(row.get("step", 0))
        group = str(row.get("kind", "train"))
        numbers = {
            f"{group}/{name}": float(value)
            for name, value in row.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        self._each(lambda sink: sink.write(numbers, step))

    def close(self) -> None:
        """Close every sink."""
        self._each(lambda sink: sink.close())
        self._sinks.clear()

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _each(self, action: Callable[[Sink], None]) -> None:
        for name, sink in list(self._sinks.items()):
            try:
                action(sink)
            except Exception as exc:  # whatever the outside library raises must not stop training
                get_logger().warning("%s failed (%s: %s); going on without it", name, type(exc).__name__, exc)
                del self._sinks[name]


def build_sinks(names: Sequence[str], context: SinkContext) -> Sinks:
    """Open the sinks of `report_to`.

    Raises:
        UsageError: The library of one is not installed.
    """
    sinks: dict[str, Sink] = {}
    for name in dict.fromkeys(names):
        if name not in SINKS:
            raise UsageError(
                f"there is no {name!r} to report to", where="report_to", found=name, remedy=f"use {', '.join(SINKS)}"
            )
        module, _, attribute = SINKS[name].partition(":")
        sinks[name] = getattr(import_module(module), attribute)(context)
    return Sinks(sinks)


def missing_library(name: str) -> UsageError:
    """The error of a sink whose library is not there."""
    return UsageError(
        f"report_to: {name} needs the package {name}, which is not installed",
        where="report_to",
        found=name,
        remedy=f"pip install 'burnish[track]', or take {name} out of report_to (metrics.jsonl is written always)",
    )

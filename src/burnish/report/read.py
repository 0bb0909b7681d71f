"""Reads the files of a run for the report. Whatever is missing or damaged becomes a note, never an error."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from burnish.artifacts.redact import redact, redact_tree
from burnish.artifacts.run_folder import STAGE, load_run, load_stage, plain_name, stage_folders
from burnish.config.registry import find_known
from burnish.errors import BurnishError
from burnish.track.margins import MARGINS
from burnish.track.metrics import METRICS, TIMING, read_metrics

SAMPLES = "samples.jsonl"
_ROWS = ((METRICS, "metrics"), (TIMING, "timing"), (MARGINS, "margins"), (SAMPLES, "samples"))


@dataclass
class StageFiles:
    """One stage: its record and its rows.

    Attributes:
        folder: The stage's folder.
        model: The model in a run of several, else None.
        record: stage.json.
        metrics: Rows of metrics.jsonl.
        timing: Rows of timing.jsonl.
        margins: Rows of margins.jsonl.
        samples: Rows of samples.jsonl.
        notes: What could not be read.
    """

    folder: Path
    model: str | None
    record: dict[str, Any]
    metrics: list[dict[str, Any]] = field(default_factory=list)
    timing: list[dict[str, Any]] = field(default_factory=list)
    margins: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The stage's name within its recipe."""
        return str(self.record.get("name") or self.folder.name.partition("-")[2] or self.folder.name)

    @property
    def kind(self) -> str:
        """What the stage does."""
        return str(self.record.get("kind") or self.name)

    @property
    def state(self) -> str:
        """running, done, failed or interrupted."""
        return str(self.record.get("state") or "unknown")

    @property
    def figures(self) -> dict[str, Any]:
        """The stage's result figures."""
        return as_dict(self.record.get("figures"))

    @property
    def evaluates(self) -> bool:
        """Whether the figures are a table of results."""
        spec = find_known(self.kind)
        return "table" in self.figures or (spec is not None and not spec.trains)


@dataclass
class RunFiles:
    """All that the report reads."""

    path: Path
    record: dict[str, Any]
    resolved: dict[str, Any]
    resolved_text: str
    environment: dict[str, Any]
    stages: list[StageFiles]
    notes: list[str]

    @property
    def models(self) -> list[str | None]:
        """Models in the recipe's order; [None] in a run of one model."""
        return list(dict.fromkeys(stage.model for stage in self.stages)) or [None]


def read_run(run_dir: Path) -> RunFiles:
    """Read a run folder.

    Raises:
        UsageError: It has no readable run.json.
    """
    path = Path(run_dir)
    record = redact_tree(load_run(path))
    notes: list[str] = []
    text, resolved = read_yaml(path / "resolved.yaml", notes)
    environment = read_json(path / "environment.json", notes)
    listed = resolved.get("models")
    named = {plain_name(str(m)): str(m) for m in listed} if isinstance(listed, list) else {}
    order = {name: at for at, name in enumerate(named)}
    stages = []
    for folder in sorted(stage_folders(path), key=lambda p: (order.get(p.relative_to(path).parts[0], len(order)), p)):
        relative = folder.relative_to(path)
        try:
            stage_record = redact_tree(load_stage(folder) or {})
        except BurnishError as exc:
            notes.append(f"{relative / STAGE}: {exc.message}")
            stage_record = {"state": "damaged"}
        model = named.get(relative.parts[0], relative.parts[0]) if len(relative.parts) > 1 else None
        stage = StageFiles(folder, model, stage_record)
        for name, attribute in _ROWS:
            rows, note = read_metrics(folder / name)
            setattr(stage, attribute, redact_tree(rows) if attribute == "samples" else rows)
            if note:
                stage.notes.append(note)
        stages.append(stage)
    return RunFiles(path, record, redact_tree(resolved), redact(text), redact_tree(environment), stages, notes)


def as_dict(value: Any) -> dict[str, Any]:
    """The value if it is a mapping, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_rows(value: Any) -> list[dict[str, Any]]:
    """The mappings of a list."""
    return [row for row in as_list(value) if isinstance(row, dict)]


def as_number(value: Any) -> float | None:
    """The value if it is a number (of a size that a float holds), else None."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        return float(value)
    except OverflowError:
        return None


def read_json(place: Path, notes: list[str]) -> dict[str, Any]:
    """A JSON object; {} with a note when it cannot be read, {} when it is not there."""
    try:
        return as_dict(json.loads(place.read_bytes()))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as exc:
        notes.append(f"{place.name} cannot be read ({type(exc).__name__})")
        return {}


def read_yaml(place: Path, notes: list[str]) -> tuple[str, dict[str, Any]]:
    """A YAML file's text and mapping; empty like `read_json`."""
    try:
        text = place.read_text(encoding="utf-8", errors="replace")
        return text, as_dict(yaml.safe_load(text))
    except FileNotFoundError:
        return "", {}
    except (OSError, yaml.YAMLError, RecursionError) as exc:
        notes.append(f"{place.name} cannot be read ({type(exc).__name__})")
        return "", {}

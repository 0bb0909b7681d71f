"""What to do with a stage: skip it, continue it, run it, or refuse; by its key, never by dates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.artifacts.folder import DamagedFolder, load_manifest, verify_folder
from burnish.artifacts.run_folder import describe_differences, load_stage
from burnish.errors import UsageError

# Settings that change neither a parameter nor a figure of the result: an interrupted stage may go on with other values.
HARMLESS = frozenset(
    {
        "logging_steps",
        "report_to",
        "wandb_project",
        "save_steps",
        "save_total_limit",
        "devices",
        "name",
        "model",
        "samples",
    }
)

Action = Literal["run", "skip", "resume", "rerun"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a stage and, in one sentence, why."""

    action: Action
    why: str


def compute_key(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Hash over everything that a stage's result depends on: settings but the harmless ones, and its inputs."""
    kept = {k: v for k, v in settings.items() if k not in HARMLESS}
    text = json.dumps({"settings": kept, "inputs": dict(inputs)}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint_result(final: Path) -> str:
    """Fingerprint of a sealed `final/`: the hashes of its manifest."""
    manifest = load_manifest(final)
    rows = "\n".join(f"{name} {entry.sha256}" for name, entry in sorted(manifest.files.items()))
    return hashlib.sha256(rows.encode()).hexdigest()


def decide(
    stage_dir: Path, key: str, settings: Mapping[str, Any], inputs: Mapping[str, Any], *, allow: Sequence[str] = (),
    upstream_rerun: bool = False,
) -> Decision:  # fmt: skip
    """Decide by the stage's record.

    Args:
        allow: Settings whose change does not forbid to continue an interrupted stage.
        upstream_rerun: A stage that this one depends on was made again by this command.

    Raises:
        UsageError: The stage was interrupted and its settings or inputs have changed since.
    """
    record = load_stage(stage_dir)
    if record is None:
        return Decision("run", "not run yet")
    same = record.get("key") == key
    if record["state"] == "done":
        if not same:
            return Decision("rerun", f"finished before, but changed: {_first_change(record, settings, inputs)}")
        problem = _damage(stage_dir)
        return Decision("rerun", problem) if problem else Decision("skip", "finished and unchanged")
    if same or _allowed(record, settings, inputs, allow):
        steps = [ref.step for ref in list_checkpoints(stage_dir)]
        return Decision(
            "resume", f"interrupted; continues from step {steps[-1]}" if steps else "interrupted before a checkpoint"
        )
    if upstream_rerun:
        return Decision("rerun", "interrupted, and a stage before it has changed")
    raise UsageError(
        "this stage was interrupted and has changed since:"
        + "".join(f"\n    {line}" for line in _changes(record, settings, inputs)),
        where=str(stage_dir),
        remedy="take the change back, allow it with --allow-change KEY, or start over with --fresh",
    )


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in settings.items() if k not in HARMLESS}


def _changes(record: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> list[str]:
    old = {"settings": _relevant(record.get("settings", {})), "inputs": record.get("inputs", {})}
    return describe_differences(old, {"settings": _relevant(settings), "inputs": dict(inputs)})


def _first_change(record: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    lines = _changes(record, settings, inputs)
    return lines[0] if lines else "its key"


def _allowed(
    record: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Any], allow: Sequence[str]
) -> bool:
    if not allow:
        return False
    old, new = _relevant(record.get("settings", {})), _relevant(settings)
    changed = {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    before = record.get("inputs", {})
    changed |= {k for k in before.keys() | inputs.keys() if before.get(k) != inputs.get(k)}
    names = {a.rpartition(".")[2] for a in allow}
    return changed <= names


def _damage(stage_dir: Path) -> str:
    final = stage_dir / "final"
    if not final.exists():
        return "" if _is_evaluation(stage_dir) else "its result is missing"
    try:
        verify_folder(final, sizes_only=True)
    except DamagedFolder as error:
        return f"its result is damaged: {error.message}"
    return ""


def _is_evaluation(stage_dir: Path) -> bool:
    record = load_stage(stage_dir) or {}
    return record.get("kind") == "evaluate"

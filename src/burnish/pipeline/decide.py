"""What to do with a stage: skip it, continue it, run it, or refuse; by its key, never by dates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.artifacts.folder import DamagedFolder, verify_folder
from burnish.artifacts.run_folder import describe_differences, load_stage
from burnish.config.registry import find_known, find_spec
from burnish.config.spec import may_resume_with
from burnish.errors import UsageError

Action = Literal["run", "skip", "resume", "rerun"]


@dataclass(frozen=True, slots=True)
class Decision:
    """What happens to a stage and, in one sentence, why; `changes` under which it is continued."""

    action: Action
    why: str
    changes: tuple[str, ...] = ()


def compute_key(settings: Mapping[str, Any], inputs: Mapping[str, Any]) -> str:
    """Hash over everything that a stage's result depends on: settings but the harmless ones, and its inputs."""
    text = json.dumps({"settings": _relevant(settings), "inputs": dict(inputs)}, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def decide(
    stage_dir: Path,
    key: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    *,
    code: Mapping[str, str],
    allow: Sequence[str] = (),
    upstream_rerun: bool = False,
) -> Decision:
    """Decide by the stage's record.

    Args:
        code: Versions of the code; they matter to a stage that was interrupted, not to a finished one.
        allow: Settings, inputs or packages whose change does not forbid to continue an interrupted stage.
        upstream_rerun: A stage that this one depends on was made again by this command.

    Raises:
        UsageError: The stage was interrupted and its settings, inputs or code have changed since.
    """
    record = load_stage(stage_dir)
    if record is None:
        return Decision("run", "not run yet")
    if "code" not in record:  # written before these inputs and the code were recorded
        inputs = {k: v for k, v in inputs.items() if k in record.get("inputs", {}) or k == "reward_model"}
        code = {}
    if record["state"] == "done":
        lines = _changes(record, settings, inputs)
        if lines and record.get("key") != key:
            return Decision("rerun", f"finished before, but changed: {'; '.join(lines[:3])}")
        problem = _damage(stage_dir)
        return Decision("rerun", problem) if problem else Decision("skip", "finished and unchanged")
    lines = _changes(record, settings, inputs, code)
    changed = find_changed(record, settings, inputs, code)
    if changed <= {name.rpartition(".")[2] for name in allow}:
        steps = [ref.step for ref in list_checkpoints(stage_dir)]
        why = f"interrupted; continues from step {steps[-1]}" if steps else "interrupted before a checkpoint"
        return Decision("resume", why, tuple(lines))
    if upstream_rerun:
        return Decision("rerun", "interrupted, and a stage before it has changed")
    raise UsageError(
        "this stage was interrupted and has changed since:" + "".join(f"\n    {line}" for line in lines),
        where=str(stage_dir),
        found=sorted(changed),
        remedy="take the change back, allow it with "
        + " ".join(f"--allow-change {_quote(name)}" for name in sorted(changed))
        + ", or start over with --fresh",
    )


def _quote(name: str) -> str:
    return f"'{name}'" if " " in name else name


def _relevant(settings: Mapping[str, Any]) -> dict[str, Any]:
    kind = settings.get("kind")
    harmless = may_resume_with(find_spec(str(kind))) if kind else frozenset()
    return {k: v for k, v in settings.items() if k not in harmless}


def _changes(
    record: Mapping[str, Any],
    settings: Mapping[str, Any],
    inputs: Mapping[str, Any],
    code: Mapping[str, str] | None = None,
) -> list[str]:
    """What differs from the record, a line for each place; the code only where it is given."""
    old = {"settings": _relevant(record.get("settings", {})), "inputs": record.get("inputs", {})}
    new: dict[str, Any] = {"settings": _relevant(settings), "inputs": dict(inputs)}
    if code is not None:
        old["code"], new["code"] = record.get("code", {}), dict(code)
    return describe_differences(old, new)


def find_changed(
    record: Mapping[str, Any], settings: Mapping[str, Any], inputs: Mapping[str, Any], code: Mapping[str, str]
) -> set[str]:
    """Names of settings, inputs and packages that differ from the record and matter to an interrupted stage.

    `max_steps` may grow: the steps that are done stay what they were.
    """
    changed: set[str] = set()
    now = {"settings": _relevant(settings), "inputs": inputs, "code": code}
    for part, new in now.items():
        old = record.get(part, {})
        old = _relevant(old) if part == "settings" else old
        changed |= {k for k in old.keys() | new.keys() if old.get(k) != new.get(k)}
    before, after = record.get("settings", {}).get("max_steps", -1), settings.get("max_steps", -1)
    if "max_steps" in changed and 0 < before < after:
        changed.discard("max_steps")
    return changed


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
    spec = find_known(str((load_stage(stage_dir) or {}).get("kind")))
    return spec is not None and not spec.trains

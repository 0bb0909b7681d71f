"""The settings that a checkpoint was made with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from burnish.config.registry import ALIASES
from burnish.errors import UsageError


def load_checkpoint_settings(checkpoint: str, kind: str) -> dict[str, Any]:
    """Settings of the stage that a checkpoint belongs to, from its run's resolved.yaml; {} outside a run folder.

    A stage that began with the result of another (`init_from`) gets that result's folder as its model.

    Raises:
        UsageError: There is no such folder, or it is of another kind of stage.
    """
    path = Path(checkpoint).expanduser().resolve()
    if not path.is_dir():
        raise UsageError(
            "there is no such checkpoint",
            where=checkpoint,
            found=checkpoint,
            remedy="name a folder checkpoint-N of a stage, e.g. runs/quickstart/01-sft/checkpoint-40",
        )
    stage_folder = path.parent
    run = next((folder for folder in stage_folder.parents if (folder / "resolved.yaml").is_file()), None)
    if run is None:
        return {}
    import yaml

    resolved = yaml.safe_load((run / "resolved.yaml").read_text(encoding="utf-8")) or {}
    name = stage_folder.name.partition("-")[2]
    stages = resolved.get("stages") or []
    stage = next((dict(item) for item in stages if item.get("name") == name), None)
    if stage is None:
        return {}
    if stage["kind"] != ALIASES[kind].kind if kind in ALIASES else stage["kind"] != kind:
        raise UsageError(
            f"this checkpoint is of a stage of kind {stage['kind']}",
            where=checkpoint,
            found=stage["kind"],
            remedy=f"use `burnish {stage['kind']} --resume_from {checkpoint}`",
        )
    earlier = stage.pop("init_from", None)
    if earlier:
        folders = sorted(stage_folder.parent.glob(f"*-{earlier}"))
        if folders:
            stage["model"] = str(folders[-1] / "final")
    elif not stage.get("model"):
        stage["model"] = _model_of(stage_folder, run, resolved)
    return {key: value for key, value in stage.items() if value is not None}


def _model_of(stage_folder: Path, run: Path, resolved: dict[str, Any]) -> str | None:
    """The model of a stage in a recipe for several: the folder between run and stage is named after it."""
    from burnish.artifacts.run_folder import plain_name

    models = resolved.get("models") or []
    folder = stage_folder.parent.name if stage_folder.parent != run else ""
    return next((model for model in models if plain_name(model) == folder), resolved.get("model"))

"""How much disk a run takes at least: checked before its first stage, so that the last one does not find the disk full."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from burnish.artifacts.run_folder import plain_name
from burnish.config.recipe import Recipe
from burnish.config.train import TrainSettings
from burnish.disk import check_space
from burnish.engine.space import estimate_checkpoint, measure_folder
from burnish.errors import BurnishError
from burnish.models.folder import inspect_model_folder, read_safetensors_header
from burnish.pipeline.dry_run import find_local_model, find_root_model

WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5", ".onnx")


def estimate_export(folder: Path, model: Any, trainable: Mapping[str, Any], settings: TrainSettings) -> int:
    """Bytes of a stage's `final/` at most: the whole model in the type it is saved in, or the adapter; the tokenizer."""
    parts = trainable.values() if settings.lora is not None else model.parameters()
    item = 2 if settings.save_dtype == "bf16" else 4
    beside = sum(p.stat().st_size for p in folder.iterdir() if p.is_file() and p.suffix not in WEIGHTS)
    return sum(p.numel() * item + 256 for p in parts) + 2 * beside + 64_000


def check_run_space(run_dir: Path, recipes: Sequence[Recipe]) -> None:
    """Refuse to begin a run whose checkpoints and results cannot fit on the disk.

    A lower bound: stages that train a part of the model, or one that is not on this machine yet, count nothing here;
    each stage is checked exactly before its first step.

    Raises:
        ResourceError: Too little is free.
    """
    lasting, brief = 0, 0
    for recipe in recipes:
        base = run_dir / plain_name(recipe.model or "model") if len(recipe.model_list()) > 1 else run_dir
        for index, stage in enumerate(recipe.stages, start=1):
            name = plain_name(str(getattr(stage, "name", index)))
            more, most = estimate_stage(recipe, stage, base / f"{index:02d}-{name}")
            lasting, brief = lasting + more, max(brief, most)
    check_space(run_dir, lasting + brief)


def estimate_stage(recipe: Recipe, stage: Any, folder: Path) -> tuple[int, int]:
    """(bytes that stay, bytes for a while) of a stage at least, less what is there; (0, 0) where it cannot be told."""
    if not isinstance(stage, TrainSettings) or stage.lora is not None or stage.top_k:
        return 0, 0
    shapes = _read_shapes(recipe, stage)
    if not shapes:
        return 0, 0
    checkpoint = estimate_checkpoint(shapes, stage.optim)
    result = checkpoint // 6  # weights alone, in 16 bits
    there = measure_folder(folder)
    return max(checkpoint + result - there, 0), checkpoint if not there else 0


def _read_shapes(recipe: Recipe, stage: TrainSettings) -> list[list[int]]:
    folder = find_local_model(find_root_model(recipe, stage))
    if folder is None:
        return []
    try:
        files = inspect_model_folder(folder).weights
        return [entry["shape"] for file in files for entry in read_safetensors_header(file).values()]
    except (BurnishError, OSError):  # said where the model is loaded
        return []

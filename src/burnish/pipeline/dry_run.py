"""`--dry-run`: what a recipe would do, in numbers; no device, network or output folder is touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from burnish.artifacts.run_folder import load_stage, plain_name
from burnish.config.batch import compute_batch
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.registry import find_spec, list_model_settings
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import UsageError
from burnish.pipeline.forecast import Forecast, find_local_model
from burnish.pipeline.naming import choose_models, find_folder
from burnish.pipeline.summaries import DataSummaries


def build_plan(loaded: LoadedRecipe, options: RunOptions) -> dict[str, Any]:
    """The plan as plain values: one entry per model and stage."""
    recipe = loaded.recipe
    models = choose_models(recipe, options)
    folder = find_folder(loaded, options)
    several = len(recipe.model_list()) > 1
    summaries = DataSummaries()
    rows = []
    for model in models:
        one = recipe.for_model(model) if several else recipe
        base = folder / plain_name(model or "model") if several else folder
        rows += describe_stages(
            one, options, lambda index, name, at=base: at / f"{index:02d}-{plain_name(name)}", summaries
        )
    return {"recipe": recipe.name, "origin": loaded.origin, "folder": str(folder), "models": models, "stages": rows}


def describe_stages(
    recipe: Recipe, options: RunOptions, place: Callable[[int, str], Path], summaries: DataSummaries
) -> list[dict[str, Any]]:
    """The stages of a recipe for one model, as plain values.

    Args:
        place: Folder of a stage by its position, from 1, and its name.
        summaries: Of the data that stages read; recipes that share data share this.
    """
    forecast, rows = Forecast(recipe, options, summaries), []
    for index, stage in enumerate(recipe.stages, start=1):
        name = str(getattr(stage, "name", index))
        rows.append(_describe_stage(forecast, stage, place(index, name)))
    return rows


def find_root_model(recipe: Recipe, stage: TrainSettings) -> str | None:
    """The base model at the start of a chain of `init_from`."""
    while stage.init_from is not None:
        found = recipe.stage(stage.init_from)
        assert isinstance(found, TrainSettings)
        stage = found
    return stage.model


def _name_models(stage: TrainSettings) -> dict[str, str]:
    """Setting → the other model that a stage reads by it; its own policy as reference is none."""
    found = {key.replace("reward_model", "weighed by"): getattr(stage, key, None) for key in list_model_settings()}
    return {key: name for key, name in found.items() if name not in (None, "same")}


def _describe_stage(forecast: Forecast, stage: Any, folder: Path) -> dict[str, Any]:
    recipe, options = forecast.recipe, forecast.options
    row: dict[str, Any] = {"stage": stage.name, "kind": stage.kind, "folder": str(folder), "state": _state(folder)}
    if isinstance(stage, EvaluateSettings):
        row |= forecast.foresee_evaluation(stage, folder)
        return row | {"of": stage.of or ["base", "every trained stage"], "tasks": stage.tasks}
    assert isinstance(stage, TrainSettings)
    model = find_root_model(recipe, stage)
    row |= {"from": stage.init_from or model, "data": _name_sources(stage.data), "reads": _name_models(stage)}
    processes = max(options.num_processes, 1)
    batch = compute_batch(stage, processes)
    row |= {"batch": str(batch), "batch_size": batch.batch_size}
    path = find_local_model(model)
    if path is None:
        forecast.results[stage.name or stage.kind] = None
        row |= {"action": "run", "why": "its model has to be fetched first"}
        return row | {"note": f"{model} is not on this machine: rows and steps are known once it is fetched"}
    from burnish.models.folder import read_context

    tokenizer = TextTokenizer.load(str(path))
    data = forecast.summaries.find(stage, tokenizer, context=read_context(path))
    row |= forecast.foresee_training(stage, folder, path, tokenizer, data)
    per_epoch = math.ceil(data.train / batch.batch_size)
    steps = stage.max_steps if stage.max_steps >= 0 else math.ceil(per_epoch * stage.num_train_epochs - 1e-9)
    row |= {"train": data.train, "held_out": data.held_out, "steps": steps}
    row["data_report"] = data.report.lines()
    row["trainable"] = describe_trainable(stage, path)
    return row


def describe_trainable(stage: TrainSettings, path: Path) -> str:
    """The trainable share, from shapes alone (a model without storage)."""
    if stage.lora is None and not stage.top_k:
        return "100 % (everything)"
    from burnish.models.meta import compute_trainable_share

    return compute_trainable_share(stage, path)


def _state(folder: Path) -> str:
    try:
        record = load_stage(folder) if folder.is_dir() else None
    except UsageError:
        return "damaged"
    return "not run yet" if record is None else str(record["state"])


def _name_sources(data: Any) -> list[str]:
    sources = data if isinstance(data, list) else [data]
    return [s if isinstance(s, str) else s.source for s in sources if s is not None]


def render_plan(plan: dict[str, Any]) -> Iterable[str]:
    """The plan as lines."""
    yield f"{plan['recipe']} ({plan['origin']}) → {plan['folder']}"
    for row in plan["stages"]:
        yield ""
        yield f"{row['stage']} ({row['kind']}), {row['state']}"
        yield f"  will       {row['action']}: {row['why']}"
        if not find_spec(row["kind"]).trains:
            yield f"  of         {', '.join(row['of'])}"
            yield f"  tasks      {', '.join(row['tasks'])}"
            continue
        yield f"  starts at  {row['from']}"
        for key, name in row["reads"].items():
            yield f"  {key:<10} {name}"
        yield f"  data       {', '.join(row['data']) or 'none'}"
        yield f"  batch      {row['batch']}"
        if "note" in row:
            yield f"  note       {row['note']}"
            continue
        yield f"  rows       {row['train']:,} to train on, {row['held_out']:,} held out"
        yield f"  steps      {row['steps']:,}"
        yield f"  trains     {row['trainable']}"

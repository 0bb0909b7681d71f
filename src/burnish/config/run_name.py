"""The name of a run's folder from its template."""

from __future__ import annotations

import re
import string
from typing import Any

from burnish.config.data import DataSource
from burnish.config.recipe import Recipe
from burnish.config.spelling import describe_suggestions, suggest
from burnish.errors import ConfigError

_FORBIDDEN = re.compile(r"[^\w.+=@%,-]+")
_SLICE_PERCENT = re.compile(r"\[:(\d+(?:\.\d+)?)%\]")


def build_run_name(recipe: Recipe, model: str | None = None) -> str:
    """The template with its fields filled in, made safe as a folder's name.

    Fields: {name}, {stage} (last training stage), {stages} (all), {model}, {seed}, {epochs}, {train_percent},
    {eval_percent} (also {train%}, {eval%}), any setting of the last training stage ({learning_rate}), and any setting
    of a stage ({dpo.beta}).

    Raises:
        ConfigError: An unknown field, or a name that cannot be a folder's.
    """
    values = _collect_fields(recipe, model)
    parts = []
    try:
        pieces = list(string.Formatter().parse(recipe.run_name))
    except ValueError as error:
        raise ConfigError(
            f"is not a template: {error}",
            where="run_name",
            found=recipe.run_name,
            remedy="write e.g. '{stage}_{model}'",
        ) from None
    for literal, field, _, _ in pieces:
        parts.append(literal)
        if field is not None:
            parts.append(_fill(field, values, recipe))
    name = _FORBIDDEN.sub("-", "".join(parts)).strip("-. ")
    if not name or len(name.encode()) > 200:
        raise ConfigError(
            f"the run's name {name[:60]!r} is {'empty' if not name else 'too long'}",
            where="run_name",
            found=recipe.run_name,
            remedy="set run_name, e.g. run_name='{name}'",
        )
    return name


def _collect_fields(recipe: Recipe, model: str | None) -> dict[str, Any]:
    training = [stage for stage in recipe.stages if hasattr(stage, "init_from")]
    last = training[-1] if training else recipe.stages[-1]
    values = {**last.model_dump(), "seed": recipe.seed}
    model = model or recipe.model or next((m for s in recipe.stages if (m := getattr(s, "model", None))), None)
    if model is None and recipe.models:
        model = f"{len(recipe.models)}-models"
    values.update(
        name=recipe.name,
        stage=values.get("name"),
        stages="-".join(recipe.stage_names()),
        model=_shorten(model or "model"),
        epochs=values.get("num_train_epochs", 0),
        lr=values.get("learning_rate", 0),
        train_percent=_train_percent(last),
        eval_percent=100 * values.get("validation_split", 0.0),
    )
    values["train%"], values["eval%"] = values["train_percent"], values["eval_percent"]
    return values


def _fill(field: str, values: dict[str, Any], recipe: Recipe) -> str:
    stage, dot, _ = field.partition(".")
    if dot and stage in recipe.stage_names():
        found = recipe.stage(stage).model_dump()
        values = {f"{stage}.{key}": value for key, value in found.items()}
    if field not in values:
        near = describe_suggestions(suggest(field, values))
        raise ConfigError(
            f"there is no field {{{field}}}",
            where="run_name",
            found=recipe.run_name,
            remedy=near
            or "the fields are name, stage, stages, model, seed, epochs, train_percent, eval_percent and settings",
        )
    value = values[field]
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def _shorten(model: str) -> str:
    """The last part of a hub id or path."""
    return re.split(r"[/\\]", model.rstrip("/\\"))[-1]


def _train_percent(stage: Any) -> float:
    share = getattr(stage, "slice_share", None)
    if share is not None:
        return round(100 * share, 4)
    data = getattr(stage, "data", None)
    match = _SLICE_PERCENT.search((data.split if isinstance(data, DataSource) else None) or "")
    return float(match.group(1)) if match else 100.0

"""The recipe: stages in order and what they share."""

from __future__ import annotations

from typing import Any

from pydantic import SerializeAsAny

from burnish.config.base import Settings, setting
from burnish.config.data import DataSource
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings

StageSettings = TrainSettings | EvaluateSettings


class Recipe(Settings):
    """A recipe as burnish understood it: every stage complete, with the top-level settings already in it."""

    name: str = setting("recipe", "Name of the recipe; default: the file's name.")
    model: str | None = setting(None, "Base model of every stage without `init_from`: bundled name, folder or hub id.")
    models: list[str] = setting([], "Several base models instead of `model`: the stages run for each in turn.")
    grid: dict[str, Any] = setting(
        {}, "Settings or stages with several values each: every combination is a run of its own."
    )
    data: str | DataSource | list[str | DataSource] | None = setting(
        None, "Training data of every stage that names none of its own."
    )
    seed: int = setting(42, "Seed of every stage that sets none of its own.", ge=0)
    output_dir: str = setting("runs", "Folder in which the run's folder is made.")
    run_name: str = setting(
        "{name}", "Name of the run's folder; fields such as {stage}, {model}, {epochs} are filled in."
    )
    stages: list[SerializeAsAny[Settings]] = setting(..., "What is done, in order; at least one stage.")

    def stage(self, name: str) -> StageSettings:
        """The stage of this name.

        Raises:
            KeyError: There is none.
        """
        for stage in self.stages:
            if getattr(stage, "name", None) == name:
                return stage  # pyright: ignore[reportReturnType]
        raise KeyError(name)

    def stage_names(self) -> list[str]:
        """Names of the stages in order."""
        return [str(getattr(stage, "name", "")) for stage in self.stages]

    def model_list(self) -> list[str | None]:
        """The base models to run for; [None] if every stage names its own."""
        return list(self.models) if self.models else [self.model]

    def for_model(self, model: str | None) -> Recipe:
        """The same recipe for one of its models: stages that name no model and start from no other stage get it."""
        if model is None:
            return self
        stages = []
        for stage in self.stages:
            if getattr(stage, "model", None) is None and getattr(stage, "init_from", None) is None:
                stage = stage.model_copy(update={"model": model})
            stages.append(stage)
        return self.model_copy(update={"model": model, "models": [], "stages": stages})

    def resolved(self) -> dict[str, Any]:
        """Everything, defaults included, as plain values; a recipe of its own that means the same."""
        return self.model_dump(mode="json")

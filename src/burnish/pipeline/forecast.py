"""What a run would do with each stage, and why, without running any; torch-free, and nothing is written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from burnish.artifacts.run_folder import load_stage
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings
from burnish.data.bundled import resolve_model
from burnish.data.tokenizer import TextTokenizer
from burnish.errors import BurnishError, UsageError
from burnish.models.fingerprint import fingerprint_model
from burnish.pipeline.decide import compute_key, decide
from burnish.pipeline.inputs import (
    StageResult,
    check_reward_model,
    find_code,
    fingerprint_evaluation,
    fingerprint_inputs,
    fingerprint_result,
)
from burnish.pipeline.naming import find_named, find_other_model, find_reward_model, find_starts
from burnish.pipeline.summaries import DataSummaries, DataSummary

Row = dict[str, str]


class Forecast:
    """One model's way through the stages, foreseen in order.

    Attributes:
        summaries: Of the data that stages read.
        results: Stage → its result as it is on disk, or None when the stage would be made again first.
    """

    def __init__(self, recipe: Recipe, options: RunOptions, summaries: DataSummaries) -> None:
        self.recipe, self.options, self.summaries = recipe, options, summaries
        self.results: dict[str, StageResult | None] = {}

    def foresee_training(
        self, stage: TrainSettings, folder: Path, model: Path, tokenizer: TextTokenizer, data: DataSummary
    ) -> Row:
        """{"action", "why"} of a training stage, from its record and the fingerprints of its inputs.

        Args:
            model: The model at the root of the stage's chain.
            data: What its data are.
        """
        named = find_named(stage, self.results)
        before = [stage.init_from, *named] if stage.init_from in self.results else named
        lasting = None if named else find_local_model(find_reward_model(stage, {}))
        if lasting is not None:
            check_reward_model(lasting, tokenizer, data.longest)

        def find_inputs() -> dict[str, str]:
            start = self.results.get(stage.init_from) if stage.init_from is not None else None
            finals = {name: result.folder for name, result in self.results.items() if result is not None}
            other = find_local_model(find_other_model(stage, finals))

            def fingerprint(folder: Path) -> str:
                return fingerprint_result(folder) if folder in finals.values() else fingerprint_model(folder)

            judge = find_local_model(find_reward_model(stage, finals))
            local = {name: find_local_model(place) for name, place in find_starts(stage, finals).items()}
            starts = {name: place for name, place in local.items() if place is not None}
            at = model if start is None else start.folder
            own = tokenizer if start is None else TextTokenizer.load(str(start.folder))
            return fingerprint_inputs(stage, at, own, data.fingerprint, fingerprint, other, judge, starts)

        return self._foresee(stage, folder, before, find_inputs)

    def foresee_evaluation(self, stage: EvaluateSettings, folder: Path) -> Row:
        """The same of an evaluation, which depends on every training stage before it."""

        def find_inputs() -> dict[str, str]:
            found = {n: r for n, r in self.results.items() if r is not None}
            firsts = [r.settings.model for r in found.values() if getattr(r.settings, "init_from", None) is None]
            name = stage.model or self.recipe.model or next((m for m in firsts if m), None)
            return fingerprint_evaluation(stage, found, find_local_model(name), fingerprint_model, self.summaries)

        return self._foresee(stage, folder, list(self.results), find_inputs)

    def _foresee(
        self,
        stage: TrainSettings | EvaluateSettings,
        folder: Path,
        before: list[str],
        find_inputs: Callable[[], dict[str, str]],
    ) -> Row:
        name = stage.name or stage.kind
        self.results[name] = None
        try:
            record = load_stage(folder) if folder.is_dir() else None
        except UsageError as error:
            return {"action": "refuse", "why": error.message}
        if record is None:
            return {"action": "run", "why": "not run yet"}
        if self.options.fresh:
            return {"action": "rerun", "why": "--fresh"}
        again = [n for n in before if self.results.get(n) is None]
        if again:
            return {"action": "rerun", "why": f"unless {', '.join(again)}, made first, comes out the same"}
        values = stage.model_dump(mode="json")
        try:
            inputs = find_inputs()
            found = decide(
                folder, compute_key(values, inputs), values, inputs, code=find_code(), allow=self.options.allow_change
            )
        except BurnishError as error:
            return {"action": "refuse", "why": error.message}
        if found.action == "skip":
            self.results[name] = StageResult(name, stage.kind, folder / "final", stage, rerun=False, inputs=inputs)
        return {"action": found.action, "why": found.why}


def find_local_model(name: str | None) -> Path | None:
    """The folder of a bundled or local model; None for one that would have to be fetched."""
    if name is None:
        return None
    bundled = resolve_model(name)
    if bundled is not None:
        return bundled
    return Path(name) if Path(name).is_dir() else None

"""Running a recipe: stages in order, for each model in turn, each skipped, continued or run."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.artifacts.folder import DamagedFolder, verify_folder
from burnish.artifacts.redact import redact
from burnish.artifacts.run_folder import RunFolder, load_stage, save_stage
from burnish.clock import mono, wall
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.registry import find_spec
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings
from burnish.disk import disk_error, find_disk_failure
from burnish.engine.memory import build_memory_error
from burnish.errors import BurnishError, InterruptedRun, PeerLost, ResourceError, UsageError, is_out_of_memory
from burnish.faults import fault_point
from burnish.pipeline.decide import Decision, compute_key, decide
from burnish.pipeline.disk_space import check_run_space
from burnish.pipeline.folder import closing_run, describe_run, open_together
from burnish.pipeline.inputs import StageResult, find_code, fingerprint_evaluation, fingerprint_result
from burnish.pipeline.naming import choose_models, find_folder, find_other_model, find_reward_model, find_starts
from burnish.pipeline.prefetch import Prefetch, start_prefetch
from burnish.track.log import attach_log_file, check_log_file, setup_logging, success
from burnish.track.whereabouts import enter_stage, here, start_beat

log = logging.getLogger("burnish")


@dataclass
class Home:
    """What the cells of a grid have in common while they run one after the other.

    Attributes:
        run: The grid's own folder, in which shared stages lie.
        places: Stage → its folder, of those stages of the cell at hand that are shared.
        prepare: Called with the cell's folder once it is open: makes its links.
        reference: Folder for the cached log-probs of all references.
        made: Shared stages that this command has made or continued.
        failed: Shared stages that failed in this command: no other cell tries them again.
        resumed: Stages that were continued.
    """

    run: RunFolder
    reference: Path
    places: dict[str, Path] = field(default_factory=dict)
    prepare: Callable[[Path], None] = lambda folder: None
    made: set[Path] = field(default_factory=set)
    failed: dict[Path, BurnishError] = field(default_factory=dict)
    resumed: int = 0


@dataclass
class RunState:
    """One model's way through the stages."""

    run: RunFolder
    recipe: Recipe
    options: RunOptions
    runtime: Any
    model: str | None
    prefix: str | None
    results: dict[str, StageResult] = field(default_factory=dict)
    resumed: int = 0
    fingerprints: dict[str, str] = field(default_factory=dict)
    checked: set[str] = field(default_factory=set)
    home: Home | None = None
    prefetch: Prefetch = field(default_factory=Prefetch)

    def place(self, index: int, name: str) -> tuple[RunFolder, Path]:
        """The folder of a stage, and the run folder that it belongs to."""
        if self.home is not None and name in self.home.places:
            return self.home.run, self.home.places[name]
        return self.run, self.run.stage_path(index, name, self.prefix)


def run_recipe(loaded: LoadedRecipe, options: RunOptions) -> int:
    """Run a recipe (or, with `dry_run`, say what would be done).

    Returns:
        The exit status: 0, or that of the first stage that failed when several models were run.

    Raises:
        BurnishError: With a single model, what went wrong.
    """
    if options.dry_run:
        from burnish.pipeline.grid_dry_run import print_plan

        return print_plan(loaded, options, sys.stdout)
    alone = loaded.grid is None
    with closing(start_prefetch(loaded.recipe) if alone else Prefetch()) as prefetch:  # before threads and before torch
        return _run_here(loaded, options, prefetch)


def _run_here(loaded: LoadedRecipe, options: RunOptions, prefetch: Prefetch) -> int:
    from burnish.engine.runtime import build_runtime

    start_beat()
    setup_logging(1 if options.verbose else 0, redact=redact)
    for note in loaded.notes:
        log.info("%s", note)
    runtime = build_runtime(getattr(loaded.recipe.stages[0], "devices", None))
    try:
        if loaded.grid is not None:
            from burnish.pipeline.grid import run_grid

            return run_grid(loaded, options, runtime)
        if options.cells:
            raise UsageError("--cell was given, but the recipe has no grid", where="--cell", remedy="leave it out")
        return run_in_folder(loaded, options, runtime, find_folder(loaded, options), prefetch=prefetch)
    finally:
        runtime.close()


def run_in_folder(
    loaded: LoadedRecipe,
    options: RunOptions,
    runtime: Any,
    folder: Path,
    home: Home | None = None,
    prefetch: Prefetch | None = None,
) -> int:
    """Run a recipe in its folder: open, stages in order, report, close.

    Args:
        home: The grid that the recipe is a cell of.
        prefetch: A process that tokenises for the stages.
    """
    models = choose_models(loaded.recipe, options)
    run = open_together(loaded, folder, runtime, loaded.recipe.resolved(), grid=False)
    if runtime.is_main:
        attach_log_file(run.log_path, redact=redact)
    with closing_run(run, runtime, describe_run if options.json else None) as end:
        if runtime.is_main:
            if home is not None:
                home.prepare(run.path)
            check_run_space(run.path, [loaded.recipe.for_model(m) if m else loaded.recipe for m in models])
        end.status = _run_models(run, loaded, options, runtime, models, home, prefetch)
    return end.status


def _run_models(
    run: RunFolder,
    loaded: LoadedRecipe,
    options: RunOptions,
    runtime: Any,
    models: Sequence[str | None],
    home: Home | None = None,
    prefetch: Prefetch | None = None,
) -> int:
    several = len(loaded.recipe.model_list()) > 1
    rows: list[tuple[str, int, str]] = []
    for model in models:
        state = RunState(
            run,
            loaded.recipe.for_model(model) if several else loaded.recipe,
            options,
            runtime,
            model,
            (model or "model") if several else None,
            home=home,
            prefetch=prefetch or Prefetch(),
        )
        if several:
            log.info("model %s", model)
        try:
            _run_stages(state)
            rows.append((str(model), 0, "done"))
        except InterruptedRun:
            raise
        except BurnishError as error:
            if len(models) == 1:
                raise
            log.error("%s", error)
            rows.append((str(model), error.exit_code, error.message))
    if several and runtime.is_main:
        for model, status, text in rows:
            log.info("%-40s exit %d  %s", model, status, text)
    return next((status for _, status, _ in rows if status), 0)


def _run_stages(state: RunState) -> None:
    for index, settings in enumerate(state.recipe.stages, start=1):
        _run_stage(state, index, settings)
    if state.home is not None:
        state.home.resumed += state.resumed
    elif state.options.resume and not state.resumed:
        raise UsageError(
            "--resume was given, but there is nothing to resume",
            where=str(state.run.path),
            remedy="leave --resume out: finished stages are skipped and interrupted ones continue by themselves",
        )


def _run_stage(state: RunState, index: int, settings: Any) -> None:
    """Run a stage; one that other cells share fails once for all of them."""
    home, place = state.home, state.place(index, settings.name)[1]
    if home is None or settings.name not in home.places:
        _do_stage(state, index, settings)
        return
    if place in home.failed:
        first = home.failed[place]
        error = BurnishError(
            f"the stage {settings.name}, which it shares, failed: {first.message}",
            where=place.name,
            remedy=first.remedy,
        )
        error.exit_code = first.exit_code
        raise error from first
    try:
        _do_stage(state, index, settings)
    except (InterruptedRun, PeerLost):
        raise
    except BurnishError as error:
        home.failed[place] = error
        raise


def _do_stage(state: RunState, index: int, settings: Any) -> None:
    name, kind = settings.name, settings.kind
    fault_point("stage.next")
    run, stage_dir = state.place(index, name)
    made = state.home.made if state.home is not None else set()
    _make_stage_dir(state, run, stage_dir, keep=stage_dir in made)
    prepared, values, inputs = _prepare(state, settings)
    key = compute_key(values, inputs)
    upstream = any(r.rerun for r in state.results.values())
    decision = _decide_together(state, stage_dir, key, values, inputs, upstream)
    label = f"{state.prefix}/{name}" if state.prefix else name
    if decision.action == "skip":
        log.info("%s: skipped (%s)", label, decision.why)
        again = stage_dir in made  # by an earlier cell of this command
        state.results[name] = StageResult(name, kind, stage_dir / "final", settings, rerun=again, inputs=inputs)
        return
    log.info("%s: %s", label, decision.why)
    if decision.action == "rerun" and state.runtime.is_main:
        moved = run.supersede(stage_dir)
        log.info("%s: what was there is now in %s", label, moved)
        run.make_stage_dir(stage_dir)
    state.runtime.barrier()
    _check_results(state)
    resume = decision.action == "resume" or state.options.resume_from is not None
    state.resumed += resume
    made.add(stage_dir)
    record = {
        "state": "running",
        "kind": kind,
        "name": name,
        "key": key,
        "settings": values,
        "inputs": inputs,
        "code": find_code(),
        "started": wall(),
        "label": label,
        **_continue_record(stage_dir, decision),
    }
    _record(state, stage_dir, record)
    fault_point("stage.started")
    begun = mono()
    enter_stage(label)
    try:
        if isinstance(settings, EvaluateSettings):
            from burnish.pipeline.evaluate_stage import run_evaluate_stage

            found = run_evaluate_stage(settings, state, stage_dir)
        else:
            from burnish.pipeline.train_stage import run_train_stage

            resume_from = Path(state.options.resume_from) if state.options.resume_from else None
            found = run_train_stage(
                settings,
                prepared,
                stage_dir,
                state.runtime,
                key=key,
                resume=resume,
                resume_from=resume_from,
                label=label,
                run=run,
                reference_dir=state.home.reference if state.home is not None else None,
            )
        check_log_file()
    except BaseException as caught:
        error = build_memory_error(caught, replace(here())) if is_out_of_memory(caught) else caught
        interrupted = isinstance(error, (InterruptedRun, KeyboardInterrupt))
        text = error.message if isinstance(error, BurnishError) else f"{type(error).__name__}: {error}"
        with suppress(ResourceError):  # on a disk that just failed the first error is the one to report
            _record(
                state,
                stage_dir,
                record
                | {
                    "state": "interrupted" if interrupted else "failed",
                    "ended": wall(),
                    "error": redact(text),
                },
            )
        if found := find_disk_failure(error, state.run.path):
            where = Path(os.fsdecode(found.filename)) if isinstance(found.filename, (str, bytes)) else stage_dir
            raise disk_error(found, where, doing=f"go on with {label}") from error
        if error is caught:
            raise
        raise error from caught
    seconds = mono() - begun
    fault_point("stage.finished")
    _record(state, stage_dir, record | found | {"state": "done", "ended": wall(), "seconds": round(seconds, 3)})
    if state.runtime.is_main:
        success("%s: done in %.1f s", label, seconds)
    fault_point("stage.recorded")
    state.results[name] = StageResult(name, kind, stage_dir / "final", settings, rerun=True, inputs=inputs)


def _check_results(state: RunState) -> None:
    """Hash the results of earlier stages before one that runs now may read them; each once.

    Raises:
        DamagedFolder: Naming the file.
    """
    for result in state.results.values():
        if (
            result.rerun
            or not find_spec(result.kind).trains
            or result.name in state.checked
            or not state.runtime.is_main
        ):
            continue
        try:
            verify_folder(result.folder)
        except DamagedFolder as error:
            raise DamagedFolder(
                f"the result of stage {result.name} is damaged: {error.message}",
                where=str(result.folder),
                remedy=f"remove {result.folder} and give the same command again: the stage is then run anew",
            ) from None
        state.checked.add(result.name)


def _make_stage_dir(state: RunState, run: RunFolder, folder: Path, *, keep: bool) -> None:
    """The stage's folder, made by rank 0; with --fresh an empty one, unless this command has just made it (`keep`)."""
    if state.runtime.is_main:
        run.make_stage_dir(folder)
        if state.options.fresh and not keep:
            if load_stage(folder) is not None:
                run.supersede(folder)
            run.make_stage_dir(folder)
    state.runtime.barrier()


def _continue_record(stage_dir: Path, decision: Decision) -> dict[str, Any]:
    """How often the stage was started, and the changes under which it was continued."""
    before = load_stage(stage_dir) or {}
    for line in decision.changes:
        log.warning("continued although it changed: %s", line)
    changes = [*before.get("continued_with_changes", []), *decision.changes]
    return {"starts": before.get("starts", 0) + 1} | ({"continued_with_changes": changes} if changes else {})


def _record(state: RunState, stage_dir: Path, record: Mapping[str, Any]) -> None:
    if state.runtime.is_main:
        save_stage(stage_dir, record)


def _decide_together(
    state: RunState, stage_dir: Path, key: str, values: Mapping[str, Any], inputs: Mapping[str, Any], upstream: bool
) -> Decision:
    """Rank 0 decides; all ranks do the same."""
    found: Decision | BurnishError | None = None
    if state.runtime.is_main:
        try:
            found = decide(
                stage_dir,
                key,
                values,
                inputs,
                code=find_code(),
                allow=state.options.allow_change,
                upstream_rerun=upstream,
            )
        except BurnishError as error:
            found = error
    found = state.runtime.gather(found)[0]
    if isinstance(found, Decision):
        return found
    assert found is not None
    raise found


def _prepare(state: RunState, settings: Any) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """(what a training stage starts from, its settings, fingerprints of its inputs)."""
    values = settings.model_dump(mode="json")
    if isinstance(settings, EvaluateSettings):
        from burnish.pipeline.evaluate_stage import find_base

        base = find_base(settings, state)
        return None, values, fingerprint_evaluation(settings, state.results, base, lambda f: _fingerprint(state, f))
    assert isinstance(settings, TrainSettings)
    from burnish.pipeline.train_stage import load_inputs

    model = find_model(state, settings)
    finals = {name: result.folder for name, result in state.results.items()}
    other = find_other_model(settings, finals)
    reward_model = find_reward_model(settings, finals)
    name = str(settings.name)
    state.prefetch.wait(name)
    starts = find_starts(settings, finals)
    prepared = load_inputs(settings, model, lambda folder: _fingerprint(state, folder), other, reward_model, starts)
    if name in state.prefetch.made:
        prepared.data.report.from_cache = False
    for line in prepared.data.report.lines():
        log.info("%s: %s", settings.name, line)
    return prepared, values, prepared.fingerprints


def find_model(state: RunState, settings: TrainSettings) -> str:
    """What a stage starts from: the result of the stage it names, or its model."""
    if settings.init_from is not None:
        return str(state.results[settings.init_from].folder)
    if settings.model is None:
        raise UsageError(
            f"stage {settings.name}: no model",
            where=f"stages.{settings.name}.model",
            remedy="set model: (pocket, a folder or a hub id) at the top of the recipe or in the stage",
        )
    return settings.model


def _fingerprint(state: RunState, folder: Path) -> str:
    from burnish.models.fingerprint import fingerprint_model

    for result in state.results.values():
        if result.folder == folder:
            return fingerprint_result(folder)
    text = str(folder)
    if text not in state.fingerprints:
        state.fingerprints[text] = fingerprint_model(folder)
    return state.fingerprints[text]

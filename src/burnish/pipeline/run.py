"""Running a recipe: stages in order, for each model in turn, each skipped, continued or run."""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.artifacts.folder import DamagedFolder, verify_folder
from burnish.artifacts.redact import redact
from burnish.artifacts.run_folder import RunFolder, load_run, load_stage, save_stage, stage_folders
from burnish.clock import mono, wall
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.recipe import Recipe
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings
from burnish.disk import disk_error, find_disk_failure
from burnish.engine.memory import build_memory_error
from burnish.errors import BurnishError, InterruptedRun, ResourceError, UsageError, is_out_of_memory
from burnish.faults import fault_point
from burnish.pipeline.decide import Decision, compute_key, decide
from burnish.pipeline.inputs import StageResult, find_code, fingerprint_evaluation, fingerprint_result
from burnish.pipeline.naming import choose_models, find_folder, find_other_model
from burnish.pipeline.space import check_run_space
from burnish.track.log import attach_log_file, check_log_file, detach_log_file, setup_logging, success
from burnish.track.whereabouts import enter_stage, here, start_beat

log = logging.getLogger("burnish")


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


def run_recipe(loaded: LoadedRecipe, options: RunOptions) -> int:
    """Run a recipe (or, with `dry_run`, say what would be done).

    Returns:
        The exit status: 0, or that of the first stage that failed when several models were run.

    Raises:
        BurnishError: With a single model, what went wrong.
    """
    if options.dry_run:
        from burnish.pipeline.plan import print_plan

        return print_plan(loaded, options, sys.stdout)
    from burnish.engine.runtime import build_runtime

    start_beat()
    setup_logging(1 if options.verbose else 0, redact=redact)
    for note in loaded.notes:
        log.info("%s", note)
    runtime = build_runtime(getattr(loaded.recipe.stages[0], "devices", None))
    try:
        return _run_in_folder(loaded, options, runtime)
    finally:
        runtime.close()


def _run_in_folder(loaded: LoadedRecipe, options: RunOptions, runtime: Any) -> int:
    models = choose_models(loaded.recipe, options)
    folder = find_folder(loaded, options)
    run, failure = None, None
    if runtime.is_main:
        try:
            run = _open_run(loaded, folder, runtime)
        except BurnishError as error:
            failure = error
    failure = runtime.gather(failure)[0]
    if failure is not None:
        raise failure
    if run is None:
        run = RunFolder.attach(folder)
    begun = mono()
    if runtime.is_main:
        attach_log_file(run.log_path, redact=redact)
    outcome: BaseException | None = None
    status = 1
    try:
        if runtime.is_main:
            check_run_space(run.path, [loaded.recipe.for_model(m) if m else loaded.recipe for m in models])
        status = _run_models(run, loaded, options, runtime, models)
        return status
    except BaseException as error:
        outcome = error
        status = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        if runtime.is_main:
            _close_run(run, outcome, status, mono() - begun)
            if options.json:
                sys.stdout.write(json.dumps(describe_run(run.path), ensure_ascii=False) + "\n")


def _open_run(loaded: LoadedRecipe, folder: Path, runtime: Any) -> RunFolder:
    import torch

    facts = {"threads": torch.get_num_threads(), "device": str(runtime.device), "processes": runtime.world}
    run = RunFolder.open(
        folder.parent,
        folder.name,
        recipe_text=loaded.text,
        resolved=loaded.recipe.resolved(),
        command=sys.argv,
        environment=facts,
    )
    for note in run.notes:
        log.info("%s", note)
    log.info("run folder: %s", run.path)
    return run


def _close_run(run: RunFolder, outcome: BaseException | None, status: int, seconds: float) -> None:
    if outcome is None:
        state = "done" if status == 0 else "failed"
    else:
        state = "interrupted" if isinstance(outcome, (InterruptedRun, KeyboardInterrupt)) else "failed"
    message = redact(str(outcome)) if outcome is not None else None
    try:
        _finish(run, state, seconds, status, message)
    except ResourceError as error:
        if outcome is None:
            raise
        log.warning("%s", error)  # what stopped the run comes first
    finally:
        detach_log_file()
        run.close()


def _finish(run: RunFolder, state: str, seconds: float, status: int, message: str | None) -> None:
    """Record how the run ended, and write its report.

    Raises:
        ResourceError: The disk refuses one of them.
    """
    run.finish(state, seconds=round(seconds, 3), exit_code=status, error=message)
    try:
        from burnish.report.html import render_report

        log.info("report: %s", render_report(run.path))
        check_log_file()
    except ResourceError as error:
        if status == 0:
            with suppress(ResourceError):
                run.finish("failed", seconds=0.0, exit_code=error.exit_code, error=redact(str(error)))
        raise
    except Exception as error:  # the run is over and recorded; a page about it must not change its outcome
        log.warning("the report could not be written (%s: %s)", type(error).__name__, error)


def describe_run(folder: Path) -> dict[str, Any]:
    """A run in plain values, for --json: state, exit status, and of each stage state, folder and figures."""
    record = load_run(folder)
    stages = []
    for stage_dir in stage_folders(folder):
        found = load_stage(stage_dir) or {}
        stages.append(
            {
                "stage": found.get("label"),
                "kind": found.get("kind"),
                "state": found.get("state"),
                "folder": str(stage_dir),
            }
            | {"figures": found.get("figures")}
        )
    kept = {k: record.get(k) for k in ("name", "run_id", "state", "exit_code", "seconds", "error")}
    return kept | {"folder": str(folder), "stages": stages}


def _run_models(
    run: RunFolder, loaded: LoadedRecipe, options: RunOptions, runtime: Any, models: Sequence[str | None]
) -> int:
    several = len(loaded.recipe.model_list()) > 1
    rows: list[tuple[str, int, str]] = []
    for model in models:
        state = RunState(
            run, loaded.recipe.for_model(model) if several else loaded.recipe, options, runtime, model,
            (model or "model") if several else None,
        )  # fmt: skip
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
    if state.options.resume and not state.resumed:
        raise UsageError(
            "--resume was given, but there is nothing to resume", where=str(state.run.path),
            remedy="leave --resume out: finished stages are skipped and interrupted ones continue by themselves",
        )  # fmt: skip


def _run_stage(state: RunState, index: int, settings: Any) -> None:
    name, kind = settings.name, settings.kind
    fault_point("stage.next")
    stage_dir = _stage_dir(state, index, name)
    prepared, values, inputs = _prepare(state, settings)
    key = compute_key(values, inputs)
    upstream = any(r.rerun for r in state.results.values())
    decision = _decide_together(state, stage_dir, key, values, inputs, upstream)
    label = f"{state.prefix}/{name}" if state.prefix else name
    if decision.action == "skip":
        log.info("%s: skipped (%s)", label, decision.why)
        state.results[name] = StageResult(name, kind, stage_dir / "final", settings, rerun=False, inputs=inputs)
        return
    log.info("%s: %s", label, decision.why)
    if decision.action == "rerun" and state.runtime.is_main:
        moved = state.run.supersede(stage_dir)
        log.info("%s: what was there is now in %s", label, moved)
        state.run.stage_dir(index, name, state.prefix)
    state.runtime.barrier()
    _check_results(state)
    resume = decision.action == "resume" or state.options.resume_from is not None
    state.resumed += resume
    record = {
        "state": "running", "kind": kind, "name": name, "key": key, "settings": values, "inputs": inputs,
        "code": find_code(), "started": wall(), "label": label, **_continue_record(stage_dir, decision),
    }  # fmt: skip
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
                settings, prepared, stage_dir, state.runtime, key=key, resume=resume, resume_from=resume_from,
                label=label, run=state.run,
            )  # fmt: skip
        check_log_file()
    except BaseException as caught:
        error = build_memory_error(caught, replace(here())) if is_out_of_memory(caught) else caught
        interrupted = isinstance(error, (InterruptedRun, KeyboardInterrupt))
        text = error.message if isinstance(error, BurnishError) else f"{type(error).__name__}: {error}"
        with suppress(ResourceError):  # on a disk that just failed the first error is the one to report
            _record(state, stage_dir, record | {
                "state": "interrupted" if interrupted else "failed", "ended": wall(), "error": redact(text),
            })  # fmt: skip
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
        if result.rerun or result.kind == "evaluate" or result.name in state.checked or not state.runtime.is_main:
            continue
        try:
            verify_folder(result.folder)
        except DamagedFolder as error:
            raise DamagedFolder(
                f"the result of stage {result.name} is damaged: {error.message}", where=str(result.folder),
                remedy=f"remove {result.folder} and give the same command again: the stage is then run anew",
            ) from None  # fmt: skip
        state.checked.add(result.name)


def _stage_dir(state: RunState, index: int, name: str) -> Path:
    if state.runtime.is_main:
        folder = state.run.stage_dir(index, name, state.prefix)
        if state.options.fresh:
            if load_stage(folder) is not None:
                state.run.supersede(folder)
            folder = state.run.stage_dir(index, name, state.prefix)
    state.runtime.barrier()
    return state.run.stage_dir(index, name, state.prefix)


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
                stage_dir, key, values, inputs, code=find_code(), allow=state.options.allow_change,
                upstream_rerun=upstream,
            )  # fmt: skip
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
    other = find_other_model(settings, {name: result.folder for name, result in state.results.items()})
    prepared = load_inputs(settings, model, lambda folder: _fingerprint(state, folder), other)
    for line in prepared.data.report.lines():
        log.info("%s: %s", settings.name, line)
    return prepared, values, prepared.fingerprints


def find_model(state: RunState, settings: TrainSettings) -> str:
    """What a stage starts from: the result of the stage it names, or its model."""
    if settings.init_from is not None:
        return str(state.results[settings.init_from].folder)
    if settings.model is None:
        raise UsageError(
            f"stage {settings.name}: no model", where=f"stages.{settings.name}.model",
            remedy="set model: (pocket, a folder or a hub id) at the top of the recipe or in the stage",
        )  # fmt: skip
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

"""A run's folder from its opening to its report."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.artifacts.grid_folder import is_grid
from burnish.artifacts.redact import redact
from burnish.artifacts.run_folder import RUN, RunFolder, load_run, load_stage, stage_folders
from burnish.clock import mono
from burnish.config.load import LoadedRecipe
from burnish.errors import BurnishError, InterruptedRun, ResourceError, UsageError
from burnish.track.log import check_log_file, detach_log_file

log = logging.getLogger("burnish")


def open_together(
    loaded: LoadedRecipe, folder: Path, runtime: Any, resolved: Mapping[str, Any], *, grid: bool
) -> RunFolder:
    """Rank 0 opens the run's folder, or all raise what went wrong; the others attach to it."""
    run, failure = None, None
    if runtime.is_main:
        try:
            if (folder / RUN).exists() and is_grid(folder) != grid:
                raise UsageError(
                    f"this folder is {'a plain run' if grid else 'a grid'}, and the recipe now is "
                    f"{'a grid' if grid else 'none'}",
                    where=str(folder),
                    remedy="give this run a name of its own with --run-name, or delete the old one with "
                    "`burnish runs delete`",
                )
            run = _open_run(loaded, folder, runtime, resolved)
        except BurnishError as error:
            failure = error
    failure = runtime.gather(failure)[0]
    if failure is not None:
        raise failure
    return run if run is not None else RunFolder.attach(folder)


def _open_run(loaded: LoadedRecipe, folder: Path, runtime: Any, resolved: Mapping[str, Any]) -> RunFolder:
    import torch

    from burnish.core.kernels.build import load_kernels

    facts = {"threads": torch.get_num_threads(), "device": str(runtime.device), "processes": runtime.world}
    if runtime.device.type == "cpu":
        facts["kernels"] = load_kernels().note
    run = RunFolder.open(
        folder.parent,
        folder.name,
        recipe_text=loaded.text,
        resolved=resolved,
        command=sys.argv,
        environment=facts,
        remarks=loaded.tables,
    )
    for note in run.notes:
        log.info("%s", note)
    log.info("run folder: %s", run.path)
    return run


@dataclass
class RunEnd:
    """How a run ends: its exit status, and a sentence on what failed in it although it went through."""

    status: int = 1
    message: str | None = None


@contextmanager
def closing_run(
    run: RunFolder, runtime: Any, describe: Callable[[Path], dict[str, Any]] | None = None
) -> Iterator[RunEnd]:
    """Record how the block ends, write the run's report and free its folder; the block sets the status.

    Args:
        describe: What of the run's folder is printed as JSON at the end; None: nothing.
    """
    end, begun, outcome = RunEnd(), mono(), None
    try:
        yield end
    except BaseException as error:
        outcome = error
        end.status = getattr(error, "exit_code", 130 if isinstance(error, KeyboardInterrupt) else 1)
        raise
    finally:
        if runtime.is_main:
            _close(run, outcome, end, mono() - begun)
            if describe is not None:
                sys.stdout.write(json.dumps(describe(run.path), ensure_ascii=False) + "\n")


def _close(run: RunFolder, outcome: BaseException | None, end: RunEnd, seconds: float) -> None:
    if outcome is None:
        state = "done" if end.status == 0 else "failed"
    else:
        state = "interrupted" if isinstance(outcome, (InterruptedRun, KeyboardInterrupt)) else "failed"
    message = redact(str(outcome)) if outcome is not None else end.message
    try:
        _finish(run, state, seconds, end.status, message)
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
        named = {"stage": found.get("label"), **{k: found.get(k) for k in ("kind", "state")}}
        stages.append(named | {"folder": str(stage_dir), "figures": found.get("figures")})
    kept = {k: record.get(k) for k in ("name", "run_id", "state", "exit_code", "seconds", "error")}
    return kept | {"folder": str(folder), "stages": stages}

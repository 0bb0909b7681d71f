"""What a command says about a run besides its recipe."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RunOptions:
    """Options of `burnish run` and of the stage verbs.

    Args:
        dry_run: Say what would be done; touch neither device nor network nor output folder.
        output_dir: Folder of runs; None: the recipe's `output_dir`.
        run_name: Name of the run's folder; None: the recipe's template.
        resume: Insist on something to resume.
        fresh: Start over; what is there moves to superseded/.
        allow_change: Settings whose change does not forbid to continue an interrupted run.
        num_processes: Processes on this machine.
        model_index: Only this model of `models` (from 0).
        cells: Only these cells of a grid: names, or patterns such as `*_seed=1`.
        after: Command that runs when the run is over, whatever its outcome.
        json: Print results as JSON on stdout.
        verbose: Say more; show tracebacks.
        resume_from: Checkpoint to continue from instead of the run's newest.
    """

    dry_run: bool = False
    output_dir: str | None = None
    run_name: str | None = None
    resume: bool = False
    fresh: bool = False
    allow_change: tuple[str, ...] = ()
    num_processes: int = 1
    model_index: int | None = None
    cells: tuple[str, ...] = ()
    after: str | None = None
    json: bool = False
    verbose: bool = False
    resume_from: str | None = None

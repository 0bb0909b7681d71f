"""burnish from Python: the same runs as from the command line.

import burnish

result = burnish.run("quickstart", "seed=3")
print(result.stages["dpo"].figures["eval"]["eval_rewards/accuracies"], result.stages["dpo"].final)

burnish.train("dpo", model="pocket", data="my/pairs.jsonl", beta=0.05)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from burnish.artifacts.grid_folder import CELLS, is_grid, load_grid, load_summary
from burnish.artifacts.run_folder import RUN, load_run, load_stage, stage_folders
from burnish.config.load import load_recipe
from burnish.config.options import RunOptions
from burnish.pipeline.naming import find_folder
from burnish.pipeline.run import run_recipe


@dataclass(frozen=True, slots=True)
class StageRecord:
    """What a stage left behind.

    Attributes:
        state: "done", "failed", "interrupted" or "running".
        folder: Its folder, with metrics.jsonl and checkpoints.
        final: The result, which `from_pretrained` or PEFT loads; None for an evaluation or an unfinished stage.
        figures: Its figures: losses, evaluation, seconds; of an evaluation the table with intervals.
    """

    state: str
    folder: Path
    final: Path | None
    figures: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RunRecord:
    """A run's folder, read back.

    Attributes:
        path: The run folder; `report.html` lies in it.
        state: As for a stage.
        exit_code: 0, or as on the command line.
        stages: name ("dpo", or "model/dpo" with several models) → record.
        cells: Of a grid: name → record of each cell that has begun.
        summary: Of a grid: the table, as summary.json has it.
    """

    path: Path
    state: str
    exit_code: int
    stages: dict[str, StageRecord]
    cells: dict[str, RunRecord] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)


def run(
    recipe: str | Path | Mapping[str, Any],
    *overrides: str,
    output_dir: str | Path | None = None,
    run_name: str | None = None,
    **options: Any,
) -> RunRecord:
    """Run a recipe: a file, the name of a bundled one, or a mapping.

    Args:
        overrides: "key=value", as on the command line.
        output_dir: Folder of runs; default: the recipe's.
        run_name: Name of the run's folder.
        options: Further fields of `RunOptions` (fresh, resume, model_index, cells …).

    Raises:
        BurnishError: As the command line would report it.
    """
    loaded = load_recipe(recipe, overrides=overrides)
    chosen = RunOptions(output_dir=str(output_dir) if output_dir else None, run_name=run_name, **options)
    status = run_recipe(loaded, replace(chosen, dry_run=False))
    return load_record(find_folder(loaded, chosen), status)


def train(kind: str, *, output_dir: str | Path = "runs", run_name: str | None = None, **settings: Any) -> StageRecord:
    """Run one stage ("sft", "reward", "dpo", "ipo" …) with the given settings.

    Raises:
        BurnishError: As the command line would report it.
    """
    recipe = {"name": run_name or kind, "stages": [{"kind": kind, **settings}]}
    return next(iter(run(recipe, output_dir=output_dir, run_name=run_name or kind).stages.values()))


def load_record(path: str | Path, exit_code: int | None = None) -> RunRecord:
    """Read a run's folder.

    Raises:
        UsageError: It is no run.
    """
    folder = Path(path)
    record = load_run(folder)
    stages: dict[str, StageRecord] = {}
    for stage_dir in stage_folders(folder):
        found = load_stage(stage_dir) or {}
        final = stage_dir / "final"
        name = str(found.get("label") or found.get("name") or stage_dir.name)
        stages[name] = StageRecord(
            str(found.get("state")), stage_dir, final if final.is_dir() else None, found.get("figures", {})
        )
    code = exit_code if exit_code is not None else int(record.get("exit_code", 1))
    found = RunRecord(folder, str(record.get("state")), code, stages)
    if is_grid(folder):
        places = {str(cell["name"]): folder / CELLS / str(cell["name"]) for cell in load_grid(folder)["cells"]}
        begun = {name: load_record(place) for name, place in places.items() if (place / RUN).is_file()}
        return replace(found, cells=begun, summary=load_summary(folder))
    return found

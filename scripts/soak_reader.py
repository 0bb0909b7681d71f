"""Reads a run as other programs do while it is written: the second process of `soak.py`.

    python scripts/soak_reader.py RUNS-FOLDER SEED

A line on stdout for each pass, named after what was read; `ERROR …` for a fault. Runs until it is killed.
"""

from __future__ import annotations

import random
import sys
import time
from pathlib import Path

from burnish.artifacts.checkpoints import list_checkpoints, newest_valid
from burnish.artifacts.run_folder import list_runs, load_run, load_stage
from burnish.report.html import render_page
from burnish.report.read import read_run
from burnish.track.metrics import read_metrics


class Failure(Exception):
    """What was read cannot be right."""


def read_forever(root: Path, seed: int) -> None:
    """One reader after the other, at random."""
    draw, run = random.Random(seed), root / "soak"

    def listing() -> None:
        rows = list_runs(root)
        for row in rows:
            states = [row["state"], *(s["state"] for s in row["stages"])]
            if row.get("problem") or "damaged" in states:
                raise Failure(f"the listing says {row}")

    def metrics() -> None:
        for stage in run.glob("01-*"):
            rows, note = read_metrics(stage / "metrics.jsonl")
            steps = [r["step"] for r in rows if r.get("kind") == "train"]
            if steps != list(range(1, len(steps) + 1)):
                raise Failure("metrics.jsonl doubles or misses a step")
            if note and "last line" not in note:
                raise Failure(note)

    def records() -> None:
        if (run / "run.json").exists():
            load_run(run)
        for stage in run.glob("01-*"):
            load_stage(stage)

    def checkpoints() -> None:
        for stage in run.glob("01-*"):
            list_checkpoints(stage)
            for problem in newest_valid(stage)[1]:
                if (stage / problem.partition(":")[0]).exists():
                    raise Failure(problem)

    def report() -> None:
        if (run / "run.json").exists() and "</html>" not in render_page(read_run(run)):
            raise Failure("the report is torn")

    while True:
        read = draw.choice((listing, metrics, records, checkpoints, report))
        began = time.monotonic()
        try:
            read()
            print(read.__name__, flush=True)
        except Exception as error:
            print(f"ERROR {read.__name__}: {type(error).__name__}: {error}".replace("\n", " "), flush=True)
        time.sleep(draw.uniform(0.3, 1.5) + 4 * (time.monotonic() - began))


if __name__ == "__main__":
    read_forever(Path(sys.argv[1]), int(sys.argv[2]))

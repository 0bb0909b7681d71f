"""`burnish report RUN`: the report again, from the files of a run."""

from __future__ import annotations

from pathlib import Path

import click

from burnish.config.registry import load_object
from burnish.errors import UsageError


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--output-dir", metavar="DIR", default="runs", show_default=True, help="Folder of runs.")
def report(run: str, output_dir: str) -> int:
    """Write the report of RUN (a name or a folder) again from the run's files."""
    folder = Path(run) if (Path(run) / "run.json").is_file() else Path(output_dir) / run
    if not (folder / "run.json").is_file():
        raise UsageError(f"there is no run {run!r}", where=output_dir, found=run, remedy="see `burnish runs list`")
    print(load_object("burnish.report.html:render_report")(folder))
    return 0

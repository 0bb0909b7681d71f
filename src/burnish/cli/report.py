"""`burnish report RUN`: the report again, from the files of a run."""

from __future__ import annotations

from pathlib import Path

import click

from burnish.artifacts.grid_folder import CELLS, is_grid
from burnish.config.registry import load_object
from burnish.errors import UsageError


@click.command()
@click.argument("run", metavar="RUN")
@click.option("--output-dir", metavar="DIR", default="runs", show_default=True, help="Folder of runs.")
def report(run: str, output_dir: str) -> int:
    """Write the report of RUN again from the run's files: a name, GRID/CELL, or a folder.

    Of a grid the summary is made again too.
    """
    folder = find_run(run, output_dir)
    if is_grid(folder):
        load_object("burnish.pipeline.comparison:write_summary")(folder)
    print(load_object("burnish.report.html:render_report")(folder))
    return 0


def find_run(name: str, root: str) -> Path:
    """The folder that a name means: a folder itself, a run below `root`, or a grid's cell (`grid/cell`).

    Raises:
        UsageError: There is none.
    """
    grid, _, cell = name.rpartition("/")
    for folder in (Path(name), Path(root) / name, Path(root) / grid / CELLS / cell if grid else Path(root) / name):
        if (folder / "run.json").is_file():
            return folder
    raise UsageError(f"there is no run {name!r}", where=root, found=name, remedy="see `burnish runs list`")

"""The report: one self-contained page from a run's files, for a phone, a screen or paper."""

from __future__ import annotations

from pathlib import Path

from burnish.artifacts.files import write_file
from burnish.artifacts.grid_folder import is_grid
from burnish.report import headline, results_section, settings_section, stage_section
from burnish.report.compare import render_comparison
from burnish.report.page import REPORT, build_page, describe_command
from burnish.report.read import RunFiles, read_run


def render_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder (or a grid's) from the files there, and return its path.

    The page holds its styles and drawings itself and loads nothing. Files that are missing or damaged are named on it.

    Raises:
        UsageError: The folder is no run.
        ResourceError: The page cannot be written.
    """
    if is_grid(run_dir):
        return render_comparison(run_dir)
    run = read_run(Path(run_dir))
    place = run.path / REPORT
    write_file(place, render_page(run))
    return place


def render_page(run: RunFiles) -> str:
    """The page as text."""
    sections = [
        ("results", "Results", results_section.render_results(run)),
        ("training", "Training", stage_section.render_stages(run)),
        ("samples", "Sample answers", results_section.render_samples(run)),
        ("settings", "Settings", settings_section.render_settings(run)),
        ("environment", "Environment", settings_section.render_environment(run)),
    ]
    name = str(run.record.get("name") or run.path.name)
    return build_page(name, headline.render_headline(run), sections, describe_command(run.record))

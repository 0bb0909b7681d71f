"""The report: one self-contained page from a run's files, for a phone, a screen or paper."""

from __future__ import annotations

from html import escape
from pathlib import Path

from burnish import __version__
from burnish.artifacts.folder import write_file
from burnish.report import headline, results_section, settings_section, stage_section
from burnish.report.read import RunFiles, read_run
from burnish.report.style import CSS

REPORT = "report.html"


def render_report(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder from the files there, and return its path.

    The page holds its styles and drawings itself and loads nothing. Files that are missing or damaged are named on it.

    Raises:
        UsageError: The folder is no run.
        ResourceError: The page cannot be written.
    """
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
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    bodies = "\n".join(f'<section id="{anchor}"><h2>{title}</h2>\n{body}\n</section>' for anchor, title, body in shown)
    name = escape(str(run.record.get("name") or run.path.name))
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="generator" content="burnish {escape(__version__)}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name} · burnish</title>
<style>{CSS}</style>
</head>
<body>
<header>
{headline.render_headline(run)}
<nav>{links}</nav>
</header>
<main>
{bodies}
</main>
<footer>{headline.render_footer(run)}</footer>
</body>
</html>
"""

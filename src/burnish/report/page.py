"""The frame of every page: one file that loads nothing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

from burnish import __version__
from burnish.report.style import CSS

REPORT = "report.html"


def build_page(name: str, head: str, sections: Sequence[tuple[str, str, str]], footer: str) -> str:
    """A page as text.

    Args:
        name: Its title.
        head: HTML of the top.
        sections: (anchor, title, HTML); those without HTML are left out.
        footer: HTML of the end.
    """
    shown = [(anchor, title, body) for anchor, title, body in sections if body]
    links = " ".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, _ in shown)
    bodies = "\n".join(f'<section id="{anchor}"><h2>{title}</h2>\n{body}\n</section>' for anchor, title, body in shown)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width,initial-scale=1">
<meta name="generator" content="burnish {escape(__version__)}">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{escape(name)} · burnish</title>
<style>{CSS}</style>
</head>
<body>
<header>
{head}
<nav>{links}</nav>
</header>
<main>
{bodies}
</main>
<footer>{footer}</footer>
</body>
</html>
"""


def describe_command(record: dict[str, Any]) -> str:
    """Where a page comes from: the command and the run."""
    command = record.get("command")
    shown = ""
    if isinstance(command, list) and command:
        words = [str(c) for c in command]
        words[0] = words[0].replace("\\", "/").rpartition("/")[2]
        shown = f"<p>Command: <code>{escape(' '.join(words))}</code></p>"
    return (
        f"{shown}<p>Made by burnish {escape(__version__)} from the files of run "
        f"<code>{escape(str(record.get('run_id', '')))}</code>. "
        "The page is complete in itself: it loads nothing.</p>"
    )


def join_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]

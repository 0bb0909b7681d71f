"""`burnish data check`, `show`, `stats`: what a stage would make of some data, before anything is trained."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import click

from burnish.cli.flags import KindName, SettingsCommand, is_path
from burnish.config.registry import load_object


@click.group()
def data() -> None:
    """Check, show and count data before training. No model is loaded, and nothing is written."""


def _options(function: Callable[..., Any]) -> Callable[..., Any]:
    for option in reversed(
        [
            click.argument("words", nargs=-1, metavar="SOURCE [KEY=VALUE]..."),
            click.option("--for", "kind", type=KindName(trains=True), required=True, help="Kind of stage."),
            click.option("--model", metavar="MODEL", help="Model whose tokenizer and chat template are used."),
            click.option("--limit", type=click.IntRange(min=1), metavar="N", help="Rows to show, or problems to list."),
            click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout."),
            click.option("--verbose", is_flag=True, expose_value=False, help="Show tracebacks."),
        ]
    ):
        function = option(function)
    return function


@data.command(cls=SettingsCommand)
@_options
def check(words: tuple[str, ...], kind: str, model: str | None, limit: int | None, as_json: bool) -> int:
    """Find every problem, with file, line and remedy; exit 2 if there is one."""
    return _call("burnish.data.check:run_check", words, kind, model, limit or 20, as_json)


@data.command(cls=SettingsCommand)
@_options
def show(words: tuple[str, ...], kind: str, model: str | None, limit: int | None, as_json: bool) -> int:
    """Show rows as the model would see them, with the trained tokens marked."""
    return _call("burnish.data.show:run_show", words, kind, model, limit or 3, as_json)


@data.command(cls=SettingsCommand)
@_options
def stats(words: tuple[str, ...], kind: str, model: str | None, limit: int | None, as_json: bool) -> int:
    """Count rows, prompts and lengths."""
    return _call("burnish.data.stats:run_stats", words, kind, model, limit or 5, as_json)


def _call(target: str, words: tuple[str, ...], kind: str, model: str | None, limit: int, as_json: bool) -> int:
    from burnish.cli.stages import place_word
    from burnish.cli.tokens import export_tokens
    from burnish.config.load import load_recipe

    sources = [word for word in words if is_path(word)]
    if len(sources) > 1:
        raise click.UsageError(
            f"several sources are named: {', '.join(sources)}\n  → name one; settings are written key=value"
        )
    overrides = [place_word(word) for word in words if word not in sources]
    if sources:
        overrides.append(f"stages.0.data={sources[0]}")
    elif not any(word.startswith("stages.0.data") for word in overrides):
        raise click.UsageError("no source is named\n  → name a file, a folder, a bundled set (pocket/chat) or a hub id")
    if model is not None:
        overrides.append(f"model={model}")
    loaded = load_recipe({"stages": [{"kind": kind}]}, overrides=overrides, need_model=False)
    for note in loaded.notes:
        print(f"note: {note}", file=sys.stderr)
    export_tokens()
    return load_object(target)(loaded.recipe.stages[0], tokenizer=model, out=sys.stdout, as_json=as_json, limit=limit)

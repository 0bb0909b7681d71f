"""`burnish run`, and what the stage verbs share with it."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from burnish.cli.flags import SettingsCommand, is_path
from burnish.config.options import RunOptions


def run_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """The options that `run` and the stage verbs have in common."""
    options = [
        click.option("--config", "config_file", metavar="FILE", help="The recipe as an option instead of an argument."),
        click.option(
            "--model-index", type=click.IntRange(min=0), metavar="N", help="Only this model of `models`, from 0."
        ),
        click.option(
            "--cell",
            "cells",
            metavar="NAME",
            multiple=True,
            help="Only these cells of a grid; * stands for any letters.",
        ),
        click.option("--dry-run", is_flag=True, help="Check everything, say what would be done, do nothing."),
        click.option("--output-dir", metavar="DIR", help="Folder of runs (default: the recipe's, runs)."),
        click.option("--run-name", metavar="NAME", help="Name of the run's folder; {stage}, {model} … are filled in."),
        click.option("--resume", is_flag=True, help="Insist: exit 2 if there is nothing to resume."),
        click.option("--fresh", is_flag=True, help="Start over; the old results move to superseded/."),
        click.option("--allow-change", metavar="KEY", multiple=True, help="Continue although KEY changed; recorded."),
        click.option(
            "--num-processes", type=click.IntRange(min=1), default=1, metavar="N", help="Processes on this machine."
        ),
        click.option("--after", metavar="COMMAND", help="Run this when the run is over, whatever its outcome."),
        click.option("--json", "as_json", is_flag=True, help="Results as JSON on stdout."),
        click.option("--verbose", is_flag=True, help="Say more; show tracebacks."),
    ]
    for option in reversed(options):
        function = option(function)
    return function


@click.command(cls=SettingsCommand, name="run", short_help="Run a recipe.")
@click.argument("words", nargs=-1, metavar="RECIPE [KEY=VALUE]...")
@run_options
def run(words: tuple[str, ...], config_file: str | None, **flags: Any) -> int:
    """Run a recipe: a YAML file, or the name of a bundled one.

    KEY=VALUE changes any setting: seed=3, stages.dpo.beta=0.05, dpo.beta=0.05 (also --dpo.beta 0.05).
    The same command again continues an interrupted run and skips what is finished.
    """
    recipes = [word for word in words if is_path(word)]
    if config_file is not None:
        recipes.append(config_file)
    if len(recipes) != 1:
        raise click.UsageError(_explain_recipes(recipes))
    overrides = [word for word in words if word not in recipes]
    return execute(recipes[0], overrides, build_options(**flags))


def build_options(*, as_json: bool, resume_from: str | None = None, **flags: Any) -> RunOptions:
    """The options as one object, checked against each other."""
    options = RunOptions(json=as_json, resume_from=resume_from, **flags)
    if options.resume and options.fresh:
        raise click.UsageError("--resume and --fresh contradict each other\n  → keep one")
    if options.after is not None:
        try:
            words = shlex.split(options.after)
        except ValueError as error:
            raise click.UsageError(
                f"--after {options.after!r} is not a command: {error}\n  → check its quotes"
            ) from None
        if not words:
            raise click.UsageError("--after is empty\n  → name a command")
    return options


def execute(
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    options: RunOptions,
    *,
    checkpoint: Mapping[str, Any] | None = None,
    default_kind: str | None = None,
) -> int:
    """Load the recipe, run it, and run the command that comes after; returns the exit status."""
    from burnish.cli.failure import report_failure

    code = 1
    try:
        code = _execute(source, overrides, options, checkpoint, default_kind)
    except BaseException as error:
        if options.after is None:
            raise
        code = report_failure(error, verbose=options.verbose)
    if options.after is not None and os.environ.get("RANK", "0") == "0":
        run_after(options.after)
    return code


def _execute(
    source: str | Mapping[str, Any],
    overrides: Sequence[str],
    options: RunOptions,
    checkpoint: Mapping[str, Any] | None,
    default_kind: str | None,
) -> int:
    from burnish.cli.tokens import export_tokens
    from burnish.config.load import load_recipe
    from burnish.config.registry import load_object
    from burnish.pipeline.naming import choose_models

    launched = "WORLD_SIZE" in os.environ
    words = list(overrides)
    for key, value in (("output_dir", options.output_dir), ("run_name", options.run_name)):
        if value is not None:
            words.append(f"{key}={value}")
    loaded = load_recipe(
        source,
        overrides=words,
        checkpoint=checkpoint,
        processes=None if launched else options.num_processes,
        default_kind=default_kind,
    )
    choose_models(loaded.recipe, options)  # before processes are started
    if options.dry_run:  # a real run has them in its log
        for note in loaded.notes:
            print(f"note: {note}", file=sys.stderr)
    export_tokens()
    if options.num_processes > 1 and not launched and not options.dry_run:
        return load_object("burnish.pipeline.launch:launch")(
            child_arguments(click.get_current_context().find_root().obj), options.num_processes
        )
    return load_object("burnish.pipeline.run:run_recipe")(loaded, replace(options, output_dir=None, run_name=None))


def child_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line of one process of several: without what belongs to their parent."""
    result, skip = [], False
    for word in arguments:
        name = word.partition("=")[0].replace("_", "-")
        if skip:
            skip = False
        elif name in ("--num-processes", "--after"):
            skip = "=" not in word
        else:
            result.append(word)
    return result


def run_after(command: str) -> None:
    """Run a command without a shell; its failure is reported and changes nothing."""
    try:
        code = subprocess.run(shlex.split(command), check=False).returncode
    except (OSError, ValueError) as error:
        print(f"warning: --after {command!r} could not be started: {error}", file=sys.stderr)
        return
    if code:
        print(f"warning: --after {command!r} ended with status {code}", file=sys.stderr)


def _explain_recipes(recipes: Sequence[str]) -> str:
    from burnish.config.bundled import bundled_recipes

    if recipes:
        return f"several recipes are named: {', '.join(recipes)}\n  → name one; settings are written key=value"
    return f"no recipe is named\n  → name a file, or one of the bundled: {', '.join(bundled_recipes())}"

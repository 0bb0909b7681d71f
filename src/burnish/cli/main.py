"""The command line. Nothing heavy is imported before a command needs it."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from burnish import __version__
from burnish.cli.failure import report_failure
from burnish.config.registry import ALIASES, KINDS

# Command → where it is, and what `burnish --help` says of it.
COMMANDS: dict[str, tuple[str, str]] = {
    "run": ("burnish.cli.run:run", "Run a recipe: a file, or a bundled one by name."),
    "launch": ("burnish.cli.launch:launch", "Write the job that runs a recipe on several machines (Slurm, SkyPilot)."),
    "data": ("burnish.cli.data:data", "Check, show and count data before training."),
    "runs": ("burnish.cli.runs:runs", "List, show and delete runs."),
    "merge": ("burnish.cli.merge:merge", "Fold an adapter into its full-precision base."),
    "report": ("burnish.cli.report:report", "Write a run's report again."),
    "config": ("burnish.cli.config:config", "Schema, examples and resolved recipes."),
    "doctor": ("burnish.cli.doctor:doctor", "What this machine has."),
}
ORDER = ("run", *KINDS, *ALIASES, "launch", "data", "runs", "merge", "report", "config", "doctor")


class LazyGroup(click.Group):
    """A group that imports a command when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(ORDER)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in COMMANDS:
            module, _, name = COMMANDS[cmd_name][0].partition(":")
            return getattr(import_module(module), name)
        if cmd_name in KINDS or cmd_name in ALIASES:
            from burnish.cli.stages import build_verb

            return build_verb(cmd_name)
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Stages, without a recipe file"):
            formatter.write_dl([(name, _describe(name)) for name in ORDER if name not in COMMANDS])
        with formatter.section("Commands"):
            formatter.write_dl([(name, _describe(name)) for name in ORDER if name in COMMANDS])

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0] if args else ""
        if name and not name.startswith("-") and name not in ORDER:
            from burnish.config.spelling import describe_suggestions, suggest

            near = describe_suggestions(suggest(name, ORDER))
            hint = near or "see `burnish --help`"
            if name.endswith((".yaml", ".yml", ".json")):
                hint = f"write `burnish run {name}`"
            raise click.UsageError(f"there is no command {name!r}\n  → {hint}", ctx)
        return super().resolve_command(ctx, args)


def _describe(name: str) -> str:
    if name in COMMANDS:
        return COMMANDS[name][1]
    if name in KINDS:
        return KINDS[name].summary[0].upper() + KINDS[name].summary[1:] + "."
    return f"{ALIASES[name].kind} with {ALIASES[name].describe()}."


def _print_version(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        click.echo(f"burnish {__version__}")
        ctx.exit()


@click.group(
    cls=LazyGroup,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Show the version."
)
@click.pass_context
def cli(ctx: click.Context) -> None:
    """burnish post-trains language models from one recipe: exactly, resumably, on the machine you have.

    Begin with `burnish run quickstart`.
    """
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status.

    0 done; 2 wrong usage, settings or data; 4 stopped for the numbers' sake; 5 disk or memory; 6 an outside service;
    130/143 stopped by a signal; 1 anything else.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    if argv is None and "_BURNISH_COMPLETE" in os.environ:
        from click.shell_completion import shell_complete

        return shell_complete(cli, {}, "burnish", "_BURNISH_COMPLETE", os.environ["_BURNISH_COMPLETE"])
    verbose = "--verbose" in arguments or os.environ.get("BURNISH_TRACEBACK", "0") not in ("", "0")
    try:
        with cli.make_context("burnish", list(arguments), obj=arguments) as ctx:
            result = cli.invoke(ctx)
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except click.exceptions.Exit as exit_:
        return exit_.exit_code
    except click.ClickException as error:
        _say_usage(error)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # leaving does not write to the pipe again
        return 141
    except BaseException as error:
        return report_failure(error, verbose=verbose)


def _say_usage(error: click.ClickException) -> None:
    if isinstance(error, click.UsageError) and error.ctx is not None:
        print(error.ctx.get_usage(), file=sys.stderr)
        message = error.format_message()
        if "→" not in message:
            message += f"\n  → see `{error.ctx.command_path} --help`"
        print(f"error: {message}", file=sys.stderr)
    else:
        print(f"error: {error.format_message()}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())

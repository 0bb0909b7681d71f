"""`burnish launch`: the text that starts a recipe on several machines. It is written, not sent."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import click

from burnish.cli.flags import SettingsCommand, is_path

SLURM_ONLY = ("time", "partition", "account")


@click.command(cls=SettingsCommand, name="launch", short_help="Write a job for several machines.")
@click.argument("words", nargs=-1, metavar="RECIPE [KEY=VALUE]...")
@click.option("--via", type=click.Choice(["slurm", "sky"]), required=True, help="An sbatch script, or a SkyPilot task.")
@click.option("--nodes", type=click.IntRange(min=1), required=True, metavar="N", help="Machines.")
@click.option(
    "--gpus-per-node",
    "gpus",
    type=click.IntRange(min=0),
    default=8,
    show_default=True,
    metavar="N",
    help="GPUs of a machine, one process each; 0 = one process on the CPU.",
)
@click.option(
    "--cpus-per-node", "cpus", type=click.IntRange(min=1), metavar="N", help="CPU cores; default: 8 a process."
)
@click.option("--gpu-type", metavar="TYPE", help="As the cluster calls it, e.g. H100.")
@click.option("--time", metavar="LIMIT", help="Slurm's time limit; a checkpoint is written before it.")
@click.option("--partition", metavar="NAME", help="Slurm's partition.")
@click.option("--account", metavar="NAME", help="Slurm's account.")
@click.option("--name", metavar="NAME", help="Name of the job; default: the recipe's.")
@click.option(
    "--setup", metavar="COMMAND", help="Shell command that makes burnish available, e.g. activates its environment."
)
@click.option(
    "--env",
    "variables",
    metavar="VARIABLE",
    multiple=True,
    help="A variable that the run needs, such as HF_TOKEN; by name.",
)
@click.option(
    "--output", type=click.Path(dir_okay=False, path_type=Path), help="File; default: NAME.sbatch or NAME.sky.yaml."
)
@click.option("--dry-run", is_flag=True, help="Print the text instead of writing it.")
def launch(words: tuple[str, ...], output: Path | None, dry_run: bool, **options: Any) -> int:
    """Check a recipe, and write the sbatch script or the SkyPilot task that runs it on several machines.

    The text is all that is made: nothing is submitted. KEY=VALUE changes settings, as for `burnish run`.
    """
    from burnish import __version__
    from burnish.cli.cluster_text import ClusterJob, make_job_name, render_sky, render_slurm
    from burnish.config.load import load_recipe

    via = options.pop("via")
    recipes = [word for word in words if is_path(word)]
    if len(recipes) != 1:
        raise click.UsageError("name one recipe\n  → a file, or the name of a bundled one")
    overrides = [word for word in words if word not in recipes]
    _check_options(via, recipes[0], options)
    processes = options["nodes"] * max(options["gpus"], 1)
    loaded = load_recipe(recipes[0], overrides=overrides, processes=processes, check_device=False)
    for note in loaded.notes:
        click.echo(f"note: {note}", err=True)
    name = make_job_name(options.pop("name") or loaded.recipe.name)
    job = ClusterJob(name=name, arguments=[*recipes, *overrides], version=__version__, **options)
    text = render_slurm(job) if via == "slurm" else render_sky(job)
    if dry_run:
        click.echo(text, nl=False)
        return 0
    file = output or Path(f"{name}.sbatch" if via == "slurm" else f"{name}.sky.yaml")
    _write(file, text, replace=output is not None)
    submit = "sbatch" if via == "slurm" else "sky launch"
    secrets = "".join(f" --secret {variable}" for variable in job.variables) if via == "sky" else ""
    click.echo(f"wrote {file}; submit it with: {submit}{secrets} {shlex.quote(str(file))}")
    return 0


def _check_options(via: str, recipe: str, options: dict[str, Any]) -> None:
    """Options that contradict the scheduler, or would not survive its syntax."""
    from burnish.cli.cluster_text import is_plain, is_time, is_variable
    from burnish.config.secrets import find_secret

    if via == "sky":
        for key in SLURM_ONLY:
            if options[key] is not None:
                raise click.UsageError(f"--{key} is Slurm's\n  → leave it out, or write --via slurm")
        if options["gpus"] and options["gpu_type"] is None:
            raise click.UsageError("SkyPilot needs the type of GPU\n  → add --gpu-type, e.g. --gpu-type H100")
        path = Path(recipe).expanduser()
        if path.is_file() and not path.resolve().is_relative_to(Path.cwd()):
            raise click.UsageError(
                f"{recipe!r} lies outside the current folder, which is what SkyPilot uploads\n  → start from a folder above it"
            )
    for key in (*SLURM_ONLY[1:], "gpu_type"):
        if options[key] is not None and not is_plain(options[key]):
            raise click.UsageError(
                f"--{key.replace('_', '-')} {options[key]!r} is no name that Slurm takes\n  → check it"
            )
    if options["time"] is not None and not is_time(options["time"]):
        raise click.UsageError(
            f"--time {options['time']!r} is no time\n  → write e.g. 24:00:00, or 2-12 for 2 days 12 hours"
        )
    for variable in options["variables"]:
        if not is_variable(variable):
            raise click.UsageError(
                f"--env takes the name of a variable, not {variable.partition('=')[0]!r} with a value\n"
                "  → set it in the shell that submits the job; values stay out of the file"
            )
    if options["setup"] is not None and find_secret(options["setup"]):
        raise click.UsageError("--setup holds a secret\n  → put it into a variable, and name that with --env")


def _write(file: Path, text: str, *, replace: bool) -> None:
    """Writes the file; one that was edited since is not overwritten unless it was named."""
    from burnish.errors import UsageError

    if not replace and file.exists() and file.read_text(encoding="utf-8", errors="replace") != text:
        raise UsageError(
            f"{file} exists and holds something else",
            where="--output",
            remedy=f"name a file: --output {shlex.quote(str(file))} overwrites it",
        )
    file.write_text(text, encoding="utf-8")

"""The text of a job for several machines: a Slurm script or a SkyPilot task."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

import yaml

MARGIN_SECONDS = 180  # before the time limit, for a checkpoint
CPUS_PER_PROCESS = 8
_PLAIN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,:@+/=-]*")
_TIME = re.compile(r"\d+|\d+:\d{2}(:\d{2})?|\d+-\d+(:\d{2}){0,2}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True, slots=True)
class ClusterJob:
    """A run on several machines.

    Attributes:
        name: Name of the job.
        arguments: What follows `burnish run`: the recipe and its changes.
        nodes: Machines.
        gpus: GPUs of a machine, one process each; 0: one process on the CPU.
        cpus: CPU cores of a machine for the job; None: 8 a process.
        gpu_type: Type of GPU as the cluster calls it.
        time: Time limit as Slurm writes it.
        partition, account: Slurm's.
        setup: A shell command that makes burnish available on a machine.
        variables: Names of environment variables that the run needs; their values stay out of the text.
        version: burnish's, for SkyPilot's setup.
    """

    name: str
    arguments: Sequence[str]
    nodes: int
    gpus: int
    cpus: int | None = None
    gpu_type: str | None = None
    time: str | None = None
    partition: str | None = None
    account: str | None = None
    setup: str | None = None
    variables: Sequence[str] = ()
    version: str = ""

    @property
    def processes_per_node(self) -> int:
        """One process a GPU, or one on the CPU."""
        return max(self.gpus, 1)


def is_plain(word: str) -> bool:
    """Whether a word may stand in a directive of Slurm as it is."""
    return _PLAIN.fullmatch(word) is not None


def is_time(word: str) -> bool:
    """Whether Slurm reads a word as a time: minutes, minutes:seconds, hours:…, days-hours:…."""
    return _TIME.fullmatch(word) is not None


def is_variable(word: str) -> bool:
    """Whether a word is the name of an environment variable."""
    return _VARIABLE.fullmatch(word) is not None


def make_job_name(name: str) -> str:
    """A name that every scheduler takes: letters, digits and -, 60 at most."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")[:60].strip("-") or "burnish"


def render_slurm(job: ClusterJob) -> str:
    """A script for sbatch: one task a machine, each of which torchrun turns into one process a GPU."""
    cpus = job.cpus or CPUS_PER_PROCESS * job.processes_per_node
    kind = f"{job.gpu_type}:" if job.gpu_type else ""
    directives = [
        f"--job-name={job.name}",
        f"--nodes={job.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={cpus}",
        *([f"--gpus-per-node={kind}{job.gpus}"] if job.gpus else []),
        *([f"--time={job.time}", f"--signal=TERM@{MARGIN_SECONDS}"] if job.time else []),
        *([f"--partition={job.partition}"] if job.partition else []),
        *([f"--account={job.account}"] if job.account else []),
        "--output=%x-%j.log",
        "--open-mode=append",
        "--requeue",
    ]
    checks = [f': "${{{name}:?set it before sbatch}}"' for name in job.variables]
    command = _render_torchrun(
        job,
        ("--rdzv-backend=c10d", '--rdzv-endpoint="$first:$port"', '--rdzv-id="$SLURM_JOB_ID"'),
        f"srun --nodes={job.nodes} --ntasks-per-node=1 --cpus-per-task={cpus} --kill-on-bad-exit=1",
    )
    lines = [
        "#!/bin/bash",
        "# Written by `burnish launch`. Submit it from a folder that all machines share; the output folder must be shared too.",
        "# Submitted again, or requeued, it goes on from the last checkpoint.",
        *(f"#SBATCH {directive}" for directive in directives),
        "",
        "set -euo pipefail",
        *checks,
        *([job.setup] if job.setup else []),
        'nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")',
        "first=${nodes%%$'\\n'*}",
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "",
        command,
    ]
    return "\n".join(lines) + "\n"


def render_sky(job: ClusterJob) -> str:
    """A SkyPilot task; every machine runs torchrun, and finds the first by SkyPilot's variables."""
    command = _render_torchrun(
        job,
        ('--node-rank="$SKYPILOT_NODE_RANK"', "--master-addr=\"${SKYPILOT_NODE_IPS%%$'\\n'*}\"", "--master-port=29500"),
    )
    task: dict[str, object] = {"name": job.name.lower(), "num_nodes": job.nodes, "workdir": "."}
    resources: dict[str, object] = {}
    if job.gpus:
        resources["accelerators"] = f"{job.gpu_type}:{job.gpus}"
    if job.cpus:
        resources["cpus"] = f"{job.cpus}+"
    if resources:
        task["resources"] = resources
    if job.variables:
        task["secrets"] = dict.fromkeys(job.variables)
    task["setup"] = job.setup or f"pip install 'burnish=={job.version}'"
    task["run"] = f"set -e\n{command}\n"
    head = (
        "# Written by `burnish launch`. The current folder is uploaded; with several machines the output folder must lie on\n"
        "# storage that they share (SkyPilot's file_mounts). Launched again, it goes on from the last checkpoint.\n"
    )
    return head + yaml.dump(task, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)


class _Dumper(yaml.SafeDumper):
    """Writes texts of several lines as blocks."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _represent_text)


def _render_torchrun(job: ClusterJob, meeting: Sequence[str], before: str = "") -> str:
    """The command over several lines; words of the recipe are quoted for the shell."""
    words = [
        *([before] if before else []),
        f"torchrun --nnodes={job.nodes} --nproc-per-node={job.processes_per_node} --max-restarts=0",
        " ".join(meeting),
        " ".join(["-m burnish run", *map(shlex.quote, job.arguments)]),
    ]
    return " \\\n    ".join(words)

"""`burnish doctor`: what this machine has."""

from __future__ import annotations

import json
import os
import platform
import shutil
from pathlib import Path
from typing import Any

import click

from burnish import __version__
from burnish.artifacts.environment import count_cpus, find_version, measure_memory

_REQUIRED = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "pydantic",
)
_EXTRAS = {"tensorboard": "track", "wandb": "track", "bitsandbytes": "quant"}
_VARIABLES = (
    "HF_HOME",
    "HF_HUB_OFFLINE",
    "CUDA_VISIBLE_DEVICES",
    "OMP_NUM_THREADS",
    "WORLD_SIZE",
    "BURNISH_CACHE",
    "BURNISH_KERNELS",
)


@click.command()
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def doctor(as_json: bool) -> int:
    """Show versions, device, threads, memory and extras; exit 1 if something that is needed is missing."""
    facts = collect_facts()
    if as_json:
        print(json.dumps(facts, indent=2))
    else:
        for title, section in facts.items():
            print(title)
            for key, value in section.items():
                print(f"  {key:<16} {value}")
    return 1 if facts["problems"] else 0


def collect_facts() -> dict[str, dict[str, Any]]:
    """Facts by section. Values of variables that may be secret are not among them."""
    packages = {name: find_version(name) for name in _REQUIRED}
    problems = {name: "not installed" for name, found in packages.items() if found is None}
    extras = {
        name: find_version(name) or f"missing (pip install 'burnish[{extra}]')" for name, extra in _EXTRAS.items()
    }
    tokens = {name: "set" for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY") if os.environ.get(name)}
    return {
        "burnish": {"version": __version__, "python": platform.python_version(), "platform": platform.platform()},
        "machine": _describe_machine(),
        "device": _describe_device() if packages["torch"] else {},
        "packages": {name: found or "missing" for name, found in packages.items()},
        "extras": extras,
        "environment": {**{name: os.environ[name] for name in _VARIABLES if name in os.environ}, **tokens},
        "problems": problems,
    }


def _describe_machine() -> dict[str, Any]:
    facts: dict[str, Any] = {"cpus": f"{count_cpus()} usable of {os.cpu_count()}"}
    if memory := measure_memory():
        facts["memory"] = f"{memory / 2**30:.1f} GiB"
    facts["disk free"] = f"{shutil.disk_usage(Path.cwd()).free / 2**30:.1f} GiB"
    return facts


def _describe_device() -> dict[str, Any]:
    import torch

    from burnish.core.allocator import keep_freed_memory
    from burnish.core.kernels.build import load_kernels

    facts: dict[str, Any] = {
        "cpu features": torch.backends.cpu.get_cpu_capability(),
        "torch threads": torch.get_num_threads(),
        "allocator": keep_freed_memory(),
        "C kernels": load_kernels().note,
    }
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(i)
            facts[f"cuda {i}"] = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        facts["bf16"] = torch.cuda.is_bf16_supported()
    elif torch.backends.mps.is_available():
        facts["mps"] = "available"
    else:
        facts["cuda"] = "none"
    return facts

"""What a run ran on: versions, platform, processor, threads. By allow-list, so nothing secret gets in."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from burnish import __version__
from burnish.artifacts.redact import redact_tree

_PACKAGES = (
    "torch",
    "transformers",
    "peft",
    "datasets",
    "tokenizers",
    "safetensors",
    "numpy",
    "scipy",
    "pydantic",
    "bitsandbytes",
    "deepspeed",
    "vllm",
)
_VARIABLES = (
    "OMP_NUM_THREADS",
    "MKL_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "TOKENIZERS_PARALLELISM",
    "CUDA_VISIBLE_DEVICES",
    "CUBLAS_WORKSPACE_CONFIG",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "BURNISH_KERNELS",
    "WORLD_SIZE",
    "LOCAL_WORLD_SIZE",
    "NCCL_P2P_DISABLE",
    "PYTHONHASHSEED",
)


def describe_environment(extra: dict[str, Any] | None = None) -> dict[str, Any]:
    """Versions of the packages that decide numbers, the platform, and the caller's `extra` (threads, device, ranks)."""
    facts: dict[str, Any] = {
        "burnish": __version__,
        "python": platform.python_version(),
        "packages": {name: found for name in _PACKAGES if (found := find_version(name))},
        "platform": platform.platform(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cpus": count_cpus(),
        "memory_bytes": measure_memory(),
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
        "commit": git_commit(Path.cwd()),
    }
    return redact_tree({**facts, **(extra or {})})


def find_version(name: str) -> str | None:
    """The version of an installed package; None without it."""
    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


def git_commit(folder: Path) -> str | None:
    """The commit checked out where the command was given, read from files; None outside a repository."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        for place in (folder, *folder.parents):
            git = place / ".git"
            if git.is_file():
                git = (place / git.read_text(encoding="utf-8").split(":", 1)[1].strip()).resolve()
            if not git.is_dir():
                continue
            head = (git / "HEAD").read_text(encoding="utf-8").strip()
            if not head.startswith("ref: "):
                return head[:40]
            name = head[5:]
            shared = git / "commondir"
            bases = [git, (git / shared.read_text(encoding="utf-8").strip()).resolve()] if shared.exists() else [git]
            for base in bases:
                if (base / name).exists():
                    return (base / name).read_text(encoding="utf-8").strip()[:40]
                packed = base / "packed-refs"
                for line in packed.read_text(encoding="utf-8").splitlines() if packed.exists() else ():
                    if line.endswith(f" {name}"):
                        return line[:40]
            return None
    return None


def count_cpus() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _processor() -> str:
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
                if line.startswith(("model name", "Hardware")):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_memory() -> int | None:
    """Bytes of the machine's memory; None where that cannot be told."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None

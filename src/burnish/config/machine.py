"""What a stage needs of the machine that can be checked without loading anything: local files, extras, a device."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.config.base import Settings
from burnish.config.data import DataSource
from burnish.config.problems import Problem
from burnish.config.registry import list_model_settings
from burnish.config.spelling import describe_suggestions, suggest

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt", ".gz", ".ndjson", ".arrow")
_EXTRAS = {"tensorboard": "track", "wandb": "track", "bitsandbytes": "quant"}


def check_machine(settings: Settings, path: str, folder: Path, *, device: bool = True) -> list[Problem]:
    """Problems of a stage on this machine.

    Args:
        settings: The stage.
        path: Where it stands in the recipe ("stages.sft").
        folder: Folder of the recipe, to say so if a missing file lies there.
        device: Check that a device that the stage needs is here.
    """
    problems = []
    for key, source in _local_sources(settings):
        if not _exists(source):
            problems.append(
                Problem(f"{path}.{key}", f"there is no file or folder {source!r}", _find_remedy(source, folder))
            )
    template = getattr(settings, "chat_template", None)
    if template and template.endswith((".jinja", ".j2", ".jinja2")) and "{" not in template and not _exists(template):
        problems.append(
            Problem(f"{path}.chat_template", f"there is no file {template!r}", _find_remedy(template, folder))
        )
    for sink in getattr(settings, "report_to", []):
        problems += _check_extra(f"{path}.report_to", sink, sink)
    if (quantize := getattr(settings, "quantize", "none")) != "none":
        problems += _check_extra(f"{path}.quantize", quantize, "bitsandbytes")
    if getattr(settings, "optim", None) == "adamw_8bit":
        problems += _check_extra(f"{path}.optim", "adamw_8bit", "bitsandbytes")
        if device and not has_cuda_device():
            problems.append(
                Problem(
                    f"{path}.optim",
                    "is adamw_8bit, which needs a CUDA device",
                    "set optim: adamw (or adafactor to save memory)",
                )
            )
    return problems


def has_cuda_device() -> bool:
    """Whether an NVIDIA device shows in the file system; on systems where it cannot be seen so, True."""
    if not sys.platform.startswith("linux"):
        return sys.platform == "win32"
    return any(Path(name).exists() for name in ("/dev/nvidiactl", "/dev/nvidia0", "/dev/dxg"))


def looks_local(source: str) -> bool:
    """Whether a source can only mean a path: ./x, ../x, /x, ~/x, a glob, or a data file's suffix."""
    return (
        source.startswith((".", "/", "~"))
        or source.lower().endswith(DATA_SUFFIXES)
        or any(mark in source for mark in "*?\\")
    )


def _check_extra(key: str, value: str, module: str) -> list[Problem]:
    if find_spec(module) is not None:
        return []
    remedy = f"pip install 'burnish[{_EXTRAS[module]}]', or choose another value"
    return [Problem(key, f"is {value}, but {module} is not installed", remedy)]


def _local_sources(settings: Settings) -> Iterator[tuple[str, str]]:
    for key in ("data", "eval_data"):
        for source in _flatten(getattr(settings, key, None)):
            if looks_local(source):
                yield key, source
    for key in ("model", *list_model_settings()):
        value = getattr(settings, key, None)
        if isinstance(value, str) and looks_local(value):
            yield key, value
    for task in getattr(settings, "tasks", []):
        if looks_local(task):
            yield "tasks", task


def _flatten(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, DataSource):
        yield value.source
    elif isinstance(value, list):
        for item in value:
            yield from _flatten(item)


def _exists(source: str) -> bool:
    path = Path(source).expanduser()
    if any(mark in source for mark in "*?["):
        if path.exists():
            return True
        anchor = Path(path.anchor) if path.anchor else Path()
        pattern = str(path.relative_to(path.anchor)) if path.anchor else str(path)
        return any(True for _ in anchor.glob(pattern))
    return path.exists()


def _find_remedy(source: str, folder: Path) -> str:
    path = Path(source)
    beside = folder / source
    if not path.is_absolute() and beside.exists() and str(folder) != ".":
        return f"paths are relative to the current folder; it lies at {beside}"
    if "final" in path.parts or path.name.startswith("checkpoint-"):
        return "the stage that makes it has not finished: train it first, or put both into one recipe with init_from"
    if path.parent.is_dir():
        near = suggest(path.name, [item.name for item in path.parent.iterdir()])
        if near:
            return describe_suggestions(str(path.parent / name) for name in near)
        return f"check the name (the folder {str(path.parent)!r} exists)"
    return f"check the path (there is no folder {str(path.parent)!r}; the current one is {Path().resolve().name!r})"

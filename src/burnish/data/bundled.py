"""The models and data sets that the package carries."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

_DATA_FILES = ("train.jsonl.gz", "test.jsonl.gz")


def _assets() -> Path | None:
    folder = files("burnish") / "assets"
    return Path(str(folder)) if folder.is_dir() else None


def _known(name: str) -> bool:
    parts = name.split("/")
    return bool(name) and all(part and part not in (".", "..") and "\\" not in part for part in parts)


def resolve_model(name: str) -> Path | None:
    """The folder of the bundled model `name` ("pocket"), or None if there is none of that name."""
    assets = _assets()
    if assets is None or not _known(name) or "/" in name:
        return None
    folder = assets / "models" / name
    return folder if folder.is_dir() else None


def resolve_data(name: str) -> Path | None:
    """The folder of the bundled data set `name` ("pocket/chat"), which holds train and test files, or None."""
    assets = _assets()
    if assets is None or not _known(name):
        return None
    for candidate in (name, name.replace("/", "-"), name.removeprefix("pocket/")):
        folder = assets / "data" / candidate
        if folder.is_dir() and any((folder / file).is_file() for file in _DATA_FILES):
            return folder
    return None


def list_models() -> list[str]:
    """Names of the bundled models."""
    assets = _assets()
    if assets is None or not (assets / "models").is_dir():
        return []
    return sorted(folder.name for folder in (assets / "models").iterdir() if folder.is_dir())


def list_data() -> list[str]:
    """Names of the bundled data sets, as recipes write them."""
    assets = _assets()
    if assets is None or not (assets / "data").is_dir():
        return []
    root = assets / "data"
    found = {path.parent.relative_to(root).as_posix() for file in _DATA_FILES for path in root.rglob(file)}
    return sorted(name if "/" in name else f"pocket/{name}" for name in found)

"""The recipes that come with burnish."""

from __future__ import annotations

from importlib.resources import files
from importlib.resources.abc import Traversable


def bundled_recipes() -> dict[str, Traversable]:
    """Name and file of each bundled recipe."""
    folder = files("burnish") / "recipes"
    if not folder.is_dir():
        return {}
    found = {item.name.removesuffix(".yaml"): item for item in folder.iterdir() if item.name.endswith(".yaml")}
    return dict(sorted(found.items()))


def read_summary(recipe: Traversable) -> str:
    """The first comment line of a recipe."""
    first = recipe.read_text(encoding="utf-8").partition("\n")[0]
    return first.lstrip("# ").strip() if first.startswith("#") else ""

"""A resolved recipe as people read it: each value with its source."""

from __future__ import annotations

from typing import Any

from burnish.config.batch import compute_batch
from burnish.config.example import format_yaml
from burnish.config.load import LoadedRecipe
from burnish.config.registry import SECTIONS
from burnish.config.train import TrainSettings


def render_resolved(loaded: LoadedRecipe, *, everything: bool = False) -> str:
    """The resolved recipe as YAML, each value with its source; without `everything` only what is not a default."""
    lines = [f"# {loaded.origin}, resolved; run folder: {loaded.recipe.output_dir}/{loaded.run_name()}"]
    recipe = loaded.recipe.resolved()
    stages = recipe.pop("stages")
    lines += _resolved_lines(recipe, "", "", loaded, everything, keep=("name",))
    lines.append("stages:")
    for stage in stages:
        kind, name = stage.pop("kind"), stage.pop("name")
        lines.append(f"  - kind: {kind}")
        lines.append(f"    name: {name}")
        settings = loaded.recipe.stage(name)
        if isinstance(settings, TrainSettings):
            lines.append(f"    # {compute_batch(settings, loaded.processes)}")
        lines += _resolved_lines(stage, f"stages.{name}.", "    ", loaded, everything)
    return "\n".join(lines) + "\n"


def _resolved_lines(
    values: dict[str, Any],
    path: str,
    pad: str,
    loaded: LoadedRecipe,
    everything: bool,
    keep: tuple[str, ...] = (),
) -> list[str]:
    lines = []
    for key, value in values.items():
        source = loaded.source_of(f"{path}{key}")
        below = [place for place in loaded.sources if place.startswith(f"{path}{key}.")]
        if source == "default" and below:
            source = loaded.sources[below[0]]
        if not everything and source == "default" and key not in keep:
            continue
        if isinstance(value, dict) and value and key in SECTIONS:
            inner = _resolved_lines(value, f"{path}{key}.", pad + "  ", loaded, everything)
            lines.append(f"{pad}{key}:" if inner else f"{pad}{key}: {{}}  # {source}")
            lines += inner
        else:
            lines.append(f"{pad}{key}: {format_yaml(value)}".ljust(56) + f"  # {source}")
    return lines

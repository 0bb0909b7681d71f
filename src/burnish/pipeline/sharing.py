"""Which stages the cells of a grid have in common, and the folder that holds each: found from settings alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from burnish.artifacts.grid_folder import CELLS, SHARED
from burnish.artifacts.run_folder import plain_name
from burnish.config.grid import Axis, Cell
from burnish.config.recipe import Recipe
from burnish.config.train import TrainSettings
from burnish.data.bundled import resolve_model
from burnish.pipeline.naming import find_named


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a stage of a cell lies.

    Attributes:
        cell, stage: Names; `index` counts from 1.
        folder: Relative to the grid's folder: `cells/<cell>/01-sft`, or `shared/01-sft--pocket`.
        users: Names of all cells that have this stage, in the grid's order.
        values: The cell's: axis label → name of the choice.
    """

    cell: str
    stage: str
    index: int
    folder: str
    users: tuple[str, ...]
    values: Mapping[str, str]

    @property
    def shared(self) -> bool:
        """Whether it lies outside the cell's folder."""
        return self.folder.startswith(f"{SHARED}/")


def place_stages(axes: Sequence[Axis], cells: Sequence[Cell]) -> dict[str, list[Placement]]:
    """Cell → its stages in order. Stages of equal identity lie at one place, named after what they depend on."""
    identities = {cell.name: identify_stages(cell.recipe) for cell in cells}
    users: dict[str, list[Cell]] = {}
    for cell in cells:
        for identity in identities[cell.name]:
            users.setdefault(identity, []).append(cell)
    out: dict[str, list[Placement]] = {cell.name: [] for cell in cells}
    folders: dict[str, str] = {}
    most = max(len(found) for found in identities.values())
    for at in range(most):
        having = [cell for cell in cells if at < len(identities[cell.name])]
        found = [(cell.values, identities[cell.name][at]) for cell in having]
        relevant = find_relevant([axis.label for axis in axes], found)
        for cell in having:
            identity = identities[cell.name][at]
            stage = cell.recipe.stage_names()[at]
            own = f"{at + 1:02d}-{plain_name(stage)}"
            if len(users[identity]) > 1:
                words = "_".join(cell.values[label] for label in relevant)
                folder = folders.setdefault(identity, f"{SHARED}/{own}--{words}" if words else f"{SHARED}/{own}")
            else:
                folder = f"{CELLS}/{cell.name}/{own}"
            names = tuple(user.name for user in users[identity])
            out[cell.name].append(Placement(cell.name, stage, at + 1, folder, names, cell.values))
    return out


def identify_stages(recipe: Recipe) -> list[str]:
    """A stage's identity: position, settings, and the identities of all that it depends on.

    Equal identities have equal settings and read the same files, so they come to the same content key.
    """
    found: dict[str, str] = {}
    out = []
    for index, stage in enumerate(recipe.stages, start=1):
        values: dict[str, Any] = stage.model_dump(mode="json")
        name = str(values.get("name"))
        if isinstance(stage, TrainSettings):
            start = found[stage.init_from] if stage.init_from is not None else _name_model(stage.model)
            before: Any = [start, *(found[other] for other in find_named(stage, found))]
        else:  # an evaluation may read every result before it, and the base
            before = [*found.items(), _name_model(recipe.model)]
        text = json.dumps([index, values, before], sort_keys=True, ensure_ascii=False)
        identity = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
        if isinstance(stage, TrainSettings):
            found[name] = identity
        out.append(identity)
    return out


def _name_model(model: str | None) -> str | None:
    """The bundled model's folder where a name means one: two spellings of one model are one."""
    found = resolve_model(model) if model is not None else None
    return str(found) if found is not None else model


def find_relevant(labels: Sequence[str], cells: Sequence[tuple[Mapping[str, str], str]]) -> list[str]:
    """Labels of a smallest set of axes that decides what a stage is; axes are dropped from the last to the first.

    Args:
        labels: Of all axes.
        cells: Of each cell the choice on each axis, and what identifies the stage there.
    """
    kept = list(labels)
    for label in reversed(labels):
        rest = [other for other in kept if other != label]
        seen: dict[tuple[str, ...], str] = {}
        if all(seen.setdefault(tuple(values[x] for x in rest), identity) == identity for values, identity in cells):
            kept = rest
    return kept

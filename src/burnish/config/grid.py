"""`grid:` in a recipe: axes of settings, stages and models whose combinations are runs of their own.

    grid:
      prefer: {dpo: {kind: dpo}, ipo: {kind: ipo, beta: 0.2}}   # a stage in two forms
      prefer.seed: [1, 2, 3]                                    # a setting, written as on the command line
      baseline: dpo
      exclude: [{prefer: ipo, prefer.seed: 3}]

A list gives values, a mapping gives them names. Nothing is loaded here: from trees to axes, and from axes to cells.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from burnish.config.keys import RECIPE_KEYS, all_setting_names, kind_names
from burnish.config.overrides import Override, find_stage, is_setting
from burnish.config.problems import Problem, format_value
from burnish.config.recipe import Recipe
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Layer, Node, Place

GRID = "grid"
MODEL = "model"
BASE = "base"
MAX_CELLS = 256
MAX_NAME = 100
_RESERVED = ("baseline", "exclude", "max_cells")
_FIXED = frozenset({"name", "run_name", "output_dir", "stages", "models", GRID})  # of the recipe, not of a cell
_NAME = re.compile(r"[A-Za-z0-9][\w.+=@%,-]{0,47}", re.ASCII)
_FORBIDDEN = re.compile(r"[^\w.+=@%,-]+", re.ASCII)


@dataclass(frozen=True, slots=True)
class Choice:
    """One value of an axis: its name within cells' names, and the value."""

    name: str
    node: Node


@dataclass(frozen=True, slots=True)
class Axis:
    """What varies.

    Attributes:
        label: How the grid names it: "model", a stage's name, or a setting's path.
        stage: The stage whose forms the choices are; None for a setting.
        parts: The setting's path, as `Override` has it.
        choices: At least one.
        place: Where it is written.
    """

    label: str
    stage: str | None
    parts: tuple[str, ...]
    choices: tuple[Choice, ...]
    place: Place

    @property
    def is_seed(self) -> bool:
        """Whether its values are repetitions of the same thing."""
        return self.stage is None and self.parts[-1] == "seed"


@dataclass(frozen=True, slots=True)
class Cell:
    """One combination: a complete recipe.

    Attributes:
        name: Short, fit for a folder, unique in the grid.
        values: Axis label → name of the choice.
        tables: What became of the lines of each `distributed.config`.
    """

    name: str
    values: Mapping[str, str]
    recipe: Recipe
    sources: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Grid:
    """A recipe's grid.

    Attributes:
        axes: In order; the last one varies fastest.
        baseline: What the others are compared with: axis label → choice, or {"": stage}; {} for none.
        cells: All combinations but those excluded.
    """

    axes: tuple[Axis, ...]
    baseline: Mapping[str, str]
    cells: tuple[Cell, ...]


class GridReader:
    """Reads the tree of a grid.

    Args:
        stages: Names of the recipe's stages.
        kinds: Canonical kind of each ("" where the grid gives it).
        written: Kind of each as written.
        problems: Problems are appended here.
    """

    def __init__(
        self, stages: Sequence[str], kinds: Sequence[str], written: Sequence[str], problems: list[Problem]
    ) -> None:
        self.stages, self.kinds, self.written, self.problems = list(stages), kinds, written, problems

    def read_axes(self, tree: Node, models: Node | None) -> tuple[Axis, ...]:
        """The axes, models first; those that cannot be read become problems."""
        axes = []
        if models is not None:
            axes.append(self._read_axis(MODEL, models))
        for key, node in tree.value.items():
            if key in _RESERVED:
                continue
            if key in (MODEL, "models") and models is not None:
                self._problem(key, "models are given twice, at the top and in the grid", "keep one of the two", node)
                continue
            axes.append(self._read_axis(MODEL if key == "models" else key, node))
        found = [axis for axis in axes if axis is not None]
        if not axes:
            self._problem("", "has no axis", "add one, e.g. seed: [1, 2, 3]", tree)
        for one, other in itertools.combinations(found, 2):
            if (one.stage, one.parts) == (other.stage, other.parts):
                self._problem(other.label, f"is the same as {one.label}", "keep one of the two", tree)
        return tuple(found)

    def _read_axis(self, key: str, node: Node) -> Axis | None:
        found = self._find_target(key, node)
        if found is None:
            return None
        label, stage, parts = found
        if isinstance(node.value, dict) and node.value:
            named = list(node.value.items())
        elif isinstance(node.value, list) and node.value:
            named = [("", child) for child in node.value]
        else:
            self._problem(key, f"is {format_value(node.plain())}", "write a list of values, or names with values", node)
            return None
        choices = []
        for name, child in named:
            if stage is not None and not isinstance(child.value, dict):
                child = Node({"kind": child}, child.place)
            choices.append(Choice(name, child))
        choices = self._name_choices(key, stage, parts, choices)
        return Axis(label, stage, parts, tuple(choices), node.place) if choices else None

    def _find_target(self, key: str, node: Node) -> tuple[str, str | None, tuple[str, ...]] | None:
        """(label, stage, path) that a key means."""
        parts = tuple(key.split("."))
        if not all(parts):
            return self._unknown(key, node)
        if parts[0] != "stages" and is_setting(parts[0]):
            if parts[0] in _FIXED or parts[0] in ("kind", "init_from", "of", "judge"):
                what = "belongs to the whole grid" if parts[0] in _FIXED else "belongs to a stage"
                self._problem(key, what, f"write STAGE.{key}" if parts[0] not in _FIXED else "set it at the top", node)
                return None
            return key, None, parts
        inner = parts[1:] if parts[0] == "stages" else parts
        at = find_stage(inner[0], self.stages, self.kinds, self.written) if inner else ""
        if not isinstance(at, int):
            return self._unknown(key, node, str(at) if parts[0] == "stages" else "")
        stage = self.stages[at]
        if len(inner) == 1:
            return stage, stage, ()
        if inner[1] in ("name",) or not (is_setting(inner[1]) and inner[1] not in _FIXED):
            near = describe_suggestions(suggest(inner[1], sorted(all_setting_names())))
            self._problem(key, f"there is no setting {inner[1]!r}", near or "see docs/settings.md", node)
            return None
        return ".".join((stage, *inner[1:])), None, ("stages", stage, *inner[1:])

    def _unknown(self, key: str, node: Node, hint: str = "") -> None:
        head, *rest = key.split(".")
        near = suggest(head, [*self.stages, *RECIPE_KEYS, *all_setting_names(), *_RESERVED], 2)
        near = [".".join((word, *rest)) for word in near if word not in _FIXED]
        choices = f"write a setting, STAGE or STAGE.setting; the stages are {', '.join(self.stages)}"
        if head in kind_names():
            near = []
            choices = f"this recipe has no stage of kind {head}; its stages are {', '.join(self.stages)}"
        self._problem(key, "there is no such setting or stage", hint or describe_suggestions(near) or choices, node)

    def _name_choices(self, key: str, stage: str | None, parts: tuple[str, ...], choices: list[Choice]) -> list[Choice]:
        names = [c.name or _name_value(stage, parts, c.node) for c in choices]
        if stage is not None and len({n.lower() for n in names}) < len(names):
            names = [c.name or _name_settings(c.node) for c in choices]
        if parts == (MODEL,) and len({n.lower() for n in names}) < len(names):
            names = [c.name or _FORBIDDEN.sub("-", str(c.node.value)).strip("-.") for c in choices]
        for name, choice in zip(names, choices, strict=True):
            if not _NAME.fullmatch(name) or name in (".", ".."):
                shown = format_value(choice.name or choice.node.plain())
                remedy = "write a mapping: name: value, the name up to 48 letters, digits, . + = @ % , - _"
                self._problem(key, f"{shown} gives no good name for a folder", remedy, choice.node)
                return []
        seen: dict[str, str] = {}
        for name in names:
            if name.lower() in seen:
                remedy = "leave one out, or write a mapping that gives each its own name"
                self._problem(key, f"the value {name!r} is there twice", remedy, choices[0].node)
                return []
            seen[name.lower()] = name
        return [replace(c, name=n) for c, n in zip(choices, names, strict=True)]

    def read_limit(self, tree: Node) -> int:
        """How many cells are allowed."""
        node = tree.value.get("max_cells")
        if node is None:
            return MAX_CELLS
        if isinstance(node.value, int) and not isinstance(node.value, bool) and node.value > 0:
            return node.value
        self._problem("max_cells", f"is {format_value(node.plain())}", "write a number of cells, e.g. 500", node)
        return MAX_CELLS

    def read_exclude(self, tree: Node, axes: Sequence[Axis]) -> list[dict[str, set[str]]]:
        """What is left out: of each entry axis label → names of choices."""
        node = tree.value.get("exclude")
        if node is None or node.value == []:
            return []
        out = []
        for item in node.value if isinstance(node.value, list) else [node]:
            if not isinstance(item.value, dict) or not item.value:
                self._problem("exclude", f"is {format_value(item.plain())}", "write e.g. [{model: a, seed: 3}]", item)
                continue
            entry = {}
            for key, child in item.value.items():
                axis = self._find_axis("exclude", key, axes, child)
                if axis is None:
                    continue
                values = child.value if isinstance(child.value, list) else [child]
                entry[axis.label] = {self._find_choice("exclude", axis, value) for value in values}
            out.append(entry)
        return out

    def read_baseline(self, tree: Node, axes: Sequence[Axis]) -> dict[str, str]:
        """The baseline; without one the first value of the first axis that is neither model nor seed, else the model."""
        node = tree.value.get("baseline")
        if node is None:
            varied = [a for a in axes if len(a.choices) > 1 and not a.is_seed]
            chosen = next((a for a in varied if a.label != MODEL), varied[0] if varied else None)
            return {} if chosen is None else {chosen.label: chosen.choices[0].name}
        if isinstance(node.value, dict):
            found = {}
            for key, child in node.value.items():
                axis = self._find_axis("baseline", key, axes, child)
                if axis is not None:
                    found[axis.label] = self._find_choice("baseline", axis, child)
            return found
        word = str(node.raw if node.raw is not None else node.value)
        hits = [(axis.label, c.name) for axis in axes if not axis.is_seed for c in axis.choices if c.name == word]
        if len(hits) == 1:
            return dict(hits)
        if not hits and word in (*self.stages, BASE):
            return {"": word}
        names = [c.name for axis in axes if not axis.is_seed for c in axis.choices]
        if hits:
            message, remedy = f"{word!r} is a value of several axes", f"write {{{hits[0][0]}: {word}}}"
        else:
            message = f"{word!r} is no value of the grid and no stage"
            near = describe_suggestions(suggest(word, [*names, *self.stages, BASE]))
            remedy = near or f"choose one of {', '.join([*names, *self.stages, BASE])}"
        self._problem("baseline", message, remedy, node)
        return {}

    def _find_axis(self, where: str, key: str, axes: Sequence[Axis], node: Node) -> Axis | None:
        for axis in axes:
            if key == axis.label or tuple(key.split(".")) == axis.parts:
                return axis
        labels = [axis.label for axis in axes]
        near = describe_suggestions(suggest(key, labels))
        self._problem(where, f"there is no axis {key!r}", near or f"the axes are {', '.join(labels)}", node)
        return None

    def _find_choice(self, where: str, axis: Axis, node: Node) -> str:
        plain = node.plain()
        for choice in axis.choices:
            if plain == choice.name or (plain == choice.node.plain() and type(plain) is type(choice.node.plain())):
                return choice.name
        names = [choice.name for choice in axis.choices]
        near = describe_suggestions(suggest(str(plain), names))
        message = f"{axis.label} has no value {format_value(plain)}"
        self._problem(where, message, near or f"its values are {', '.join(names)}", node)
        return ""

    def _problem(self, key: str, message: str, remedy: str, node: Node) -> None:
        self.problems.append(Problem(f"{GRID}.{key}".strip("."), message, remedy, str(node.place)))


def _name_value(stage: str | None, parts: tuple[str, ...], node: Node) -> str:
    """`seed=1`, `ipo`, `pocket-small`; "" where a value has no short name."""
    value = node.value
    if stage is not None:
        kind = value.get("kind")
        return str(kind.value) if kind is not None else _name_settings(node)
    if isinstance(value, dict):
        return ""
    if isinstance(value, list):
        return "+".join(_name_value(None, ("",), item).lstrip("=") for item in value)
    if isinstance(value, str):
        last = re.split(r"[/\\]", value.rstrip("/\\"))[-1]
        return _FORBIDDEN.sub("-", last).strip("-.")
    text = "none" if value is None else str(value).lower() if isinstance(value, bool) else node.raw or f"{value}"
    return f"{parts[-1]}={text}"


def _name_settings(node: Node) -> str:
    """`dpo,beta=0.2`: all that a form of a stage sets."""
    words = []
    for key, child in node.value.items():
        word = _name_value(None, (key,), child)
        words.append(word if key == "kind" or "=" in word else f"{key}={word}")
    return ",".join(words)


def combine(
    axes: Sequence[Axis], excluded: Sequence[Mapping[str, set[str]]], limit: int, problems: list[Problem], where: str
) -> Iterator[tuple[str, tuple[Choice, ...]]]:
    """(name, choices) of every cell, the last axis varying fastest; nothing when there are too many or none."""
    count = math.prod(len(axis.choices) for axis in axes)
    if count > limit:
        sizes = " × ".join(f"{len(axis.choices)} {axis.label}" for axis in axes)
        remedy = f"leave values out, or allow it with grid.max_cells={count}"
        problems.append(Problem(GRID, f"has {count:,} cells ({sizes}); at most {limit:,} are run", remedy, where))
        return
    kept, names = 0, set()
    for choices in itertools.product(*(axis.choices for axis in axes)):
        chosen = {axis.label: choice.name for axis, choice in zip(axes, choices, strict=True)}
        if any(entry and all(chosen[label] in out for label, out in entry.items()) for entry in excluded):
            continue
        name = "_".join(choice.name for choice in choices)
        kept += 1
        if len(name) > MAX_NAME:
            remedy = "give the values shorter names: write a mapping, name: value"
            problems.append(Problem(GRID, f"the cell {name!r} has a name of {len(name)} letters", remedy, where))
            return
        if name.lower() in names:
            remedy = "name the values with a mapping, so that no two cells are called the same"
            problems.append(Problem(GRID, f"two cells are called {name!r}", remedy, where))
            return
        names.add(name.lower())
        yield name, choices
    if not kept:
        problems.append(Problem(f"{GRID}.exclude", "leaves no cell", "exclude less", where))


def list_assignments(axes: Sequence[Axis], choices: Sequence[Choice]) -> list[Override]:
    """What a cell sets, as the words of a command line would; in a layer of its own."""
    out = []
    for axis, choice in zip(axes, choices, strict=True):
        node = _move(choice.node)
        if axis.stage is None:
            out.append(Override(f"{axis.label}={choice.name}", axis.parts, node))
            continue
        named = {"name": Node(axis.stage, node.place), **node.value}  # a stage keeps its name whatever its kind
        for key, child in named.items():
            parts = ("stages", axis.stage, *key.split("."))
            out.append(Override(f"{axis.stage}={choice.name}", parts, child))
    return out


def _move(node: Node) -> Node:
    """The same tree in the grid's layer."""
    place = Place(Layer.GRID, node.place.text)
    value: Any = node.value
    if isinstance(value, dict):
        value = {key: _move(child) for key, child in value.items()}
    elif isinstance(value, list):
        value = [_move(child) for child in value]
    return replace(node, value=value, place=place)


def find_equal(cells: Sequence[Cell]) -> tuple[str, str] | None:
    """Names of two cells that would do exactly the same; None if all differ."""
    seen: dict[str, str] = {}
    for cell in cells:
        text = repr(sorted(cell.recipe.resolved().items()))
        if text in seen:
            return seen[text], cell.name
        seen[text] = cell.name
    return None

"""From a recipe with a grid to its cells: each assembled and checked like a recipe of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from burnish.config.assembly import Assembly
from burnish.config.environment import EnvironmentValue
from burnish.config.grid import (
    GRID,
    MODEL,
    Axis,
    Cell,
    Grid,
    GridReader,
    combine,
    find_equal,
    list_assignments,
)
from burnish.config.overrides import Override, find_stage, is_setting, nest
from burnish.config.problems import Problem, format_value
from burnish.config.recipe import Recipe
from burnish.config.tree import Node, build_node, merge_nodes

Assemble = Callable[[list[Problem], list[str], Sequence[Override]], Assembly]
Build = Callable[[Assembly], Recipe | None]


def take_grid(
    root: Node, words: Sequence[Override], environment: Sequence[EnvironmentValue], problems: list[Problem]
) -> tuple[Node, Node | None, list[Override]]:
    """The recipe without its grid, the grid with the command line's changes (None if there is none), the other words.

    `grid.seed=[1,2]` sets an axis; where the grid names values, `grid.prefer.cpo={kind: cpo}` sets or adds one of them.
    """
    for value in environment:
        if value.stage is None and value.path[0] == GRID:
            place = str(value.node.place)
            problems.append(Problem(GRID, "cannot come from the environment", "write it in the recipe", place))
    tree = root.value.get(GRID)
    rest = Node({key: node for key, node in root.value.items() if key != GRID}, root.place)
    others = []
    for word in words:
        if word.parts[0] != GRID:
            others.append(word)
        elif len(word.parts) == 1:
            tree = word.node
        else:
            tree = _change(tree if tree is not None else Node({}, word.node.place), word)
    if tree is not None and tree.value is not None and not isinstance(tree.value, dict):
        message = f"is {format_value(tree.plain())}, not a mapping"
        problems.append(Problem(GRID, message, "write e.g. {seed: [1, 2, 3]}", str(tree.place)))
    given = tree is not None and bool(tree.value)
    return rest, tree if given else None, others


def _change(tree: Node, word: Override) -> Node:
    if not isinstance(tree.value, dict):
        return tree
    path, node = word.parts[1:], word.node
    for cut in range(len(path) - 1, 0, -1):
        axis = tree.value.get(".".join(path[:cut]))
        if axis is None or not isinstance(axis.value, dict):
            continue
        if path[cut] in axis.value or not is_setting(path[cut]):
            changed = merge_nodes(axis, nest(path[cut:], node))
            return Node({**tree.value, ".".join(path[:cut]): changed}, tree.place)
    return Node({**tree.value, ".".join(path): node}, tree.place)


def build_grid(
    tree: Node,
    assemble: Assemble,
    build: Build,
    words: Sequence[Override],
    problems: list[Problem],
    notes: list[str],
    origin: str,
) -> tuple[Recipe | None, Grid | None, Mapping[str, str]]:
    """The recipe (the first cell's, with the grid's keys), the grid, and the sources of the recipe's values.

    Args:
        tree: What stands below `grid:`.
        assemble: Makes an assembly with the assignments of a cell.
        build: Makes it a recipe.
        words: The command line's other words.
    """
    found: list[Problem] = []
    probe = assemble(found, [], ())
    if not probe.drafts:
        problems.extend(found)
        return None, None, {}
    names = [draft.name for draft in probe.drafts]
    reader = GridReader(names, [d.kind or "" for d in probe.drafts], [d.label for d in probe.drafts], problems)
    models = _find_models(probe)
    axes = reader.read_axes(tree, models)
    excluded, baseline = reader.read_exclude(tree, axes), reader.read_baseline(tree, axes)
    limit = reader.read_limit(tree)
    _check_words(words, axes, probe, problems)
    if problems:
        return None, None, {}
    cells: list[Cell] = []
    wrong: dict[Problem, list[str]] = {}
    tried = 0
    for name, choices in combine(axes, excluded, limit, problems, str(tree.place)):
        own: list[Problem] = []
        assembly = assemble(own, notes, list_assignments(axes, choices))
        recipe = build(assembly)
        tried += 1
        for problem in own:
            wrong.setdefault(problem, []).append(name)
        if recipe is not None and not own:
            values = {axis.label: choice.name for axis, choice in zip(axes, choices, strict=True)}
            cells.append(Cell(name, values, recipe, assembly.sources, assembly.describe_files()))
    problems.extend(_say_where(problem, where, tried) for problem, where in wrong.items())
    equal = None if problems else find_equal(cells)
    if equal is not None:
        message = f"the cells {equal[0]} and {equal[1]} are the same run: all their settings come out equal"
        remedy = "leave one value out, or what makes them equal (a setting of the command line wins over the grid)"
        problems.append(Problem(GRID, message, remedy, str(tree.place)))
    if problems or not cells:
        return None, None, {}
    first = cells[0]
    update = {"grid": tree.plain()}
    if models is not None:
        update |= {"models": models.plain(), "model": None}
    return first.recipe.model_copy(update=update), Grid(axes, baseline, tuple(cells)), first.sources


def _find_models(probe: Assembly) -> Node | None:
    """`models:` as the strongest layer gives it, if no stronger one gives `model`."""
    for layer in sorted(probe.top, reverse=True):
        nodes = probe.top[layer]
        if (node := nodes.get("models")) is not None and node.value not in (None, []):
            if isinstance(node.value, str):  # a,b on the command line
                node = build_node([word.strip() for word in node.value.split(",")], node.place)
            return node
        if (node := nodes.get(MODEL)) is not None and node.value is not None:
            return None
    return None


def _check_words(words: Sequence[Override], axes: Sequence[Axis], probe: Assembly, problems: list[Problem]) -> None:
    """Words of the command line that would give an axis one value."""
    names = [draft.name for draft in probe.drafts]
    kinds, written = [d.kind or "" for d in probe.drafts], [d.label for d in probe.drafts]
    targets = {axis.parts: axis for axis in axes if axis.stage is None}
    for word in words:
        parts = word.parts
        if not (is_setting(parts[0]) and parts[0] != "stages"):
            inner = parts[1:] if parts[0] == "stages" else parts
            at = find_stage(inner[0], names, kinds, written) if inner else ""
            parts = ("stages", names[at], *inner[1:]) if isinstance(at, int) else parts
        axis = targets.get(parts)
        if axis is not None and not (axis.label == MODEL and axis.parts == (MODEL,) and parts != (MODEL,)):
            remedy = f"change the axis instead: {GRID}.{axis.label}=[…]"
            message = f"is an axis of the grid, and one value for it would make its cells equal (in {word.text!r})"
            problems.append(Problem(axis.label, message, remedy, str(word.node.place)))


def _say_where(problem: Problem, where: Sequence[str], tried: int) -> Problem:
    """A problem with the cells that have it, unless all do."""
    if len(where) == tried:
        return problem
    more = f" and {len(where) - 2} more" if len(where) > 2 else ""
    message = f"{problem.message} (in cell {', '.join(where[:2])}{more})"
    return Problem(problem.key, message, problem.remedy, problem.where)

"""Stages on the way from the file to settings: their kind, their name, and what each layer says about them."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from burnish.config.keys import RECIPE_KEYS, all_setting_names, kind_names, settings_class
from burnish.config.problems import Problem, format_value
from burnish.config.registry import ALIASES, KINDS, is_own_kind, load_own_spec
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Layer, Node, Place, merge_nodes
from burnish.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,59}")


@dataclass(slots=True)
class Draft:
    """A stage as it stands in the recipe.

    Args:
        index: Position, from 0.
        layers: What each layer says about this very stage, under canonical names.
        place: Where it begins.
        kind: Canonical kind; None if it has none that exists.
        label: Kind as written (`ipo`).
        fixed: Settings that an alias of a kind fixes.
        requires: Settings that it needs.
        name: Name, given or made.
        named: Whether the recipe gives the name.
    """

    index: int
    layers: dict[Layer, dict[str, Node]]
    place: Place
    kind: str | None = None
    label: str = ""
    fixed: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()
    name: str = ""
    named: bool = False

    def own(self, key: str) -> Node | None:
        """What this stage itself says of a key, the highest layer first."""
        for layer in sorted(self.layers, reverse=True):
            if key in self.layers[layer]:
                return self.layers[layer][key]
        return None

    def add(self, layer: Layer, nodes: dict[str, Node]) -> None:
        """More settings of a layer, over those that are there."""
        target = self.layers.setdefault(layer, {})
        for key, node in nodes.items():
            target[key] = merge_nodes(target.get(key), node)

    @property
    def path(self) -> str:
        """Where the stage is, as keys name it."""
        return f"stages.{self.name or self.index}"


def identify(drafts: list[Draft], problems: list[Problem]) -> None:
    """Sets kind and name of each draft. Stages without a name get their kind, then kind-2, kind-3, …"""
    for draft in drafts:
        _read_kind(draft, problems)
    taken: dict[str, Draft] = {}
    for draft in drafts:
        node = draft.own("name")
        draft.name, draft.named = "", False
        if node is None or node.value is None:
            continue
        name = node.raw if node.raw is not None else node.value
        problem = _check_name(name, taken)
        if problem:
            problems.append(Problem(f"stages.{draft.index}.name", problem[0], problem[1], str(node.place)))
            continue
        draft.name, draft.named = str(name), True
        taken[str(name)] = draft
    for draft in drafts:
        if draft.name:
            continue
        base = draft.label or f"stage-{draft.index + 1}"
        number, name = 1, base
        while name in taken:
            number += 1
            name = f"{base}-{number}"
        draft.name = name
        taken[name] = draft


def _read_kind(draft: Draft, problems: list[Problem]) -> None:
    node = draft.own("kind")
    path = f"stages.{draft.index}.kind"
    draft.kind, draft.label, draft.fixed, draft.requires = None, "", {}, ()
    if node is None or node.value is None:
        problems.append(
            Problem(path, "the stage has no kind", f"add kind: one of {', '.join(kind_names())}", str(draft.place))
        )
        return
    word = str(node.value)
    if word in KINDS:
        draft.kind, draft.label = word, word
    elif is_own_kind(word):
        try:
            draft.kind, draft.label = word, load_own_spec(word).name
            settings_class(word)
        except ConfigError as error:
            draft.kind = None
            problems.append(Problem(path, error.message, error.remedy, str(node.place)))
    elif word in ALIASES:
        alias = ALIASES[word]
        draft.kind, draft.label = alias.kind, word
        draft.fixed, draft.requires = dict(alias.fixed), alias.requires
    else:
        near = describe_suggestions(suggest(word, kind_names()))
        allowed = f"the kinds are {', '.join(kind_names())}"
        problems.append(
            Problem(
                path,
                f"there is no kind {format_value(node.value)}",
                f"{near} ({allowed})" if near else allowed,
                str(node.place),
            )
        )


def _check_name(name: Any, taken: dict[str, Draft]) -> tuple[str, str] | None:
    text = f"is {format_value(name)}"
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        return f"{text}, which cannot name a folder", "use letters, digits, - and _, at most 60, e.g. dpo-low-beta"
    if name.isdigit():
        return f"{text}, which reads like a position", "begin the name with a letter"
    if name in ("base", "stages") or name in RECIPE_KEYS or name in all_setting_names():
        return f"{text}, which means something else in a recipe", f"call it {name}-stage or the like"
    if name in taken:
        return f"{text}, but stage {taken[name].index} has this name", "give each stage its own name"
    return None

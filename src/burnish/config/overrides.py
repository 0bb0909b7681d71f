"""`key=value` words of a command line.

`stages.dpo.beta=0.05` and `stages.0.beta=0.05` name a stage by its name or position (from 0); `dpo.beta=0.05` does so
where one stage answers to `dpo`, by its name or its kind. A key without a stage (`seed=3`, `lora.r=8`) holds for the
recipe and for every stage that has the setting, also where the file sets it in the stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.config.aliases import KEY_ALIASES
from burnish.config.keys import BIT_FLAGS, RECIPE_KEYS, all_setting_names, kind_names
from burnish.config.problems import Problem
from burnish.config.secrets import check_word
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Layer, Node, Place, parse_word

COMMAND = Place(Layer.COMMAND, "command line")


@dataclass(frozen=True, slots=True)
class Override:
    """One word: the path as it was written, in parts, and the value."""

    text: str
    parts: tuple[str, ...]
    node: Node


def parse_overrides(words: Sequence[str], problems: list[Problem]) -> list[Override]:
    """The words as overrides; those that are none become problems."""
    result = []
    for word in words:
        key, separator, value = word.partition("=")
        key = key.strip().removeprefix("--")
        secrets = check_word(key, word, str(COMMAND))
        if secrets:
            problems.extend(secrets)
        elif not separator or not key or not all(key.split(".")):
            problems.append(
                Problem(
                    word or "''",
                    "is not of the form key=value",
                    "write e.g. seed=3 or stages.dpo.beta=0.05",
                    str(COMMAND),
                )
            )
        else:
            result.append(Override(word, tuple(key.split(".")), parse_word(value, COMMAND)))
    return result


def nest(parts: Sequence[str], leaf: Node) -> Node:
    """A tree of partial mappings with the leaf at the end of the path."""
    for part in reversed(parts):
        leaf = Node({part: leaf}, leaf.place, partial=True)
    return leaf


def is_setting(word: str) -> bool:
    """Whether a word is a key of the recipe or a setting of some kind, under any of its names."""
    name = word.replace("-", "_")
    return (
        name in RECIPE_KEYS
        or name in all_setting_names()
        or name in KEY_ALIASES
        or name in ("bf16", "fp16", *BIT_FLAGS)
    )


def find_stage(word: str, names: Sequence[str], kinds: Sequence[str], written: Sequence[str]) -> int | str:
    """Position of the stage that a word means, or what is wrong with it.

    Args:
        word: Name, kind or position.
        names: Names of the stages.
        kinds: Canonical kind of each.
        written: Kind of each as the recipe writes it (`ipo`).
    """
    if word in names:
        return list(names).index(word)
    if word.isdigit():
        if int(word) < len(names):
            return int(word)
        return f"there are {len(names)} stages; positions are 0 to {len(names) - 1}"
    for column in (written, kinds):
        hits = [i for i, kind in enumerate(column) if kind == word]
        if len(hits) == 1:
            return hits[0]
        if hits:
            return f"several stages are of kind {word}: use one of the names {', '.join(names[i] for i in hits)}"
    near = suggest(word, [*names, *(k for k in kinds if k)])
    return describe_suggestions(near) or f"the stages are {', '.join(names)}"


def unknown_path(override: Override, names: Sequence[str]) -> Problem:
    """The problem of an override whose first word is neither a setting nor a stage."""
    head = override.parts[0]
    near = suggest(head, [*RECIPE_KEYS, *all_setting_names(), *names, *KEY_ALIASES, "stages"], 6)
    targets = list(
        dict.fromkeys(w if w in all_setting_names() or w in RECIPE_KEYS else KEY_ALIASES.get(w, w) for w in near)
    )
    if head in kind_names():
        remedy = f"this recipe has no stage of kind {head}; its stages are {', '.join(names)}"
    else:
        remedy = (
            describe_suggestions(targets[:2]) or f"write a setting, or STAGE.setting; the stages are {', '.join(names)}"
        )
    return Problem(
        ".".join(override.parts), f"there is no setting or stage {head!r} (in {override.text!r})", remedy, str(COMMAND)
    )

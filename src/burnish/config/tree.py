"""Values that know where they were written: YAML and JSON text, dictionaries and command-line words as one tree."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import yaml

from burnish.errors import ConfigError

MAX_NODES = 100_000


class Layer(IntEnum):
    """Where values come from; a higher layer wins."""

    DEFAULT = 0
    DOTENV = 1
    ENVIRONMENT = 2
    CHECKPOINT = 3
    FILE = 4
    GRID = 5
    COMMAND = 6


@dataclass(frozen=True, slots=True)
class Place:
    """A layer and how a person finds the place: "recipe.yaml:12", "command line", "environment (BURNISH__SEED)"."""

    layer: Layer
    text: str

    def __str__(self) -> str:
        return self.text


@dataclass(slots=True)
class Node:
    """A value and its place.

    Args:
        value: A scalar, a list of nodes or a dictionary of nodes.
        place: Where the value was written.
        raw: The text of an unquoted scalar (`revision: 001` stays what was written), or of a word in brackets.
        key: The key as it was written, where it differs from the canonical one.
        partial: A dictionary that changes parts of a value (`lora.r=8`) and leaves the rest.
    """

    value: Any
    place: Place
    raw: str | None = None
    key: str | None = None
    partial: bool = False

    def plain(self) -> Any:
        """The value without places."""
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        if isinstance(self.value, list):
            return [node.plain() for node in self.value]
        return self.value

    def walk(self, path: str = "") -> Iterator[tuple[str, Node]]:
        """This node and all below, with their paths."""
        yield path, self
        items = self.value.items() if isinstance(self.value, dict) else ()
        if isinstance(self.value, list):
            items = ((str(i), node) for i, node in enumerate(self.value))
        for key, node in items:
            yield from node.walk(f"{path}.{key}" if path else str(key))


def build_node(data: Any, place: Place) -> Node:
    """A tree from Python values, all at one place."""
    if isinstance(data, Mapping):
        return Node({str(key): build_node(value, place) for key, value in data.items()}, place)
    if isinstance(data, list | tuple):
        return Node([build_node(value, place) for value in data], place)
    return Node(data, place)


def merge_nodes(base: Node | None, new: Node, *, deep: bool = False) -> Node:
    """`new` over `base`. Dictionaries are merged key by key if `new` is partial or `deep` is on."""
    if base is None or not isinstance(new.value, dict) or not (new.partial or deep):
        return new
    if isinstance(base.value, list) and new.partial:
        return _edit_list(base, new)
    if isinstance(base.value, str) and new.partial:
        base = Node({"source": base}, base.place)
    if not isinstance(base.value, dict):
        return Node(new.value, new.place, partial=False)
    merged = dict(base.value)
    for key, node in new.value.items():
        merged[key] = merge_nodes(merged.get(key), node, deep=deep)
    return Node(merged, new.place)


def _edit_list(base: Node, new: Node) -> Node:
    items = list(base.value)
    for key, node in new.value.items():
        if not key.isdigit() or int(key) >= len(items):
            raise ConfigError(
                f"there is no item {key!r} in a list of {len(items)}",
                where=str(node.place),
                found=key,
                remedy=f"use a position from 0 to {len(items) - 1}, or write the whole list",
            )
        items[int(key)] = merge_nodes(items[int(key)], node)
    return Node(items, base.place)


_NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9][0-9_]*")
_BASED_INT = re.compile(r"[-+]?0(x[0-9a-fA-F]+|o[0-7]+)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL_FLOAT = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


def read_scalar(text: str) -> Any:
    """The value of an unquoted word, by the core schema of YAML 1.2.

    So `1e-5` is a number, `1_000` is 1000, and `on`, `off`, `yes`, `no`, dates and `1:30` stay text; a setting that is
    true or false reads `on`, `off`, `yes` and `no` itself.
    """
    text = text.strip()
    if _NULL.fullmatch(text):
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.fullmatch(text):
        return int(text.replace("_", ""))
    if _BASED_INT.fullmatch(text):
        return int(text, 0)
    if _FLOAT.fullmatch(text):
        return float(text.replace("_", ""))
    if _SPECIAL_FLOAT.fullmatch(text):
        return float(text.replace(".", ""))
    return text


def parse_word(text: str, place: Place) -> Node:
    """The value of `key=value` on a command line or in the environment: a scalar, or a list or mapping in brackets."""
    stripped = text.strip()
    if stripped[:1] in ("[", "{", '"', "'"):
        try:
            node = _Composer(place.text, lambda _: place).compose(stripped)
        except ConfigError:
            return Node(text, place, raw=text)
        if node is not None:
            node.raw = stripped if isinstance(node.value, dict | list) else None
            return node
    return Node(read_scalar(stripped), place, raw=stripped)


def parse_text(text: str, origin: str) -> Node | None:
    """A recipe's text as a tree with line numbers; None if it is empty.

    Raises:
        ConfigError: The text is not YAML, holds a key twice, or is built to explode.
    """
    if text.lstrip("\ufeff \r\n\t")[:1] == "{":
        text = text.replace("\t", " ")  # JSON may be indented with tabs; inside its strings they are escaped
    return _Composer(origin, lambda line: Place(Layer.FILE, f"{origin}:{line}")).compose(text)


class _Composer:
    """Turns YAML's nodes into ours."""

    def __init__(self, origin: str, place_of: Any) -> None:
        self.origin, self.place_of, self.count = origin, place_of, 0

    def compose(self, text: str) -> Node | None:
        try:
            root = yaml.compose(text, Loader=yaml.BaseLoader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f":{mark.line + 1}" if mark else ""
            column = f" (column {mark.column + 1})" if mark else ""
            remedy = (
                "indent with spaces" if "'\\t'" in str(error) else "check indentation, colons and quotes near there"
            )
            raise ConfigError(
                f"this is not valid YAML: {error.problem or error.context}{column}",
                where=f"{self.origin}{line}",
                remedy=remedy,
            ) from None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(
                f"this is not valid YAML: {type(error).__name__}: {str(error).splitlines()[0]}",
                where=self.origin,
                remedy="save the file as plain UTF-8 text",
            ) from None
        return None if root is None else self.convert(root, ())

    def convert(self, node: Any, above: tuple[int, ...]) -> Node:
        place = self.place_of(node.start_mark.line + 1)
        self.count += 1
        if self.count > MAX_NODES or id(node) in above or len(above) > 50:
            raise self.error(place, "anchors make this text endless or enormous", "write the values out")
        if not node.tag.startswith("tag:yaml.org,2002:") or node.tag.rpartition(":")[2] not in ("str", "map", "seq"):
            raise self.error(place, f"the tag {node.tag!r} is not supported", "leave the tag out")
        above = (*above, id(node))
        if isinstance(node, yaml.MappingNode):
            return Node(self.convert_mapping(node, above), place)
        if isinstance(node, yaml.SequenceNode):
            return Node([self.convert(item, above) for item in node.value], place)
        if node.style is None:
            return Node(read_scalar(node.value), place, raw=node.value)
        return Node(_join_surrogates(node.value), place)

    def convert_mapping(self, node: Any, above: tuple[int, ...]) -> dict[str, Node]:
        result: dict[str, Node] = {}
        lines: dict[str, int] = {}
        merged: dict[str, Node] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise self.error(self.place_of(line), "a key must be a word", "quote it, or check for a stray bracket")
            key = _join_surrogates(key_node.value)
            value = self.convert(value_node, above)
            if key == "<<":
                for part in value.value if isinstance(value.value, list) else [value]:
                    merged = {**(part.value if isinstance(part.value, dict) else {}), **merged}
                continue
            if key in result:
                raise self.error(
                    self.place_of(line), f"the key {key!r} is given twice (first in line {lines[key]})", "remove one"
                )
            if not isinstance(value.value, dict | list):
                value.place = self.place_of(line) if value.value is None else value.place
            result[key], lines[key] = value, line
        return {**merged, **result}

    def error(self, place: Place, message: str, remedy: str) -> ConfigError:
        return ConfigError(message, where=str(place), remedy=remedy)


def _join_surrogates(text: str) -> str:
    """JSON writes characters outside the basic plane as two escapes; YAML would keep them apart."""
    if not any("\ud800" <= char <= "\udfff" for char in text):
        return text
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")

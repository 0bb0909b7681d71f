"""Reads written values as the types of settings, with messages that name what is allowed."""

from __future__ import annotations

import math
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import annotated_types
from pydantic import ValidationError
from pydantic.fields import FieldInfo

from burnish.config.aliases import FOREIGN_KEYS, KEY_ALIASES, NESTED_ALIASES, VALUE_ALIASES
from burnish.config.base import Settings
from burnish.config.problems import Problem, format_value
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Layer, Node, read_scalar

YES = {"true", "yes", "on", "y"}
NO = {"false", "no", "off", "n"}


class Unreadable(Exception):
    """A value that is not what the setting takes.

    Args:
        message: What is wrong, without the place.
        remedy: What to do.
    """

    def __init__(self, message: str, remedy: str) -> None:
        super().__init__(message)
        self.message, self.remedy = message, remedy


class SettingsReader:
    """Reads the fields of a settings class from a tree and collects problems and sources.

    Args:
        path: Where the settings stand in the recipe ("stages.dpo").
        problems: Problems are appended here.
        sources: Place of each value that was given, by path, is added here.
    """

    def __init__(self, path: str, problems: list[Problem], sources: dict[str, str]) -> None:
        self.path, self.problems, self.sources = path, problems, sources

    def read_fields(self, cls: type[Settings], nodes: dict[str, Node]) -> dict[str, Any]:
        """The values of those fields that are given and right. Unknown keys are the caller's business."""
        values = {}
        for name, node in nodes.items():
            path = f"{self.path}.{name}" if self.path else name
            field = cls.model_fields[name]
            try:
                values[name] = self.read_field(name, field, node, path)
            except Unreadable as error:
                self.problems.append(Problem(path, error.message, error.remedy, str(node.place)))
        return values

    def read_field(self, name: str, field: FieldInfo, node: Node, path: str) -> Any:
        """One value, within its limits."""
        node = _replace_alias(name, node)
        value = self.read(node, field.annotation, path, field)
        _check_limits(value, field)
        if not isinstance(node.value, dict) or not isinstance(value, Settings):
            self.sources[path] = _describe_place(node)
        return value

    def read(self, node: Node, annotation: Any, path: str, field: FieldInfo | None = None) -> Any:
        """A value of the annotated type.

        Raises:
            Unreadable: It is something else.
        """
        origin = get_origin(annotation)
        if origin in (Union, types.UnionType):
            return self._read_union(node, get_args(annotation), path, field)
        if origin is Literal:
            return _read_literal(node, get_args(annotation))
        if origin is list:
            return self._read_list(node, get_args(annotation)[0], path)
        if origin is dict:
            return self._read_dict(node, get_args(annotation), path)
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            return self._read_settings(node, annotation, path)
        reader = _SCALARS.get(annotation)
        if reader is None:
            return node.plain()
        return reader(node, field)

    def _read_union(self, node: Node, members: tuple[Any, ...], path: str, field: FieldInfo | None) -> Any:
        value = node.value
        if value is None and type(None) in members:
            return None
        members = tuple(member for member in members if member is not type(None))
        classes = [m for m in members if isinstance(m, type) and issubclass(m, Settings)]
        lists = [m for m in members if get_origin(m) is list]
        mappings = [m for m in members if get_origin(m) is dict]
        scalars = [m for m in members if m not in classes and m not in lists and m not in mappings]
        if isinstance(value, dict | list) and str in scalars and node.raw and not (lists or classes or mappings):
            return node.raw
        if isinstance(value, dict):
            choice = classes or mappings
        elif isinstance(value, list) or (lists and _is_comma_list(node)):
            choice = lists
        elif isinstance(value, bool) and classes and bool not in scalars:
            return self._read_switch(node, classes[0], path, type(None) in members or len(members) == len(classes))
        else:
            return self._read_scalar_of(node, scalars, lists, path, field)
        if not choice:
            raise Unreadable(f"is {_name_shape(value)}", f"write {describe_type(members, field)}")
        return self.read(node, choice[0], path, field)

    def _read_switch(self, node: Node, cls: type[Settings], path: str, optional: bool) -> Any:
        if node.value is True:
            return self._read_settings(Node({}, node.place), cls, path)
        if optional:
            self.sources[path] = _describe_place(node)
            return None
        raise Unreadable("is false", f"write the settings of {path.rpartition('.')[2]}, or leave it out")

    def _read_scalar_of(
        self, node: Node, scalars: list[Any], lists: list[Any], path: str, field: FieldInfo | None
    ) -> Any:
        literals = [word for member in scalars if get_origin(member) is Literal for word in get_args(member)]
        failures = []
        for member in sorted(scalars, key=lambda member: member is not type(node.value)):
            try:
                return self.read(node, member, path, field)
            except Unreadable as error:
                failures.append(error)
        if lists and node.value is not None:
            near = suggest(str(node.value), map(str, literals), 1)
            if not near:
                return self._read_list(Node([node], node.place), get_args(lists[0])[0], path)
        if len(failures) == 1 and not lists:
            raise failures[0]
        message = "has no value" if node.value is None else f"is {format_value(node.value)}"
        remedy = f"write {describe_type((*scalars, *lists), field)}"
        near = suggest(str(node.value), map(str, literals))
        raise Unreadable(message, f"{remedy}; {describe_suggestions(near)}" if near else remedy)

    def _read_list(self, node: Node, item: Any, path: str) -> list[Any]:
        if node.value is None:
            raise Unreadable("has no value", "write a list, e.g. [] for none")
        if isinstance(node.value, list):
            nodes = node.value
        elif _is_comma_list(node):
            words = [word.strip() for word in str(node.raw).split(",") if word.strip()]
            nodes = [Node(read_scalar(word), node.place, raw=word) for word in words]
        elif isinstance(node.value, str) and node.value.lower() == "none":
            nodes = []
        else:
            nodes = [node]
        result = []
        for i, child in enumerate(nodes):
            try:
                result.append(self.read(child, item, f"{path}.{i}"))
            except Unreadable as error:
                raise Unreadable(
                    f"item {i}: {error.message}" if len(nodes) > 1 else error.message, error.remedy
                ) from None
        return result

    def _read_dict(self, node: Node, types_: tuple[Any, Any], path: str) -> dict[str, Any]:
        if not isinstance(node.value, dict):
            raise Unreadable(f"is {_name_shape(node.value)}", "write a mapping, e.g. {name: value}")
        return {key: self.read(child, types_[1], f"{path}.{key}") for key, child in node.value.items()}

    def _read_settings(self, node: Node, cls: type[Settings], path: str) -> Settings:
        if not isinstance(node.value, dict):
            raise Unreadable(f"is {_name_shape(node.value)}", f"write a mapping of {', '.join(cls.model_fields)}")
        aliases = NESTED_ALIASES.get(cls.__name__, {})
        children: dict[str, Node] = {}
        for key, child in node.value.items():
            name = aliases.get(key.replace("-", "_"), key.replace("-", "_"))
            if name in children:
                self.problems.append(
                    Problem(f"{path}.{name}", f"is given twice (also as {key!r})", "remove one", str(child.place))
                )
            elif name not in cls.model_fields:
                self.problems.append(unknown_key(path, key, child, cls.model_fields, aliases))
            else:
                children[name] = child
        before = len(self.problems)
        values = SettingsReader(path, self.problems, self.sources).read_fields(cls, children)
        required = [name for name, field in cls.model_fields.items() if field.is_required() and name not in values]
        if required and len(self.problems) == before:
            description = cls.model_fields[required[0]].description
            raise Unreadable(f"has no {required[0]!r}", f"add {required[0]}: {description}")
        values.update(dict.fromkeys(required, ""))  # what is wrong has been said; go on and find the rest
        if not children:
            self.sources[path] = _describe_place(node)
        return build_settings(cls, values, path, str(node.place), self.problems)


def build_settings(
    cls: type[Settings], values: dict[str, Any], path: str, where: str, problems: list[Problem]
) -> Settings:
    """The settings object; whatever pydantic still refuses becomes a problem and falls back to its default."""
    while True:
        try:
            return cls(**values)
        except ValidationError as error:
            names = set()
            for item in error.errors():
                names.add(item["loc"][0] if item["loc"] else "")
                location = ".".join(map(str, item["loc"]))
                problems.append(
                    Problem(f"{path}.{location}".strip("."), item["msg"], "see `burnish config example`", where)
                )
            if not names & values.keys():
                raise
            values = {name: value for name, value in values.items() if name not in names}


def unknown_key(
    path: str,
    key: str,
    node: Node,
    known: Any,
    aliases: dict[str, str] | None = None,
    elsewhere: str = "",
) -> Problem:
    """The problem of a key that nothing reads, with the nearest that something does."""
    aliases = KEY_ALIASES if aliases is None else aliases
    full = f"{path}.{key}" if path else key
    foreign = FOREIGN_KEYS.get(key.replace("-", "_"))
    near: list[str] = []
    for word in suggest(key, [*known, *(alias for alias, target in aliases.items() if _leads_to(target, known))], 6):
        target = word if word in known else aliases[word]
        if target not in near:
            near.append(target)
    value = f" (value {format_value(node.plain())})"
    remedy = foreign or elsewhere or describe_suggestions(near[:2]) or f"known here: {', '.join(sorted(known))}"
    return Problem(full, f"there is no setting {key!r}{value}", remedy, str(node.place))


def _leads_to(target: str, known: Any) -> bool:
    return target.partition(".")[0] in known


def describe_type(annotation: Any, field: FieldInfo | None = None) -> str:
    """What a setting takes, in words: "a whole number ≥ 1 or auto"."""
    if isinstance(annotation, tuple):
        return " or ".join(
            dict.fromkeys(describe_type(member, field) for member in annotation if member is not type(None))
        )
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        text = describe_type(get_args(annotation), field)
        return f"{text} or null" if type(None) in get_args(annotation) else text
    if origin is Literal:
        words = [str(word) for word in get_args(annotation)]
        return words[0] if len(words) == 1 else f"one of {', '.join(words)}"
    if origin is list:
        return f"a list of {describe_type(get_args(annotation)[0])}"
    if origin is dict:
        return "a mapping {name: value}"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        required = [name for name, info in annotation.model_fields.items() if info.is_required()]
        return f"a mapping ({', '.join(required or list(annotation.model_fields)[:3])}, …)"
    name = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(annotation, "a value")
    limits = describe_limits(field) if field is not None and annotation in (int, float) else ""
    return f"{name} {limits}".strip()


_SIGNS = {
    annotated_types.Ge: ("ge", "≥"),
    annotated_types.Gt: ("gt", ">"),
    annotated_types.Le: ("le", "≤"),
    annotated_types.Lt: ("lt", "<"),
}


def describe_limits(field: FieldInfo) -> str:
    """ "> 0 and < 0.5", or an empty text."""
    parts = [f"{_SIGNS[type(m)][1]} {getattr(m, _SIGNS[type(m)][0])}" for m in field.metadata if type(m) in _SIGNS]
    return " and ".join(parts)


def _check_limits(value: Any, field: FieldInfo) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    for limit in field.metadata:
        if type(limit) not in _SIGNS:
            continue
        name, _ = _SIGNS[type(limit)]
        bound = getattr(limit, name)
        inside = {"ge": value >= bound, "gt": value > bound, "le": value <= bound, "lt": value < bound}[name]
        if not inside:
            nearest = (
                f"the nearest valid value is {bound}"
                if name in ("ge", "le")
                else f"it may come near {bound}, not reach it"
            )
            raise Unreadable(f"is {value}; it must be {describe_limits(field)}", nearest)


def _read_bool(node: Node, _: FieldInfo | None) -> bool:
    value = node.value
    if isinstance(value, bool):
        return value
    word = str(value).lower()
    if isinstance(value, str) and node.raw is not None and word in YES | NO:
        return word in YES
    if node.raw in ("0", "1") and node.place.layer not in (Layer.FILE, Layer.GRID):
        return node.raw == "1"
    raise Unreadable(_describe_found(node), "write true or false")


def _read_int(node: Node, field: FieldInfo | None) -> int:
    value = node.value
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, float) and math.isfinite(value) and value == int(value) and node.raw is not None:
        return int(value)
    remedy = f"write a whole number {describe_limits(field) if field else ''}".strip()
    if isinstance(value, float) and math.isfinite(value):
        remedy += f"; the nearest are {math.floor(value)} and {math.ceil(value)}"
    raise Unreadable(_describe_found(node), remedy)


def _read_float(node: Node, field: FieldInfo | None) -> float:
    value = node.value
    if isinstance(value, int | float) and not isinstance(value, bool):
        if not math.isfinite(value):
            raise Unreadable(f"is {value}", "write a finite number")
        return float(value)
    limits = f" {describe_limits(field)}" if field and describe_limits(field) else ""
    raise Unreadable(_describe_found(node), f"write a number{limits}, such as 0.1 or 1e-5")


def _read_str(node: Node, _: FieldInfo | None) -> str:
    if isinstance(node.value, str):
        return node.value
    if node.raw is not None and node.value is not None:
        return node.raw.strip()
    raise Unreadable(_describe_found(node), "write text (in quotes)")


_SCALARS: dict[Any, Any] = {bool: _read_bool, int: _read_int, float: _read_float, str: _read_str}


def _read_literal(node: Node, words: tuple[Any, ...]) -> Any:
    for candidate in (node.value, node.raw):
        if not isinstance(candidate, bool) and candidate in words and candidate is not None:
            return candidate
    for word in words:
        if str(word).lower() == str(node.raw or node.value).strip().lower():
            return word
    near = suggest(str(node.value), map(str, words))
    allowed = f"write {'one of ' if len(words) > 1 else ''}{', '.join(map(str, words))}"
    found = "has no value" if node.value is None else f"is {format_value(node.value)}"
    raise Unreadable(found, f"{describe_suggestions(near)} ({allowed})" if near else allowed)


def _describe_found(node: Node) -> str:
    if node.value is None:
        return "has no value"
    if isinstance(node.value, str):
        quoted = " in quotes" if node.raw is None and not isinstance(read_scalar(node.value), str) else ""
        return f"is the text {format_value(node.value)}{quoted}"
    if isinstance(node.value, dict | list):
        return f"is {_name_shape(node.value)}"
    return f"is {format_value(node.value)}"


def _name_shape(value: Any) -> str:
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    return "empty" if value is None else format_value(value)


def _is_comma_list(node: Node) -> bool:
    """Whether a word of the command line or the environment is a list; an existing path with a comma in it is not."""
    if isinstance(node.value, str) and "," in node.value and Path(node.value).expanduser().exists():
        return False
    outside = node.place.layer not in (Layer.FILE, Layer.CHECKPOINT, Layer.GRID)
    return outside and isinstance(node.value, str) and node.raw is not None and "," in node.raw


def _replace_alias(name: str, node: Node) -> Node:
    table = VALUE_ALIASES.get(name, {})
    if isinstance(node.value, str) and node.value in table:
        return Node(table[node.value], node.place, raw=table[node.value], key=node.key)
    return node


def _describe_place(node: Node) -> str:
    return node.place.text

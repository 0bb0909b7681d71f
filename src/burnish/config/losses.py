"""What loss types read and which defaults they bring, found without loading them (and torch).

The settings of a loss type are the keyword-only parameters of its function. Here they are read from the source.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.config.registry import LOSS_TYPES, LossEntry

Reader = Callable[[str], frozenset[str] | None]


def get_loss_names(loss_type: str | Sequence[str]) -> list[str]:
    """The names in `loss_type`, one or several."""
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def find_entry(kind: str, name: str) -> LossEntry:
    """The registered loss type of a kind, or `module:function` as one."""
    return LOSS_TYPES.get(kind, {}).get(name) or LossEntry(name)


def find_source(module: str) -> Path | None:
    """The file of a module: installed, or in the current folder."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    origin = spec.origin if spec is not None else None
    place = Path(origin) if origin else Path.cwd() / f"{module.replace('.', '/')}.py"
    return place if place.is_file() else None


def read_parameters(path: str) -> frozenset[str] | None:
    """Keyword-only parameters of the function "module:name", from its source; None if that tells nothing."""
    module, _, name = path.partition(":")
    if module.startswith("burnish."):
        return _read_own(module, name)
    if "." in module:
        return None  # looking for it would run the packages that it lies in
    return _find_parameters(find_source(module), name)


@cache
def _read_own(module: str, name: str) -> frozenset[str] | None:
    return _find_parameters(find_source(module), name)


def _find_parameters(source: Path | None, name: str) -> frozenset[str] | None:
    if source is None:
        return None
    try:
        body = ast.parse(source.read_bytes()).body
    except (OSError, SyntaxError, ValueError):
        return None
    for node in body:
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return frozenset(argument.arg for argument in node.args.kwonlyargs)
    return None


def fill_defaults(kind: str, values: Any) -> Any:
    """The values with the defaults that the first loss type brings; those that are given stay."""
    if not isinstance(values, Mapping):
        return values
    return {**get_loss_defaults(kind, values.get("loss_type", [])), **values}


def get_loss_defaults(kind: str, loss_type: Any) -> Mapping[str, Any]:
    """Defaults of the first of the loss types that differ from those of the kind."""
    first = loss_type[0] if isinstance(loss_type, list) and loss_type else loss_type
    return find_entry(kind, first).defaults if isinstance(first, str) else {}


def find_unread(settings: Any, kind: str, names: Sequence[str], read: Reader = read_parameters) -> dict[str, Any]:
    """Settings of the family that were changed, but that none of these loss types reads: name → their default.

    The family's settings are what the loss types of the kind read. If a function cannot be looked into, nothing is
    found.
    """
    own = [read(find_entry(kind, name).function) for name in names]
    read_by_any: set[str] = set()
    for found in own:
        if found is None:
            return {}
        read_by_any |= found
    defaults = get_loss_defaults(kind, list(names))
    unread: dict[str, Any] = {}
    for name in sorted(find_family(kind, read) - read_by_any):
        field = type(settings).model_fields.get(name)
        if field is not None and getattr(settings, name) != defaults.get(name, field.default):
            unread[name] = defaults.get(name, field.default)
    return unread


def find_family(kind: str, read: Reader = read_parameters) -> set[str]:
    """What the loss types of a kind read, all together."""
    found: set[str] = set()
    for entry in LOSS_TYPES.get(kind, {}).values():
        found |= read(entry.function) or frozenset()
    return found


def find_readers(kind: str, setting: str) -> list[str]:
    """The loss types of a kind that read a setting."""
    return [n for n, entry in LOSS_TYPES.get(kind, {}).items() if setting in (read_parameters(entry.function) or ())]

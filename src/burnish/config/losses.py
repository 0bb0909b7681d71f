"""What loss types read and which defaults they bring, found without loading them (and torch)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from burnish.config.registry import find_method_spec
from burnish.config.spec import LossEntry

OWN_SETTINGS = ("beta",)  # what a user's function gets unless it declares others


def get_loss_names(loss_type: str | Sequence[str]) -> list[str]:
    """The names in `loss_type`, one or several."""
    return [loss_type] if isinstance(loss_type, str) else list(loss_type)


def find_entry(kind: str, name: str) -> LossEntry:
    """The registered loss type of a kind, or `module:function` as one."""
    return find_method_spec(kind).loss_types.get(name) or LossEntry(name, OWN_SETTINGS)


def is_registered(kind: str, name: str) -> bool:
    """Whether a loss type is one of the kind's, not a function of the user's."""
    return name in find_method_spec(kind).loss_types


def find_source(module: str) -> Path | None:
    """The file of a module: installed, or in the current folder."""
    try:
        spec = find_spec(module)
    except (ImportError, ValueError):
        spec = None
    origin = spec.origin if spec is not None else None
    place = Path(origin) if origin else Path.cwd() / f"{module.replace('.', '/')}.py"
    return place if place.is_file() else None


def fill_defaults(kind: str, values: Any) -> Any:
    """The values with the defaults that the first loss type brings; those that are given stay."""
    if not isinstance(values, Mapping):
        return values
    return {**get_loss_defaults(kind, values.get("loss_type", [])), **values}


def get_loss_defaults(kind: str, loss_type: Any) -> Mapping[str, Any]:
    """Defaults of the first of the loss types that differ from those of the kind."""
    first = loss_type[0] if isinstance(loss_type, list) and loss_type else loss_type
    return find_entry(kind, first).defaults if isinstance(first, str) else {}


def find_unread(settings: Any, kind: str, entries: Mapping[str, LossEntry]) -> dict[str, Any]:
    """Settings of the family that were changed, but that none of these loss types reads: name → their default.

    The family's settings are what the loss types of the kind read.

    Args:
        entries: Name → loss type of the stage.
    """
    read = {name for entry in entries.values() for name in entry.settings}
    defaults = get_loss_defaults(kind, list(entries))
    unread: dict[str, Any] = {}
    for name in sorted(find_family(kind) - read):
        field = type(settings).model_fields.get(name)
        if field is not None and getattr(settings, name) != defaults.get(name, field.default):
            unread[name] = defaults.get(name, field.default)
    return unread


def find_family(kind: str) -> set[str]:
    """What the loss types of a kind read, all together."""
    return {name for entry in find_method_spec(kind).loss_types.values() for name in entry.settings}


def find_readers(kind: str, setting: str) -> list[str]:
    """The loss types of a kind that read a setting."""
    return [n for n, entry in find_method_spec(kind).loss_types.items() if setting in entry.settings]

"""A complete recipe of a kind: every setting with its default and what it does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from burnish.config.base import Settings
from burnish.config.keys import section_class, settings_class
from burnish.config.losses import get_loss_defaults
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, SECTIONS, find_spec
from burnish.config.spec import MethodSpec, RowShape

# What an example names where a kind cannot do without: data of its rows' shape, other models.
EXAMPLES: dict[RowShape, str] = {
    "completion": "pocket/chat",
    "prompt": "pocket/chat",
    "pair": "pocket/preferences",
    "label": "pocket/preferences",
}
NEEDED = {"teacher": "pocket", "reward_model": "./reward-model"}


def render_example(kind: str) -> str:
    """A complete recipe of one stage: every setting with its default, commented out where it is one."""
    canonical = ALIASES[kind].kind if kind in ALIASES else kind
    cls, spec = settings_class(canonical), find_spec(canonical)
    lines = [
        f"# {spec.summary[0].upper()}{spec.summary[1:]}: every setting with its default.",
        "# Remove the # before a line to change it.",
        f"name: {kind if kind in ALIASES else spec.name}",
        f"model: pocket{' ' * 20}# {Recipe.model_fields['model'].description}",
        "stages:",
        f"  - kind: {kind}",
    ]
    if isinstance(spec, MethodSpec):
        lines.append(f"    data: {EXAMPLES[spec.rows]}{' ' * 10}# {cls.model_fields['data'].description}")
    needed = (*getattr(spec, "required", ()), *(ALIASES[kind].requires if kind in ALIASES else ()))
    for name in needed:
        lines.append(f"    {name}: {NEEDED[name]}".ljust(30) + f" # {cls.model_fields[name].description}")
    for owner, names in group_fields(cls):
        lines += ["", f"    # {_title(owner)}"]
        for name in names:
            if (
                name in ("kind", "model", *needed)
                or name in get_fixed(kind)
                or (name == "data" and canonical != "evaluate")
            ):
                continue
            lines += _example_lines(name, get_field(cls, name, kind), 4)
    return "\n".join(lines) + "\n"


def _example_lines(name: str, field: FieldInfo, indent: int) -> Iterator[str]:
    pad = " " * indent
    if name in SECTIONS:
        yield f"{pad}# {field.description}"
        yield f"{pad}# {name}:"
        for child, info in section_class(name).model_fields.items():
            yield f"{pad}#   {_setting_text(child, info)}"
        return
    yield f"{pad}# {_setting_text(name, field)}"


def _setting_text(name: str, field: FieldInfo) -> str:
    return f"{name}: {format_default(field)}".ljust(40) + f" # {field.description}"


def format_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)  # what is shown can be written down and means the same
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def format_default(field: FieldInfo) -> str:
    """A setting's default as YAML."""
    if field.is_required():
        return ""
    default = field.default
    return format_yaml(default.model_dump(mode="json") if isinstance(default, Settings) else default)


def group_fields(cls: type[Settings]) -> list[tuple[type[Settings], list[str]]]:
    """The settings of a class by the class that has them to itself first, the kind's own before those it shares."""
    owners: list[tuple[type[Settings], list[str]]] = []
    seen: set[str] = set()
    for owner in reversed([base for base in cls.__mro__ if issubclass(base, Settings) and base is not Settings]):
        names = [name for name in owner.model_fields if name not in seen]
        seen.update(names)
        owners.append((owner, names))
    redefined = [name for name in cls.__annotations__ if name not in owners[-1][1]]
    owners[-1] = (cls, list(cls.__annotations__))
    for i, (owner, names) in enumerate(owners[:-1]):
        owners[i] = (owner, [name for name in names if name not in redefined])
    return list(reversed(owners))


def get_field(cls: type[Settings], name: str, kind: str) -> FieldInfo:
    """A setting of a kind or of an alias, whose loss type may bring a default of its own."""
    field = cls.model_fields[name]
    if kind not in ALIASES:
        return field
    defaults = get_loss_defaults(ALIASES[kind].kind, ALIASES[kind].fixed.get("loss_type"))
    return FieldInfo.merge_field_infos(field, default=defaults[name]) if name in defaults else field


def _title(owner: type[Settings]) -> str:
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0]


def get_fixed(kind: str) -> dict[str, Any]:
    """The settings that an alias of a kind fixes; of a kind none."""
    return ALIASES[kind].fixed if kind in ALIASES else {}

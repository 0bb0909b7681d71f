"""What there is to set: JSON Schema, complete examples and resolved recipes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import yaml
from pydantic.fields import FieldInfo

from burnish.config.base import Settings
from burnish.config.batch import compute_batch
from burnish.config.keys import inherits, section_class, settings_class
from burnish.config.load import LoadedRecipe
from burnish.config.losses import get_loss_defaults
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS, SECTIONS, find_spec
from burnish.config.spec import MethodSpec
from burnish.config.train import TrainSettings

# What an example names where a kind cannot do without.
NEEDED = {"teacher": "pocket", "reward_model": "./reward-model"}
SCHEMA_ID = "https://json-schema.org/draft/2020-12/schema"


def build_schema() -> dict[str, Any]:
    """The JSON Schema of recipes as people write them: aliases of kinds, and stage settings at the top."""
    definitions: dict[str, Any] = {}
    stages, top = [], {}
    for name, kind in [(k, k) for k in KINDS] + [(a, alias.kind) for a, alias in ALIASES.items()]:
        cls = settings_class(kind)
        schema = cls.model_json_schema(ref_template="#/$defs/{model}")
        definitions.update(schema.pop("$defs", {}))
        properties = {key: value for key, value in schema["properties"].items() if key not in _fixed(name)}
        properties["kind"] = {"const": name, "description": KINDS[kind].summary}
        top.update({key: value for key, value in properties.items() if inherits(kind, key)})
        definitions[f"stage-{name}"] = {
            "type": "object",
            "description": (cls.__doc__ or "").strip(),
            "properties": properties,
            "required": ["kind"],
            "additionalProperties": False,
        }
        stages.append({"$ref": f"#/$defs/stage-{name}"})
    recipe = Recipe.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update({k: v for k, v in recipe.pop("$defs", {}).items() if k != "Settings"})
    properties = {**top, **recipe["properties"]}
    properties["stages"] = {
        "type": "array",
        "minItems": 1,
        "description": Recipe.model_fields["stages"].description,
        "items": {"oneOf": stages},
    }
    return {
        "$schema": SCHEMA_ID,
        "title": "burnish recipe",
        "type": "object",
        "properties": properties,
        "required": ["stages"],
        "additionalProperties": False,
        "$defs": definitions,
    }


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
        lines.append(f"    data: {spec.example}{' ' * 10}# {cls.model_fields['data'].description}")
    needed = (*getattr(spec, "required", ()), *(ALIASES[kind].requires if kind in ALIASES else ()))
    for name in needed:
        lines.append(f"    {name}: {NEEDED[name]}".ljust(30) + f" # {cls.model_fields[name].description}")
    for owner, names in group_fields(cls):
        lines += ["", f"    # {_title(owner)}"]
        for name in names:
            if (
                name in ("kind", "model", *needed)
                or name in _fixed(kind)
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


def render_resolved(loaded: LoadedRecipe, *, everything: bool = False) -> str:
    """The resolved recipe as YAML, each value with its source; without `everything` only what is not a default."""
    lines = [f"# {loaded.origin}, resolved; run folder: {loaded.recipe.output_dir}/{loaded.run_name()}"]
    recipe = loaded.recipe.resolved()
    stages = recipe.pop("stages")
    lines += _resolved_lines(recipe, "", "", loaded, everything, keep=("name",))
    lines.append("stages:")
    for stage in stages:
        kind, name = stage.pop("kind"), stage.pop("name")
        lines.append(f"  - kind: {kind}")
        lines.append(f"    name: {name}")
        settings = loaded.recipe.stage(name)
        if isinstance(settings, TrainSettings):
            lines.append(f"    # {compute_batch(settings, loaded.processes)}")
        lines += _resolved_lines(stage, f"stages.{name}.", "    ", loaded, everything)
    return "\n".join(lines) + "\n"


def _resolved_lines(
    values: dict[str, Any],
    path: str,
    pad: str,
    loaded: LoadedRecipe,
    everything: bool,
    keep: tuple[str, ...] = (),
) -> list[str]:
    lines = []
    for key, value in values.items():
        source = loaded.source_of(f"{path}{key}")
        below = [place for place in loaded.sources if place.startswith(f"{path}{key}.")]
        if source == "default" and below:
            source = loaded.sources[below[0]]
        if not everything and source == "default" and key not in keep:
            continue
        if isinstance(value, dict) and value and key in SECTIONS:
            inner = _resolved_lines(value, f"{path}{key}.", pad + "  ", loaded, everything)
            lines.append(f"{pad}{key}:" if inner else f"{pad}{key}: {{}}  # {source}")
            lines += inner
        else:
            lines.append(f"{pad}{key}: {format_yaml(value)}".ljust(56) + f"  # {source}")
    return lines


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


def _fixed(kind: str) -> dict[str, Any]:
    return ALIASES[kind].fixed if kind in ALIASES else {}

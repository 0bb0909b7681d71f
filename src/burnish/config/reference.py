"""What there is to set: JSON Schema, complete examples, resolved recipes and the page of all settings."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Any, Literal, Union, get_args, get_origin

import yaml
from pydantic.fields import FieldInfo

from burnish.config.aliases import KEY_ALIASES, VALUE_ALIASES
from burnish.config.base import Settings
from burnish.config.data import DataSettings, DataSource
from burnish.config.keys import inherits, settings_class
from burnish.config.load import LoadedRecipe
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS
from burnish.config.train import LoraSettings, TrainSettings
from burnish.config.values import describe_limits

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
    cls = settings_class(canonical)
    lines = [
        f"# {KINDS[canonical].summary[0].upper()}{KINDS[canonical].summary[1:]}: every setting with its default.",
        "# Remove the # before a line to change it.",
        f"name: {kind}",
        f"model: pocket{' ' * 20}# {Recipe.model_fields['model'].description}",
        "stages:",
        f"  - kind: {kind}",
    ]
    if canonical != "evaluate":
        source = "pocket/chat" if canonical == "sft" else "pocket/preferences"
        lines.append(f"    data: {source}{' ' * 10}# {cls.model_fields['data'].description}")
    for owner, names in _group_fields(cls):
        lines.append("")
        lines.append(f"    # {_title(owner)}")
        for name in names:
            if name in ("kind", "data", "model") or name in _fixed(kind):
                continue
            lines += _example_lines(name, cls.model_fields[name], 4)
    return "\n".join(lines) + "\n"


def _example_lines(name: str, field: FieldInfo, indent: int) -> Iterator[str]:
    pad = " " * indent
    if name == "lora":
        yield f"{pad}# {field.description}"
        yield f"{pad}# lora:"
        for child, info in LoraSettings.model_fields.items():
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
        if isinstance(value, dict) and value and key == "lora":
            inner = _resolved_lines(value, f"{path}{key}.", pad + "  ", loaded, everything)
            lines.append(f"{pad}{key}:" if inner else f"{pad}{key}: {{}}  # {source}")
            lines += inner
        else:
            lines.append(f"{pad}{key}: {format_yaml(value)}".ljust(56) + f"  # {source}")
    return lines


def format_yaml(value: Any) -> str:
    """A value as one line of YAML."""
    if isinstance(value, float):
        return f"{value:g}"
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000, allow_unicode=True).strip()
    return text.removesuffix("...").strip()


def format_default(field: FieldInfo) -> str:
    """A setting's default as YAML."""
    if field.is_required():
        return ""
    return format_yaml(field.default)


def render_settings_page() -> str:
    """The page of all settings (docs/settings.md), made from the classes."""
    parts = [_PAGE_HEAD]
    parts += ["## Recipe", "", *_table(Recipe, list(Recipe.model_fields)), ""]
    for kind in KINDS:
        cls = settings_class(kind)
        own = [name for owner, names in _group_fields(cls) for name in names if owner is cls]
        aliases = [f"`{alias}`" for alias, target in ALIASES.items() if target.kind == kind]
        also = f" Also as kind {', '.join(aliases)}." if aliases else ""
        parts += [f"## Stage: {kind}", "", f"{(cls.__doc__ or '').strip()}{also}", "", *_table(cls, own), ""]
    shared = list(TrainSettings.__annotations__)
    parts += ["## Every training stage", "", *_table(TrainSettings, shared), ""]
    parts += ["## Adapters (`lora`)", "", *_table(LoraSettings, list(LoraSettings.model_fields)), ""]
    parts += ["## Data", "", *_table(DataSettings, list(DataSettings.model_fields)), ""]
    parts += ["## A data source", "", _SOURCE_TEXT, "", *_table(DataSource, list(DataSource.model_fields)), ""]
    parts += ["## Other names", "", _ALIAS_TEXT, "", "| written | means |", "|---|---|"]
    parts += [f"| `{alias}` | `{target}` |" for alias, target in sorted(KEY_ALIASES.items())]
    parts += [
        f"| `{key}: {written}` | `{key}: {value}` |"
        for key, table in sorted(VALUE_ALIASES.items())
        for written, value in sorted(table.items())
    ]
    parts += [
        "| `bf16: true`, `fp16: true` | `precision: bf16`, `precision: fp16` |",
        "| `use_peft: true` | `lora: {}` |",
    ]
    return "\n".join(parts) + "\n"


_PAGE_HEAD = """# Settings

<!-- Made by `burnish config reference --output docs/settings.md`; change the settings classes, not this page. -->

A recipe is a YAML (or JSON) file. Any stage setting written at the top is the default of every stage that has it and
does not set it. `burnish config example KIND` prints a complete recipe, `burnish config show RECIPE` what a recipe means.

**Precedence.** Defaults < `.env` < environment < checkpoint (`--resume_from`) < file < command line. On the command line,
`stages.dpo.beta=0.05`, `stages.2.beta=0.05` (positions from 0) or `dpo.beta=0.05` reach one stage; `beta=0.05` reaches every
stage that has the setting, also where the file sets it in the stage.

**Environment.** `BURNISH__SEED=3` is `seed: 3` at the top, `BURNISH_DPO__BETA=0.05` is `beta` of the stage `dpo` (or of all
stages of that kind), `BURNISH_DPO__LORA__R=8` is `lora: {r: 8}`. Case does not matter; write `_` for the `-` of a stage's name.
From `.env`, only these and the tokens `HF_TOKEN`, `HUGGINGFACE_TOKEN` and `WANDB_API_KEY` are read.

**Values.** YAML 1.2: `1e-5` is a number, `no` and `2024-01-01` are text. A switch also takes `on`, `off`, `yes`, `no`. Where text is
asked for, an unquoted `001` stays `001`. Where a list is asked for, a single value will do (`report_to: wandb`); on the command
line and in the environment, commas separate items.

**Names.** A stage without `name:` is called by its kind; a second `dpo` is `dpo-2`.

**The run's folder** is `output_dir/run_name`. `run_name` may contain `{name}`, `{stage}` (last training stage), `{stages}`,
`{model}`, `{seed}`, `{epochs}`, `{train_percent}`, `{eval_percent}` (also `{train%}`, `{eval%}`), any setting of the last training stage
(`{learning_rate}`) and any setting of a stage (`{dpo.beta}`).
"""
_SOURCE_TEXT = "`data: FILE` means `data: {source: FILE}`; a list of sources is a mixture."
_ALIAS_TEXT = "Names from TRL and transformers are accepted; burnish prints the canonical one."


def _table(cls: type[Settings], names: list[str]) -> list[str]:
    rows = ["| setting | default | values | what it does |", "|---|---|---|---|"]
    for name in names:
        field = cls.model_fields[name]
        default = "required" if field.is_required() else f"`{format_default(field)}`"
        cells = (f"`{name}`", default, describe_values(field), field.description or "")
        rows.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return rows


def describe_values(field: FieldInfo) -> str:
    """What a setting takes, for a table."""
    text = _describe(field.annotation)
    limits = describe_limits(field)
    return f"{text} {limits}".strip()


def _describe(annotation: Any) -> str:
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return " or ".join(dict.fromkeys(_describe(member) for member in members))
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{word}`" for word in get_args(annotation))
    if get_origin(annotation) is list:
        return f"list of {_describe(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return {"LoraSettings": "`lora` settings", "DataSource": "source"}.get(annotation.__name__, "stage")
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(annotation, "stage")


def _group_fields(cls: type[Settings]) -> list[tuple[type[Settings], list[str]]]:
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


def _title(owner: type[Settings]) -> str:
    return (owner.__doc__ or owner.__name__).strip().splitlines()[0]


def _fixed(kind: str) -> dict[str, Any]:
    return ALIASES[kind].fixed if kind in ALIASES else {}

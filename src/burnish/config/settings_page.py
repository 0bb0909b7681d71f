"""The page of all settings (docs/settings.md), made from the settings classes."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from burnish.config.aliases import KEY_ALIASES, VALUE_ALIASES
from burnish.config.base import Settings
from burnish.config.data import DataSettings, DataSource
from burnish.config.example import format_default, group_fields
from burnish.config.keys import section_class, settings_class
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS, SECTIONS
from burnish.config.train import TrainSettings
from burnish.config.values import describe_limits

_SHARED = (TrainSettings, DataSettings)  # they have tables of their own
_HEAD = """# Settings

<!-- Made by `burnish config reference --output docs/settings.md`; change the settings classes, not this page. -->

A recipe is a YAML (or JSON) file. Any stage setting written at the top is the default of every stage that has it and
does not set it. `burnish config example KIND` prints a complete recipe, `burnish config show RECIPE` what one means.

**Precedence.** Defaults < [`distributed.config`](distributed-config.md) < `.env` < environment < checkpoint
(`--resume-from`) < file < grid < command line. On the command line, `stages.dpo.beta=0.05`, `stages.2.beta=0.05`
(positions from 0) or `dpo.beta=0.05` reach one stage; `beta=0.05` reaches every stage that has the setting, also where
the file sets it in the stage.

**Environment.** `BURNISH__SEED=3` is `seed: 3` at the top, `BURNISH_DPO__BETA=0.05` is `beta` of the stage `dpo` (or of
all stages of that kind), `BURNISH_DPO__LORA__R=8` is `lora: {r: 8}`. Case does not matter; write `_` for the `-` of a
stage's name. From `.env`, only these and the tokens `HF_TOKEN`, `HUGGINGFACE_TOKEN` and `WANDB_API_KEY` are read.

**Values.** YAML 1.2: `1e-5` is a number, `no` and `2024-01-01` are text. A switch also takes `on`, `off`, `yes`, `no`.
Where text is asked for, an unquoted `001` stays `001`. Where a list is asked for, a single value will do
(`report_to: wandb`); on the command line and in the environment, commas separate items.

**Names.** A stage without `name:` is called by its kind; a second `dpo` is `dpo-2`. A file with `kind:` and no
`stages:` is a recipe of one stage.

**Grids.** `grid:` gives settings, stages or models several values each; every combination is a run of its own:
[comparisons](comparisons.md).

**Start.** A stage with `init_from` starts from that stage's result, any other from `model`.

**The run's folder** is `output_dir/run_name`. `run_name` may contain `{name}`, `{stage}` (the last training stage),
`{stages}`, `{model}`, `{seed}`, `{epochs}`, `{train_percent}`, `{eval_percent}` (also `{train%}`, `{eval%}`), any
setting of the last training stage (`{learning_rate}`) and any setting of a stage (`{dpo.beta}`).
"""
_SOURCE_TEXT = "`data: FILE` means `data: {source: FILE}`; a list of sources is a mixture."
_SECTION_TITLES = {
    "lora": "Adapters",
    "distributed": "Several processes",
    "dynamic_beta": "Dynamic beta",
    "margin_records": "Margin records",
}
_ALIAS_TEXT = "Names from TRL and transformers are accepted; burnish prints the canonical one."


_OTHER_CLASSES = {"DataSource": "source", "PairsUnit": "`{pairs: N}`"}


def render_settings_page() -> str:
    """The page of all settings (docs/settings.md), made from the classes."""
    parts = [_HEAD]
    parts += ["## Recipe", "", *_table(Recipe, list(Recipe.model_fields)), ""]
    for kind in KINDS:
        cls = settings_class(kind)
        own = [name for owner, names in group_fields(cls) for name in names if owner not in _SHARED]
        aliases = [f"`{alias}`" for alias, target in ALIASES.items() if target.kind == kind]
        also = f" Also as kind {', '.join(aliases)}." if aliases else ""
        parts += [f"## Stage: {kind}", "", f"{(cls.__doc__ or '').strip()}{also}", "", *_table(cls, own), ""]
    shared = list(TrainSettings.__annotations__)
    parts += ["## Every training stage", "", *_table(TrainSettings, shared), ""]
    for name, title in _SECTION_TITLES.items():
        cls = section_class(name)
        parts += [f"## {title} (`{name}`)", "", *_table(cls, list(cls.model_fields)), ""]
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
        "| `load_in_4bit: true`, `load_in_8bit: true` | `quantize: nf4`, `quantize: int8` |",
    ]
    return "\n".join(parts) + "\n"


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
        sections = {section_class(name): f"`{name}` settings" for name in SECTIONS}
        return sections.get(annotation) or _OTHER_CLASSES.get(annotation.__name__, "stage")
    return {int: "integer", float: "number", bool: "true, false", str: "text"}.get(annotation, "stage")

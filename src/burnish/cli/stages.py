"""`burnish sft`, `reward`, `dpo` …: one stage without a recipe file, its flags made from the settings classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click
from pydantic.fields import FieldInfo

from burnish.cli.flags import SettingsCommand, describe_flag_value
from burnish.cli.resume import load_checkpoint_settings
from burnish.cli.run import build_options, execute, run_options
from burnish.config.base import Settings
from burnish.config.example import get_field
from burnish.config.keys import RECIPE_KEYS, section_class, settings_class
from burnish.config.registry import ALIASES, KINDS, SECTIONS

_HIDDEN = frozenset({"kind", "name", "init_from"})
_TOP = frozenset(RECIPE_KEYS) - {"data", "stages"}


def build_verb(word: str) -> click.Command:
    """The command of a kind or of an alias of one."""
    alias = ALIASES.get(word)
    kind = alias.kind if alias else word
    fixed: Mapping[str, Any] = alias.fixed if alias else {}
    cls = settings_class(kind)

    summary = KINDS[kind].summary
    described = f"{summary[0].upper()}{summary[1:]}"
    if alias:
        described += f" with {alias.describe()}"
    text = (
        f"{described}: one stage without a recipe file.\n\nEvery setting is a flag (--learning_rate or "
        "--learning-rate); --x, --no-x and --x true/false for switches."
    )

    @click.command(word, cls=SettingsCommand, help=text)
    @click.argument("words", nargs=-1, metavar="[KEY=VALUE]...")
    @run_options
    @click.option(
        "--resume-from",
        "--resume-from-checkpoint",
        "resume_from",
        metavar="CHECKPOINT",
        help="Continue from this checkpoint, with its settings.",
    )
    def command(words: tuple[str, ...], config_file: str | None, resume_from: str | None, **flags: Any) -> int:
        return _run_verb(word, kind, words, config_file, resume_from, flags)

    command.sections = lambda: _describe_settings(cls, fixed, word)
    return command


def _run_verb(
    word: str,
    kind: str,
    words: tuple[str, ...],
    config_file: str | None,
    resume_from: str | None,
    flags: dict[str, Any],
) -> int:
    options = build_options(**flags, resume_from=resume_from)
    overrides = [place_word(item) for item in words]
    checkpoint = load_checkpoint_settings(resume_from, kind) if resume_from else None
    if config_file is not None:
        return execute(config_file, overrides, options, checkpoint=checkpoint, default_kind=word)
    top_k = any(item.partition("=")[0] == "stages.0.top_k" for item in overrides)
    name = "{stage}_{model}_top{top_k}" if top_k else "{stage}_{model}"
    recipe = {"name": word, "run_name": name, "stages": [{"kind": word}]}
    return execute(recipe, overrides, options, checkpoint=checkpoint)


def place_word(word: str) -> str:
    """`beta=0.05` belongs to the one stage; what belongs to the recipe stays there."""
    from burnish.config.aliases import KEY_ALIASES

    if "=" not in word:
        raise click.UsageError(f"unexpected word {word!r}\n  → write --data {word}, or key=value")
    head = word.partition("=")[0].partition(".")[0].replace("-", "_")
    return word if KEY_ALIASES.get(head, head) in _TOP or head == "stages" else f"stages.0.{word}"


def _describe_settings(
    cls: type[Settings], fixed: Mapping[str, Any], word: str
) -> list[tuple[str, list[tuple[str, str]]]]:
    """Sections of the help: the kind's own settings, then those that it shares."""
    titles = {
        "TrainSettings": "Training settings",
        "DataSettings": "Data settings",
        "ReferenceSettings": "Reference model",
    }
    sections: list[tuple[str, list[tuple[str, str]]]] = []
    seen: set[str] = set()
    for owner in reversed([base for base in cls.__mro__ if issubclass(base, Settings) and base is not Settings]):
        rows = []
        for name in owner.model_fields:
            if name in seen:
                continue
            seen.add(name)
            if name not in _HIDDEN and name not in fixed:
                rows += _describe_flags(cls, name, word)
        if rows:
            sections.append(
                (titles.get(owner.__name__, f"Settings of {cls.__name__.removesuffix('Settings').lower()}"), rows)
            )
    return list(reversed(sections))


def _describe_flags(cls: type[Settings], name: str, word: str) -> list[tuple[str, str]]:
    if name in SECTIONS:
        return [(f"--{name}", cls.model_fields[name].description or ""), *_nested_flags(name, section_class(name))]
    return [_describe_flag(get_field(cls, name, word), name)]


def _nested_flags(prefix: str, cls: type[Settings]) -> list[tuple[str, str]]:
    return [_describe_flag(field, f"{prefix}.{name}") for name, field in cls.model_fields.items()]


def _describe_flag(field: FieldInfo, flag: str) -> tuple[str, str]:
    head = f"--{flag}, --no-{flag}" if field.annotation is bool else f"--{flag} {describe_flag_value(field.annotation)}"
    default = "" if field.is_required() or field.default in (None, [], {}) else f" [{field.default}]"
    return head, f"{field.description}{default}"

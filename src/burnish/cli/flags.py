"""Settings as flags: `--learning_rate 1e-5`, `--lora.r=8`, `--shuffle`, `--no-shuffle`, `--stages.dpo.beta 0.05`."""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import click

SWITCH_WORDS = frozenset({"true", "false", "yes", "no", "on", "off", "1", "0"})


class SettingsCommand(click.Command):
    """A command whose unknown options are settings: they become `key=value` words among its arguments.

    The first parameter of type argument receives the words. Options of the command itself are untouched.
    """

    sections: Callable[[], list[tuple[str, list[tuple[str, str]]]]] | None = None

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, self.read_flags(ctx, args))

    def read_flags(self, ctx: click.Context, args: list[str]) -> list[str]:
        """The arguments with every setting's flag written as `key=value`."""
        own = {name: param for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        result: list[str] = []
        rest = list(args)
        while rest:
            word = rest.pop(0)
            if word == "--":
                return [*result, word, *rest]
            name, equals, value = word.partition("=")
            if not name.startswith("--") or name in own or name.replace("_", "-") in own:
                name = name if name in own else name.replace("_", "-") if name.startswith("--") else name
                word = f"{name}{equals}{value}"
                result.append(word)
                param = own.get(name)
                takes_value = isinstance(param, click.Option) and not param.is_flag and not param.count
                if takes_value and not equals and rest:
                    result.append(rest.pop(0))
                continue
            result.append(self._read_flag(ctx, own, name, value if equals else None, rest))
        return result

    def _read_flag(
        self, ctx: click.Context, own: dict[str, click.Parameter], name: str, value: str | None, rest: list[str]
    ) -> str:
        key = name[2:]
        switch = is_switch(key)
        if not switch and key.startswith(("no-", "no_")) and is_switch(key[3:]):
            if value is not None:
                raise click.UsageError(f"{name} takes no value\n  → write --{key[3:]} {value}", ctx)
            return f"{key[3:]}=false"
        if switch and value is None:
            value = rest.pop(0) if rest and rest[0].lower() in SWITCH_WORDS else "true"
        if value is None:
            if not rest or (rest[0].startswith("--") and len(rest[0]) > 2):
                self._refuse_unknown(ctx, own, name, key)
                raise click.UsageError(f"{name} needs a value\n  → write {name} VALUE", ctx)
            self._refuse_unknown(ctx, own, name, key)
            value = rest.pop(0)
        return f"{key}={value}"

    def _refuse_unknown(self, ctx: click.Context, own: dict[str, click.Parameter], name: str, key: str) -> None:
        """A misspelt option of the command itself is told apart from a misspelt setting."""
        from burnish.config.keys import all_setting_names
        from burnish.config.overrides import is_setting
        from burnish.config.spelling import describe_suggestions, suggest

        if "." in key or is_setting(key):
            return
        options = [option for option in own if option.startswith("--")]
        settings = [f"--{setting}" for setting in all_setting_names()]
        near = suggest(name, [*options, *settings])
        raise click.UsageError(
            f"there is no option {name}\n  → {describe_suggestions(near) or f'see `{ctx.command_path} --help`'}", ctx
        )

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        for title, rows in self.sections() if self.sections else []:
            with formatter.section(title):
                formatter.write_dl(rows)


def is_path(word: str) -> bool:
    """Whether a word names a file or folder rather than a setting: an existing one may have `=` in its path."""
    return "=" not in word or Path(word).expanduser().exists()


def is_switch(key: str) -> bool:
    """Whether a flag's setting is true or false."""
    from burnish.config.keys import section_class, settings_class
    from burnish.config.registry import KINDS, SECTIONS

    parts = key.replace("-", "_").split(".")
    if parts[-1] in ("bf16", "fp16", "use_peft", "load_in_4bit", "load_in_8bit", "use_rslora", "use_dora"):
        return True
    nested = len(parts) > 1 and parts[-2] in SECTIONS
    classes = [section_class(parts[-2])] if nested else [settings_class(kind) for kind in KINDS]
    return any(cls.model_fields[parts[-1]].annotation is bool for cls in classes if parts[-1] in cls.model_fields)


def describe_flag_value(annotation: Any) -> str:
    """What stands behind a flag in its help: INT, NUMBER, TEXT, one of a few words."""
    if get_origin(annotation) in (Union, types.UnionType):
        members = [member for member in get_args(annotation) if member is not type(None)]
        return "|".join(dict.fromkeys(describe_flag_value(member) for member in members))
    if annotation is bool:
        return ""
    if get_origin(annotation) is list:
        return f"{describe_flag_value(get_args(annotation)[0])},…"
    if get_origin(annotation) is dict:
        return "{…}"
    words = get_args(annotation)
    if words and all(isinstance(word, str) for word in words):
        return "|".join(words)
    return {int: "INT", float: "NUMBER", str: "TEXT"}.get(annotation, "{…}")


class KindName(click.ParamType):
    """A kind of stage or one of its aliases; or a user's own kind as module:NAME."""

    name = "KIND"

    def __init__(self, *, trains: bool = False) -> None:
        from burnish.config.registry import ALIASES, KINDS

        kinds = [name for name, spec in KINDS.items() if spec.trains or not trains]
        self.names = [*kinds, *(name for name, alias in ALIASES.items() if alias.kind in kinds)]

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The name as it was given."""
        from burnish.config.registry import is_own_kind, load_own_spec

        if value in self.names:
            return value
        if is_own_kind(value):
            load_own_spec(value)
            return value
        return self.fail(f"{value!r} is not one of {', '.join(self.names)}, or module:NAME of your own", param, ctx)

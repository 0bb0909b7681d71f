"""Settings from `.env` and the environment.

`BURNISH__SEED` is the top-level `seed`; `BURNISH_DPO__BETA` is `beta` of the stage named dpo, or of every stage of that
kind; `BURNISH_DPO__LORA__R` goes deeper. Case does not matter; `-` in a stage's name is written `_`. The environment
comes before `.env`, the recipe before both.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from burnish.config.tree import Layer, Node, Place, parse_word

PREFIX = "BURNISH_"
SECRET_NAMES = ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY")
# Variables that begin like settings and are not.
NOT_SETTINGS = frozenset(
    f"{PREFIX}{name}"
    for name in (
        "BEAT",
        "CACHE",
        "CLOCK",
        "COMPLETE",
        "DEVICE",
        "FAULT",
        "KERNELS",
        "PEER_TIMEOUT",
        "SHARED",
        "TESTING",
        "TRACEBACK",
    )
)


@dataclass(frozen=True, slots=True)
class EnvironmentValue:
    """A setting from the environment.

    Args:
        variable: Name of the variable.
        stage: Stage or kind it speaks of, lower case with underscores; None: all stages.
        path: Setting, and keys below it.
        node: Value.
        text: The text itself.
    """

    variable: str
    stage: str | None
    path: tuple[str, ...]
    node: Node
    text: str


def read_dotenv(path: Path) -> dict[str, str]:
    """The variables of a `.env` file; nothing is put into the process's environment. {} if there is no such file."""
    if not path.is_file():
        return {}
    from dotenv import dotenv_values

    return {key: value for key, value in dotenv_values(path).items() if value is not None}


def read_environment(
    environment: Mapping[str, str], dotenv: Mapping[str, str]
) -> tuple[list[EnvironmentValue], list[str]]:
    """Settings from both (the environment wins), and notes on variables that look like settings but are not."""
    values, notes = [], []
    for variable in sorted({**dotenv, **environment}):
        upper = variable.upper()
        if not upper.startswith(PREFIX) or upper in NOT_SETTINGS:
            continue
        in_environment = variable in environment
        text = environment[variable] if in_environment else dotenv[variable]
        label = "environment" if in_environment else ".env"
        place = Place(Layer.ENVIRONMENT if in_environment else Layer.DOTENV, f"{label} ({variable})")
        stage, separator, rest = upper[len(PREFIX) - 1 :].partition("__")
        path = tuple(part.lower() for part in rest.split("__") if part)
        if not separator or not path:
            notes.append(f"{variable} is not read: settings are written BURNISH__SETTING or BURNISH_STAGE__SETTING")
            continue
        values.append(EnvironmentValue(variable, stage.strip("_").lower() or None, path, parse_word(text, place), text))
    return values, notes

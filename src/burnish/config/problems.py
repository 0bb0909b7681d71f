"""Problems of a recipe: collected while it is read, raised together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from burnish.errors import ConfigError

MAX_PROBLEMS = 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong.

    Args:
        key: The setting, as a path (`stages.dpo.beta`).
        message: What is wrong with it, with the value found.
        remedy: What to do.
        where: "file:line", an environment variable or "command line".
    """

    key: str
    message: str
    remedy: str
    where: str = ""

    def __str__(self) -> str:
        place = f"{self.where}: " if self.where else ""
        return f"{place}{self.key}: {self.message}"


class RecipeError(ConfigError):
    """A recipe cannot be used. `problems` holds each thing that is wrong; the text lists the first twenty."""

    def __init__(self, problems: Sequence[Problem], *, origin: str = "recipe") -> None:
        unique = tuple(dict.fromkeys(problems))
        self.problems = unique
        if len(unique) == 1:
            only = unique[0]
            super().__init__(f"{only.key}: {only.message}", remedy=only.remedy, where=only.where or origin)
            return
        lines = [f"{len(unique)} problems"]
        for problem in unique[:MAX_PROBLEMS]:
            lines += [f"  - {problem}", f"      → {problem.remedy}"]
        if len(unique) > MAX_PROBLEMS:
            lines.append(f"  - and {len(unique) - MAX_PROBLEMS} more")
        super().__init__("\n".join(lines), remedy="mend these; nothing has been loaded or written yet", where=origin)


def format_value(value: object) -> str:
    """A value as an error shows it: short, on one line."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "…"

"""The lines of another program's configuration file, each with what becomes of it here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from burnish.config.problems import Problem, format_value
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.tree import Node

AUTO = "auto"
MANY = 200  # lines, or characters of a key, beyond which near spellings are not looked for
_WORDS = {"true": True, "yes": True, "false": False, "no": False}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the file.

    Attributes:
        key: Its path in the file ("zero_optimization.stage").
        node: Its value and place.
        setting: The setting here that it gives ("distributed.strategy"); None: it gives none.
        value: The value of that setting.
        text: What is said of a line that gives no setting.
    """

    key: str
    node: Node
    setting: str | None = None
    value: Any = None
    text: str = ""


class Reading:
    """What a file gives: its lines in order, and what is wrong with it.

    Args:
        origin: Name of the file, for messages.
    """

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.lines: list[Line] = []
        self.problems: list[Problem] = []
        self.taken: dict[str, Line] = {}

    def take(self, key: str, node: Node, setting: str, value: Any) -> None:
        """The line gives a setting; another line must not have given it another value."""
        line = Line(key, node, setting, value)
        before = self.taken.setdefault(setting, line)
        if before is not line and before.value != value:
            self.fail(
                key, node, f"is {show(node)}, but {before.key} is {show(before.node)}: both give {setting}", "keep one"
            )
            return
        self.lines.append(line)

    def leave(self, key: str, node: Node, setting: str) -> None:
        """The line leaves a setting to the recipe."""
        self.lines.append(Line(key, node, text=f"the recipe's {setting}"))

    def agree(self, key: str, node: Node, reason: str = "") -> None:
        """The line asks for what burnish does anyway."""
        self.lines.append(Line(key, node, text=f"as here: {reason}" if reason else "as here"))

    def skip(self, key: str, node: Node, reason: str) -> None:
        """The line is not taken."""
        self.lines.append(Line(key, node, text=f"not taken: {reason}"))

    def fail(self, key: str, node: Node, message: str, remedy: str) -> None:
        """The line is wrong."""
        self.problems.append(Problem(key, message, remedy, str(node.place)))


Handler = Callable[[Reading, str, Node], None]


def show(node: Node) -> str:
    """The line's value, short."""
    if isinstance(node.value, dict | list):
        return "{…}" if isinstance(node.value, dict) else format_value(node.plain())
    return node.raw if node.raw is not None else format_value(node.value)


def as_setting(setting: str) -> Handler:
    """The value is that of a setting; "auto" leaves it to the recipe. The setting's own limits are checked later."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        if node.value == AUTO:
            reading.leave(key, node, setting)
        elif node.value is None:
            reading.agree(key, node, "no value is given")
        else:
            reading.take(key, node, setting, node.plain())

    return handle


def as_switch(setting: str) -> Handler:
    """The value is true or false."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        flag = read_flag(reading, key, node)
        if flag is not None:
            reading.take(key, node, setting, flag)

    return handle


def as_choice(table: Mapping[str, Handler]) -> Handler:
    """The value is one of a few words, each with its own consequence."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        word = str(node.raw if node.raw is not None else node.value).strip().lower()
        if isinstance(node.value, dict | list) or word not in table:
            reading.fail(key, node, f"is {show(node)}", f"write one of {', '.join(table)}")
        else:
            table[word](reading, key, node)

    return handle


def gives(setting: str, value: Any) -> Handler:
    """Whatever the value: the line gives this setting."""
    return lambda reading, key, node: reading.take(key, node, setting, value)


def agrees(reason: str) -> Handler:
    """Whatever the value: burnish does so anyway."""
    return lambda reading, key, node: reading.agree(key, node, reason)


def skips(reason: str) -> Handler:
    """Whatever the value: the line is not taken."""
    return lambda reading, key, node: reading.skip(key, node, reason)


def skips_unless(value: Any, reason: str, why: str = "") -> Handler:
    """The line asks for what burnish does anyway if it has this value (or "auto" or none), else it is not taken."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        word = node.value.lower() if isinstance(node.value, str) else node.value
        word = _WORDS.get(word, word) if isinstance(word, str) and isinstance(value, bool) else word
        same = not isinstance(word, dict | list) and word == value and isinstance(word, bool) == isinstance(value, bool)
        if same or word in (None, AUTO) or word == {}:
            reading.agree(key, node, why)
        else:
            reading.skip(key, node, reason)

    return handle


def read_flag(reading: Reading, key: str, node: Node) -> bool | None:
    """True or false, also as text; anything else is wrong. None where there is nothing to do."""
    word = node.value.lower() if isinstance(node.value, str) else node.value
    if isinstance(word, bool):
        return word
    if isinstance(word, str) and word in _WORDS:
        return _WORDS[word]
    if word is None or word == AUTO:
        reading.agree(key, node, "no value is given")
    else:
        reading.fail(key, node, f"is {show(node)}", "write true or false")
    return None


def read_lines(
    reading: Reading, node: Node, handlers: Mapping[str, Handler], sections: frozenset[str], prefix: str = ""
) -> None:
    """Hands each line of a mapping to its handler; a key that has none is not taken, and is said to be unknown.

    Args:
        handlers: Path → what becomes of it; a path may end in ".*" for all keys below.
        sections: Paths of mappings whose keys have handlers of their own.
    """
    for name, child in node.value.items():
        key = f"{prefix}{name}"
        if key in sections:
            if isinstance(child.value, dict):
                read_lines(reading, child, handlers, sections, f"{key}.")
            elif child.value is None:
                reading.agree(key, child, "no value is given")
            else:
                reading.fail(
                    key, child, f"is {show(child)}, not a mapping", "write a mapping of settings, or remove it"
                )
            continue
        handler = handlers.get(key) or handlers.get(f"{prefix}*")
        if handler is not None:
            handler(reading, key, child)
            continue
        few = len(reading.lines) < MANY and len(key) < MANY
        known = describe_suggestions(suggest(key, handlers, 1)) if few else ""
        reading.skip(key, child, f"no such key is known here{'; ' + known if known else ''}")


def find_value(root: Node, path: str) -> Any:
    """The plain value at a path, None where there is none."""
    node: Node | None = root
    for part in path.split("."):
        if node is None or not isinstance(node.value, dict):
            return None
        node = node.value.get(part)
    return None if node is None else node.plain()


def render_lines(rows: Iterator[tuple[Line, str]]) -> list[str]:
    """A table: place, key, value, what becomes of it."""
    cells = [(str(line.node.place), line.key, show(line.node), text) for line, text in rows]
    cells = [tuple(re.sub(r"\s+", " ", cell) for cell in row) for row in cells]
    widths = [max((len(row[i]) for row in cells), default=0) for i in range(3)]
    return [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in cells
    ]

"""What is wrong with data: collected with file, line, field and remedy, and raised as one error."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Literal

from burnish.errors import DataError

LISTED = 20
ALIKE = 5
DROPPED = 100
SKIP_REMEDY = "fix or set on_error: skip (then counted and reported)"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with the data.

    Attributes:
        file: The file (or hub data set) as the user named it.
        line: Its line, row or element number, from 1; None when the whole file is meant.
        field: The field's path within the row (`messages[2].content`), or "".
        message: What was expected and what was found.
        remedy: What to do.
        kind: A short word to group equal problems by.
        fatal: The file cannot be read on; never skipped.
    """

    file: str
    line: int | None
    field: str
    message: str
    remedy: str
    kind: str
    fatal: bool = False

    @property
    def where(self) -> str:
        """The place, `file:line`."""
        return f"{self.file}:{self.line}" if self.line is not None else self.file

    @property
    def likeness(self) -> Likeness:
        """What equal problems of one file have in common."""
        return self.file, self.field, self.message, self.remedy, self.kind

    @property
    def row(self) -> str:
        """The row's short name, as groups bear it: the file's last part and the line."""
        return row_name(self.file, self.line)

    def __str__(self) -> str:
        return f"{self.where}: {self.field + ': ' if self.field else ''}{self.message}"


def row_name(file: str, line: int | None) -> str:
    """The short name of a row: the file's last part and the line."""
    name = file.rpartition("/")[2]
    return f"{name}:{line}" if line is not None else name


Likeness = tuple[str, str, str, str, str]


class RowError(ValueError):
    """A row cannot be used. The reader that knows the place turns it into a `Problem`."""

    def __init__(self, message: str, *, kind: str, field: str = "", remedy: str = SKIP_REMEDY) -> None:
        super().__init__(message)
        self.message, self.kind, self.field, self.remedy = message, kind, field, remedy

    def at(self, file: str, line: int | None) -> Problem:
        """The problem at its place."""
        return Problem(file, line, self.field, self.message, self.remedy, self.kind)


class RowDropped(RowError):
    """A row that the rules of its format leave out (a tie, say): counted and named, but no reason to stop."""

    def __init__(self, message: str, *, kind: str, field: str = "") -> None:
        super().__init__(
            message, kind=kind, field=field, remedy="nothing to do: the format's rules leave such rows out"
        )


class FileError(ValueError):
    """A file cannot be read, or not beyond some line: a problem that is never skipped."""

    def __init__(self, message: str, remedy: str, *, kind: str = "file", line: int | None = None) -> None:
        super().__init__(message)
        self.message, self.remedy, self.kind, self.line = message, remedy, kind, line

    def at(self, file: str) -> Problem:
        """The problem of this file."""
        return Problem(file, self.line, "", self.message, self.remedy, self.kind, fatal=True)


class DataProblems(DataError):
    """Problems found in one pass over the data; `problems` holds the first ones, `total` counts all."""

    def __init__(self, problems: Sequence[Problem], total: int, more: Mapping[Likeness, int] | None = None) -> None:
        self.problems, self.total = tuple(problems), total
        head = f"{total} problem{'s' if total != 1 else ''} in the data"
        remedies = list(dict.fromkeys(problem.remedy for problem in problems))
        lines = listing(problems, total, more or {}, remedies=len(remedies) > 1)
        super().__init__(
            "\n  ".join([head, *lines]),
            remedy=remedies[0] if len(remedies) == 1 else "mend each as said under it; `burnish data check` lists more",
            found=[asdict(problem) for problem in problems],
        )


def listing(
    problems: Sequence[Problem], total: int, more: Mapping[Likeness, int], *, remedies: bool = True
) -> list[str]:
    """Problems as lines: each with its remedy, equal ones together, and how many more there are."""
    groups: dict[Likeness, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.likeness, []).append(problem)
    lines, shown = [], 0
    for likeness, (first, *others) in groups.items():
        further = more.get(likeness, 0)
        shown += 1 + len(others) + further
        lines.append(str(first))
        if others:
            rest = f", and {further:,} more rows" if further else ""
            lines.append(f"  the same at lines {', '.join(str(problem.line) for problem in others)}{rest}")
        if remedies:
            lines.append(f"  → {first.remedy}")
    if total > shown:
        lines.append(f"… and {total - shown:,} further problems")
    return lines


@dataclass(slots=True)
class ProblemLog:
    """Collects problems: the first `listed` ones in full (of equal ones the first few), all of them by kind.

    `alike` and `more` count equal ones that are and are not listed; `dropped` names rows that the rules of their format
    leave out, `dropped_total` counts them; `on_refused` hears of every row that is refused.
    """

    on_error: Literal["raise", "skip"] = "raise"
    listed: int = LISTED
    problems: list[Problem] = field(default_factory=list)
    more: Counter[Likeness] = field(default_factory=Counter)
    alike: Counter[Likeness] = field(default_factory=Counter)
    total: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    fatal: list[Problem] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)
    dropped: list[Problem] = field(default_factory=list)
    dropped_total: int = 0
    on_refused: Callable[[Problem], None] | None = None

    @contextmanager
    def counting(self, refuse: Callable[[Problem], None]) -> Iterator[None]:
        """Tell `refuse` of every row that is refused within the block."""
        before, self.on_refused = self.on_refused, refuse
        try:
            yield
        finally:
            self.on_refused = before

    def drop(self, problem: Problem) -> None:
        """Record a row that the rules of its format leave out; named and counted, never raised."""
        self.dropped_total += 1
        if len(self.dropped) < DROPPED:
            self.dropped.append(problem)
        if self.on_refused:
            self.on_refused(problem)

    def add(self, problem: Problem) -> None:
        """Record a problem."""
        self.total += 1
        self.kinds[problem.kind] += 1
        if problem.fatal:
            self.fatal.append(problem)
        alike = self.alike.get(problem.likeness, 0)
        if len(self.problems) < self.listed and alike < ALIKE:
            self.problems.append(problem)
            self.alike[problem.likeness] += 1
        elif alike:
            self.more[problem.likeness] += 1
        if self.on_refused and not problem.fatal:
            self.on_refused(problem)

    def note(self, file: str, text: str) -> None:
        """Record something that was accepted but should be said (a byte-order mark, say), once a file and text."""
        self.notes[f"{file}: {text}"] = text

    def raise_if_due(self) -> None:
        """Raise one error for all problems, unless they may be skipped; fatal ones are always raised.

        Raises:
            DataProblems: with every problem up to `listed`.
        """
        if self.fatal and self.on_error == "skip":
            raise DataProblems(self.fatal[: self.listed], len(self.fatal))
        if self.total and self.on_error == "raise":
            raise DataProblems(self.problems, self.total, self.more)

"""What became of the rows: counts and names for the log, the record and the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from burnish.data.problems import Problem

NAMED = 5


@dataclass(slots=True)
class Named:
    """A count with the first rows that it counts."""

    count: int = 0
    rows: list[str] = field(default_factory=list)

    def add(self, row: str) -> None:
        """Count a row, and keep its name if it is among the first."""
        self.count += 1
        if len(self.rows) < NAMED:
            self.rows.append(row)


@dataclass(slots=True)
class SplitReport:
    """What became of the rows of one split.

    Attributes:
        rows_read: Rows parsed, malformed ones included.
        kept: Rows that are used.
        groups: Examples made of them (more, where each assistant turn is one of its own).
        malformed: Left out as malformed or by the rules of their format, with place and reason.
        over_length: Left out for their length.
        cut: Used, but truncated.
        lost_eos: Completions that lost their end token by a cut (0 unless the text had none to put back).
        made_equal: Pairs left out because the cut made both answers equal.
        identical: Pairs left out because both answers were equal.
        leaked: Held-out rows left out because their prompt is trained on.
        duplicates: Rows equal to an earlier one (used all the same).
        unused: Rows outside the slice, the sample or the mixture's share.
        flipped: Training rows whose label was turned round (`flip_share`), before the rules of length.
        apart: Rows whose prompt and answer would merge into one token, tokenised apart.
        without_eos: Completions that end in no end token.
        spelled: Rows whose messages spell a special token, which is then read as one.
        own_turns: Rows of which each assistant turn became an example of its own.
        prompt_tokens: Tokens of prompts (each once).
        completion_tokens: Tokens of completions.
        scored_tokens: Tokens that are trained on.
        sources: Examples by source.
        notes: Further words.
    """

    rows_read: int = 0
    kept: int = 0
    groups: int = 0
    malformed: Named = field(default_factory=Named)
    over_length: Named = field(default_factory=Named)
    cut: Named = field(default_factory=Named)
    lost_eos: int = 0
    made_equal: Named = field(default_factory=Named)
    identical: Named = field(default_factory=Named)
    leaked: Named = field(default_factory=Named)
    duplicates: Named = field(default_factory=Named)
    unused: int = 0
    flipped: Named = field(default_factory=Named)
    apart: Named = field(default_factory=Named)
    without_eos: Named = field(default_factory=Named)
    spelled: Named = field(default_factory=Named)
    own_turns: Named = field(default_factory=Named)
    prompt_tokens: int = 0
    completion_tokens: int = 0
    scored_tokens: int = 0
    sources: dict[str, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def refuse(self, problem: Problem) -> None:
        """Count a malformed row."""
        self.malformed.add(f"{problem.row} ({problem.message})")

    @property
    def tokens(self) -> int:
        """Tokens of prompts (each once) and completions."""
        return self.prompt_tokens + self.completion_tokens

    def lines(self) -> list[str]:
        """The report in words; counts of zero are left out."""
        made = f" ({self.groups:,} examples)" if self.groups != self.kept else ""
        tokens = f"; {self.tokens:,} tokens, {self.scored_tokens:,} scored" if self.tokens else ""
        lines = [f"{self.rows_read:,} rows read, {self.kept:,} kept{made}{tokens}"]
        for title, named in (
            ("malformed, left out", self.malformed),
            ("over the length limit, left out (truncation cuts instead)", self.over_length),
            ("cut to the length limit", self.cut),
            ("pairs made equal by the cut, left out", self.made_equal),
            ("identical pairs, left out", self.identical),
            ("held-out rows whose prompt is trained on, left out", self.leaked),
            ("duplicates (used)", self.duplicates),
            ("labels flipped on purpose (flip_share)", self.flipped),
            ("tokenised apart at the border of prompt and answer", self.apart),
            ("answers without an end token", self.without_eos),
            ("messages that spell a special token", self.spelled),
            ("split into one example for each assistant turn", self.own_turns),
        ):
            if named.count:
                more = ", …" if named.count > len(named.rows) else ""
                lines.append(f"{named.count:,} {title}: {', '.join(named.rows)}{more}")
        if self.lost_eos:
            lines.append(f"{self.lost_eos:,} answers lost their end token by the cut")
        if self.unused:
            lines.append(f"{self.unused:,} rows outside the slice, sample or mixture")
        if len(self.sources) > 1:
            lines.append("examples by source: " + ", ".join(f"{k} {v:,}" for k, v in self.sources.items()))
        return lines + self.notes


@dataclass(slots=True)
class DataReport:
    """The report of each split ("train", "held_out"), and where the held-out rows come from."""

    splits: dict[str, SplitReport] = field(default_factory=dict)
    held_out_from: str = ""
    notes: list[str] = field(default_factory=list)
    from_cache: bool = False

    def lines(self) -> list[str]:
        """The report in words, a line each."""
        out = [f"{name}: {line}" for name, split in self.splits.items() for line in split.lines()]
        if self.held_out_from:
            out.append(f"held_out: from {self.held_out_from}")
        if self.from_cache:
            out.append("tokenised data taken from the cache")
        return out + self.notes

    def to_json(self) -> dict[str, Any]:
        """The report as plain data."""
        return {
            "splits": {name: asdict(split) for name, split in self.splits.items()},
            "held_out_from": self.held_out_from,
            "notes": list(self.notes),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> DataReport:
        """The report that `to_json` gave."""
        splits: dict[str, SplitReport] = {}
        for name, values in data["splits"].items():
            named: dict[str, Any] = {
                k: Named(**v) if isinstance(v, dict) and set(v) == {"count", "rows"} else v for k, v in values.items()
            }
            splits[name] = SplitReport(**named)
        return cls(splits, data["held_out_from"], list(data["notes"]))

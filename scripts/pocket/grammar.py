"""A very small template grammar with held-out wordings.

A `Pool` holds the wordings of one phrase.  Wordings under `test` are used by the test split alone and those under
`train` by the train split alone; a pool without `test` wordings is shared (answers, for instance, keep one manner).
A `Draw` expands wordings for one split and notes the held-out-able ones it used, so that a test can check that no
wording is found on both sides.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar

Split = Literal["train", "test"]
T = TypeVar("T")

_A_BEFORE_VOWEL = re.compile(r"\b([Aa]) (?=[aeiou])")
_ALTERNATIVES = re.compile(r"\[([^\[\]]*)\]")

ALL_POOLS: dict[str, "Pool"] = {}


@dataclass(frozen=True)
class Pool:
    """The wordings of one phrase: `{slot}` is filled in, `[a|b]` is one of the alternatives."""

    name: str
    train: tuple[str, ...]
    test: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.name in ALL_POOLS:
            raise ValueError(f"two pools are called {self.name}")
        if set(self.train) & set(self.test):
            raise ValueError(f"pool {self.name} has a wording on both sides")
        ALL_POOLS[self.name] = self

    @property
    def shared(self) -> bool:
        """Whether both splits use the same wordings."""
        return not self.test

    def wordings(self, split: Split) -> tuple[str, ...]:
        """The wordings that `split` may use."""
        return self.test if split == "test" and self.test else self.train


@dataclass
class Draw:
    """A seeded source of choices for one row of one split."""

    rng: random.Random
    split: Split
    used: list[str] = field(default_factory=list)

    def choice(self, items: Sequence[T]) -> T:
        """One of `items`."""
        return items[self.rng.randrange(len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different ones of `items`."""
        return self.rng.sample(list(items), count)

    def chance(self, share: float) -> bool:
        """True with probability `share`."""
        return self.rng.random() < share

    def text(self, pool: Pool, **slots: object) -> str:
        """One wording of `pool`, expanded."""
        wordings = pool.wordings(self.split)
        index = self.rng.randrange(len(wordings))
        if not pool.shared:
            self.used.append(f"{pool.name}/{self.split}/{index}")
        return self.expand(wordings[index], **slots)

    def expand(self, wording: str, **slots: object) -> str:
        """Fill in the slots of `wording` and settle its alternatives."""
        while "[" in wording:
            wording = _ALTERNATIVES.sub(lambda match: self.choice(match.group(1).split("|")), wording)
        return upper_first(_A_BEFORE_VOWEL.sub(r"\1n ", wording.format_map(slots).strip()))


def upper_first(text: str) -> str:
    """`text` with a capital first letter."""
    return text[:1].upper() + text[1:]


def lower_first(text: str) -> str:
    """`text` with a small first letter."""
    return text[:1].lower() + text[1:]


def with_article(noun: str) -> str:
    """`noun` after "a" or "an"."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def join_words(words: Sequence[str]) -> str:
    """`a, b and c`."""
    return words[0] if len(words) == 1 else ", ".join(words[:-1]) + " and " + words[-1]

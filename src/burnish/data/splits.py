"""Which rows go where: slices and splits by prompt, seeded samples, mixtures. All are functions of hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


def unit_hash(text: str, salt: str) -> float:
    """A number in [0, 1) that depends on the text and the salt alone."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8, key=salt.encode()[:64]).digest()
    return int.from_bytes(digest, "big") / 2**64


def in_slice(key: str, share: float | None, offset: float) -> bool:
    """Whether a prompt belongs to the slice [offset, offset + share).

    The place of a prompt depends on its text alone, so that two stages (or two files) agree on it whatever their seeds.
    """
    if share is None:
        return True
    place = unit_hash(key, "slice")
    return offset <= place < offset + share or place < offset + share - 1


def split_rows(rows: Sequence[T], key: Callable[[T], str], share: float, seed: int) -> tuple[list[T], list[T]]:
    """Rows to train on and rows held out; all rows of a key go to the same side.

    Keys are taken in the order of a seeded hash until the held-out side has its share: at least one key if the share is
    not 0, and never the last key of the training side.
    """
    if share <= 0 or not rows:
        return list(rows), []
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[key(row)] = sizes.get(key(row), 0) + 1
    order = sorted(sizes, key=lambda k: (unit_hash(k, f"split:{seed}"), k))
    target, taken, held = max(1, round(share * len(rows))), 0, set()
    for name in order[:-1]:
        if taken >= target:
            break
        held.add(name)
        taken += sizes[name]
    return [r for r in rows if key(r) not in held], [r for r in rows if key(r) in held]


def sample_rows(rows: Sequence[T], name: Callable[[T], str], count: int | None, seed: int) -> list[T]:
    """A seeded sample of `count` rows in their own order; all of them if there are no more."""
    if count is None or count >= len(rows):
        return list(rows)
    order = sorted(range(len(rows)), key=lambda i: (unit_hash(name(rows[i]), f"sample:{seed}"), i))
    kept = sorted(order[:count])
    return [rows[i] for i in kept]


def mixture_sizes(sizes: Sequence[int], weights: Sequence[float] | None) -> list[int]:
    """How many rows of each source a mixture takes.

    Without weights all rows. With weights the sources stand in that proportion, as large as possible without
    repeating a row; every source that has rows keeps at least one.
    """
    if weights is None:
        return list(sizes)
    total = min((size / weight for size, weight in zip(sizes, weights) if size), default=0.0)
    return [min(size, max(1, round(total * weight))) if size else 0 for size, weight in zip(sizes, weights)]

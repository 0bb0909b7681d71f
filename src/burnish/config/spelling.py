"""The nearest valid spelling of a word that is not one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher


def suggest(word: str, candidates: Iterable[str], limit: int = 2) -> list[str]:
    """Up to `limit` candidates that `word` may have meant, the likeliest first; empty if none is near."""
    wanted = normalise_spelling(word)
    scored = []
    for candidate in dict.fromkeys(candidates):
        other = normalise_spelling(candidate)
        distance = compute_edit_distance(wanted, other)
        ratio = SequenceMatcher(None, wanted, other, autojunk=False).ratio()
        contained = len(wanted) >= 4 and (wanted in other or other in wanted) and len(other) >= 4
        if distance <= max(1, len(wanted) // 4) or ratio >= 0.72 or contained:
            scored.append((distance - ratio, candidate))
    return [candidate for _, candidate in sorted(scored)[:limit]]


def describe_suggestions(words: Iterable[str]) -> str:
    """ "did you mean a or b?", or an empty text without words."""
    words = list(words)
    return f"did you mean {' or '.join(words)}?" if words else ""


def normalise_spelling(word: str) -> str:
    """Lower case, one kind of separator."""
    return word.strip().lower().replace("-", "_").replace(" ", "_")


def compute_edit_distance(a: str, b: str) -> int:
    """Insertions, deletions, substitutions and swaps of neighbours from `a` to `b` (optimal string alignment)."""
    before: list[int] = []
    previous = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        current = [i]
        for j, y in enumerate(b, 1):
            cost = min(previous[j] + 1, current[j - 1] + 1, previous[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and y == a[i - 2]:
                cost = min(cost, before[j - 2] + 1)
            current.append(cost)
        before, previous = previous, current
    return previous[-1]

"""What most methods are: one language model, a sum over groups, no state of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from burnish.core.group import Group
from burnish.core.logits import Functional
from burnish.engine.method import MethodState, Observer, Partners, Reads

LOGPROBS: Mapping[str, frozenset[str]] = {"policy": frozenset({"logprobs"})}


class BaseMethod:
    """Defaults of `engine.method.Method`; a method sets what differs, in its class or when it is built."""

    want: Mapping[str, frozenset[str]] = LOGPROBS
    functionals: tuple[Functional, ...] = ()
    reference: Reads = frozenset()
    coupled: bool = False
    state: MethodState | None = None
    partners: Partners | None = None
    observer: Observer | None = None

    def examine(self, groups: Sequence[Group]) -> list[str]:
        """Nothing is odd."""
        return []

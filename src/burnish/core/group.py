"""The one shape of training data: a prompt and its K completions (numpy only, no torch).

SFT has K = 1, preference pairs K = 2 (slot 0 = chosen, slot 1 = rejected), reward ranking K = n, on-policy stages K = G.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Completion:
    """One completion of a prompt.

    Attributes:
        ids: (n,) int32 token ids, n >= 1, the end-of-sequence token included where the text has one.
        mask: (n,) bool, True = this token is scored (trained on). Tool output and user turns are False.
        columns: Numbers that belong to the completion as a whole (label, reward, advantage …).
        token_columns: (n,) float32 arrays, one number a token (behaviour or reference log-probs …). Values at unscored
            tokens are never read.
    """

    ids: NDArray[np.int32]
    mask: NDArray[np.bool_]
    columns: Mapping[str, float] = field(default_factory=dict)
    token_columns: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)

    @property
    def scored(self) -> int:
        """The number of scored tokens."""
        return int(self.mask.sum())


@dataclass(frozen=True, slots=True)
class Group:
    """A prompt and its completions: one example of an optimizer step.

    Attributes:
        id: Stable name of the row ("file.jsonl:17"), unique within a data set; messages and ledgers use it.
        prompt: (p,) int32 token ids, p >= 1: the first completion token needs a predecessor to be predicted from.
        completions: K >= 1 completions; for pairs slot 0 is the chosen and slot 1 the rejected one.
        columns: Numbers of the whole group (margin, weight …); the same names in every group of a data set.
        tags: Words that never reach a loss ("source", "template" …); metrics are split by them.
    """

    id: str
    prompt: NDArray[np.int32]
    completions: tuple[Completion, ...]
    columns: Mapping[str, float] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens that a packed forward computes: the prompt once, each completion once."""
        return len(self.prompt) + sum(len(c.ids) for c in self.completions)

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + completion: what must fit the model's context."""
        return len(self.prompt) + max(len(c.ids) for c in self.completions)

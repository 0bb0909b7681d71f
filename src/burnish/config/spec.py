"""What a kind of stage is: declared once, in plain strings, so that listing kinds loads nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Head = Literal["lm", "score"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that a kind trains.

    Attributes:
        head: "lm": a language model; "score": a scalar a completion or a token.
        start: The setting that names the model it starts from; None, or where it is not set: the stage's own model.
        learning_rate: The setting with its own peak learning rate; None, or where it is not set: `learning_rate`.
    """

    head: Head = "lm"
    start: str | None = None
    learning_rate: str | None = None


POLICY = ModelSpec()

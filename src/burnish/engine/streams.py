"""Counter-based randomness: a draw depends on (seed, purpose, counters) alone; no generator state is ever saved."""

from __future__ import annotations

import hashlib
from typing import Literal

import numpy as np

Purpose = Literal["data", "init", "dropout", "sampling", "eval", "preview"]


def compute_seed(seed: int, purpose: Purpose, *counters: int) -> int:
    """A 63-bit seed for one purpose at one point of a run; different counters give unrelated seeds."""
    text = ":".join([str(seed), purpose, *map(str, counters)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def build_numpy_generator(seed: int, purpose: Purpose, *counters: int) -> np.random.Generator:
    """A numpy generator (Philox) for one purpose at one point of a run."""
    return np.random.Generator(np.random.Philox(compute_seed(seed, purpose, *counters)))

"""Our side of the benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workload import Pair, Plan


def run_burnish(plan: Plan, pairs: Sequence[Pair], folder: Path) -> dict[str, Any]:
    """Train once over `pairs` in their order; the same figures as `peer_trl.run_trl`."""
    raise NotImplementedError

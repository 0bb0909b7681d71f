"""The strategy of a stage."""

from __future__ import annotations

from burnish.engine.parallel.interface import Parallel
from burnish.engine.parallel.replicated import Replicated
from burnish.engine.parallel.single import Single
from burnish.engine.runtime import Runtime


def build_parallel(runtime: Runtime) -> Parallel:
    """One process, or equal copies on several."""
    return Single(runtime) if runtime.world == 1 else Replicated(runtime)

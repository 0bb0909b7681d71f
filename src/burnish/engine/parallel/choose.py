"""The strategy of a stage."""

from __future__ import annotations

import logging

from burnish.config.distributed import DistributedSettings
from burnish.engine.parallel.interface import Parallel
from burnish.engine.parallel.replicated import Replicated
from burnish.engine.parallel.single import Single
from burnish.engine.runtime import Runtime

log = logging.getLogger("burnish")


def build_parallel(
    runtime: Runtime, wish: DistributedSettings | None = None, *, deterministic: bool = False
) -> Parallel:
    """The strategy that the settings ask for; on one process there is only one.

    Args:
        wish: None or "auto": equal copies.
        deterministic: Sums over ranks have the same bits each time on a GPU too.
    """
    ordered = deterministic or runtime.device.type == "cpu"
    strategy = "auto" if wish is None else wish.strategy
    if runtime.world == 1:
        if strategy == "fsdp2":
            log.info("distributed.strategy is fsdp2, but this is one process: nothing is sharded")
        return Single(runtime)
    if wish is not None and strategy == "fsdp2":
        offload = wish.cpu_offload
        if offload and runtime.device.type == "cpu":
            log.info("distributed.cpu_offload: the parameters are on the CPU already")
            offload = False
        from burnish.engine.parallel.fsdp2 import Fsdp2  # a second of imports that other strategies need not pay

        return Fsdp2(runtime, ordered=ordered, reshard=wish.reshard_after_forward, offload=offload)
    return Replicated(runtime, ordered=ordered)

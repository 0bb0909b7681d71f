"""How several processes share a stage."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from burnish.config.base import Settings, setting

Strategy = Literal["auto", "replicated", "fsdp2"]


class DistributedSettings(Settings):
    """How the processes of a run share a stage; one process has nothing to share."""

    strategy: Strategy = setting(
        "auto",
        "replicated: each process holds everything; fsdp2: weights, gradients and moments in shards; auto = replicated.",
    )
    reshard_after_forward: bool = setting(
        True, "fsdp2: free a block's gathered weights until backward; off = keep them, faster, more memory."
    )
    cpu_offload: bool = setting(False, "fsdp2: keep the shards and the optimizer's state in the CPU's memory.")
    config: str | None = setting(
        None, "DeepSpeed's JSON or accelerate's YAML; its lines become settings where the recipe gives none."
    )


def find_contradictions(section: DistributedSettings, quantize: str, optim: str) -> Iterator[tuple[str, str, str]]:
    """Settings that contradict each other: (setting, what is wrong, what to do)."""
    if section.strategy != "fsdp2":
        remedy = "set distributed.strategy: fsdp2, or remove it"
        if not section.reshard_after_forward:
            yield "reshard_after_forward", f"is off, but strategy {section.strategy} shards no weights", remedy
        if section.cpu_offload:
            yield "cpu_offload", f"is on, but strategy {section.strategy} keeps everything on the device", remedy
        return
    if quantize != "none":
        yield (
            "strategy",
            f"is fsdp2, but quantize is {quantize}, and weights in few bits cannot be sharded",
            "set strategy: replicated (every process holds the small base), or quantize: none",
        )
    if optim == "adamw_8bit":
        yield (
            "strategy",
            "is fsdp2, but optim is adamw_8bit, whose state cannot be sharded",
            "set optim: adamw, or strategy: replicated",
        )

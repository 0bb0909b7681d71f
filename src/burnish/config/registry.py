"""Which kinds of stages exist; plain strings, so that listing them loads nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of stage: its settings class and what runs it, both as "module:name"."""

    settings: str
    runner: str
    summary: str
    trains: bool = True


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for a kind with some settings fixed: `kind: ipo` means `{kind: dpo, loss_type: ipo}`."""

    kind: str
    fixed: dict[str, Any] = field(default_factory=dict)


KINDS: dict[str, Kind] = {
    "sft": Kind("burnish.config.stages:SftSettings", "burnish.methods.sft:Sft", "supervised fine-tuning"),
    "reward": Kind("burnish.config.stages:RewardSettings", "burnish.methods.reward:Reward", "reward model from pairs"),
    "dpo": Kind("burnish.config.stages:DpoSettings", "burnish.methods.dpo:Dpo", "direct preference optimisation"),
    "evaluate": Kind(
        "burnish.config.stages:EvaluateSettings",
        "burnish.evals.evaluate:run_evaluation",
        "held-out figures",
        trains=False,
    ),
}

ALIASES: dict[str, Alias] = {
    "ipo": Alias("dpo", {"loss_type": "ipo"}),
    "hinge": Alias("dpo", {"loss_type": "hinge"}),
}

LOSS_TYPES: dict[str, str] = {
    "sigmoid": "burnish.losses.dpo:compute_sigmoid_loss",
    "hinge": "burnish.losses.dpo:compute_hinge_loss",
    "ipo": "burnish.losses.dpo:compute_ipo_loss",
}


def load_object(path: str) -> Any:
    """The object named by "module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)

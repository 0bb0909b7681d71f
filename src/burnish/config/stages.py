"""The settings class of each kind of stage."""

from __future__ import annotations

from typing import Literal

from burnish.config.base import Settings, setting
from burnish.config.train import TrainSettings


class SftSettings(TrainSettings):
    """Supervised fine-tuning on completions or conversations."""

    kind: Literal["sft"] = setting("sft", "Supervised fine-tuning.")
    learning_rate: float = setting(2e-5, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(False, "Switch all dropout off.")


class RewardSettings(TrainSettings):
    """A reward model from preference pairs (Bradley–Terry)."""

    kind: Literal["reward"] = setting("reward", "Reward model.")
    learning_rate: float = setting(1e-5, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    center_rewards_coefficient: float = setting(
        0.0, "Weight of mean (r_chosen + r_rejected)², which keeps scores around 0 (arXiv 2312.09244).", ge=0
    )
    head_init_std: float = setting(0.02, "Standard deviation of the new head's weights.", gt=0)


DpoLoss = Literal["sigmoid", "hinge", "ipo"]


class DpoSettings(TrainSettings):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives by `loss_type`."""

    kind: Literal["dpo"] = setting("dpo", "Preference optimisation.")
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    loss_type: str | list[str] = setting(
        "sigmoid", "sigmoid, hinge, ipo, or module:function; a list is mixed by loss_weights."
    )
    loss_weights: list[float] | None = setting(None, "Weight of each loss type of a list; default 1 each.")
    beta: float = setting(0.1, "Strength of the pull towards the reference.", gt=0)
    label_smoothing: float = setting(0.0, "sigmoid: share of labels taken as flipped (cDPO).", ge=0, lt=0.5)
    reference: str = setting(
        "same", "Reference model: same (the policy as this stage received it), or a folder or hub id."
    )
    reference_mode: Literal["auto", "cached", "copy", "adapter"] = setting(
        "auto", "How the reference is kept: log-probs cached on disk, a frozen copy, or the base under a fresh adapter."
    )


class EvaluateSettings(Settings):
    """Measure results on held-out data."""

    kind: Literal["evaluate"] = setting("evaluate", "Evaluation.")
    name: str | None = setting(None, "Name of the stage; default: evaluate.")
    of: list[str] = setting(
        [], "Stages to evaluate ('base' = the model before all stages); default: base and every policy."
    )
    model: str | None = setting(None, "Base model: bundled name, folder or hub id.")
    data: str | None = setting(
        None, "Source for held-out loss and preference accuracy; default: each stage's own held-out data."
    )
    tasks: list[str] = setting(
        ["loss", "preferences"], "loss, preferences, win_rate, or a checkable set such as pocket/maths."
    )
    judge: str | None = setting(
        None, "Reward stage that scores answers for win_rate; default: the recipe's reward stage."
    )
    max_items: int = setting(400, "Items per task at most.", ge=1)
    max_new_tokens: int = setting(128, "Tokens of a generated answer at most.", ge=1)
    samples: int = setting(6, "Sample answers shown side by side in the report.", ge=0)
    batch_size: int | None = setting(
        None, "Prompts generated together; default: as many as keep the key-value cache small, 256 at most.", ge=1
    )
    confidence: float = setting(0.95, "Coverage of the intervals.", gt=0, lt=1)
    seed: int = setting(42, "Seed of the choice of items and of the bootstrap.", ge=0)
    precision: Literal["auto", "fp32", "bf16", "fp16"] = setting("auto", "Compute type.")
    attention: Literal["auto", "sdpa", "flex", "padded"] = setting("auto", "Attention backend.")
    max_length: int | None = setting(None, "Tokens of prompt + completion at most.", ge=2)
    chat_template: str | None = setting(None, "Chat template: a file or a text.")

"""The settings class of each kind of stage."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import model_validator

from burnish.config.base import Settings, setting
from burnish.config.dynamic_beta import DynamicBetaSettings, MarginRecordSettings
from burnish.config.losses import fill_defaults
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


_MOVING = "Let β move while training; default: beta is constant."
_RECORDS = "Write the margins of each step to margins.jsonl; false = do not."


class ReferenceSettings(TrainSettings):
    """What stages with a reference model share."""

    reference: str = setting(
        "same", "Reference model: same (the policy as this stage received it), or a folder or hub id."
    )
    reference_mode: Literal["auto", "cached", "copy", "adapter"] = setting(
        "auto", "How the reference is kept: log-probs cached on disk, a frozen copy, or the base under a fresh adapter."
    )


class DpoSettings(ReferenceSettings):
    """Direct preference optimisation (arXiv 2305.18290) and its relatives by `loss_type`."""

    kind: Literal["dpo"] = setting("dpo", "Preference optimisation.")
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    loss_type: str | list[str] = setting(
        "sigmoid", "A loss of docs/methods/dpo.md (ipo, hinge …) or module:function; a list is mixed by loss_weights."
    )
    loss_weights: list[float] | None = setting(None, "Weight of each loss type of a list; default 1 each.")
    beta: float = setting(
        0.1,
        "Strength of the pull towards the reference; some loss types have a default of their own, of a list the first's.",
        gt=0,
    )
    dynamic_beta: DynamicBetaSettings | None = setting(None, _MOVING)
    margin_records: MarginRecordSettings | None = setting(MarginRecordSettings(), _RECORDS)
    label_smoothing: float = setting(
        0.0,
        "Share of labels taken as flipped (sigmoid: cDPO); default 0.1 with robust, 1e-3 with exo_pair.",
        ge=0,
        lt=0.5,
    )
    discopop_tau: float = setting(
        0.05, "discopop: width of the blend, on the scale of beta times the margin.", gt=0, lt=1
    )
    f_divergence_type: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = setting(
        "reverse_kl", "Divergence from the reference behind the implicit reward (arXiv 2309.16240)."
    )
    f_alpha_divergence_coef: float = setting(0.5, "alpha_divergence: its order; 1 is reverse_kl.", ge=0)
    ld_alpha: float | None = setting(
        None, "Weight of tokens beyond the shorter answer's length (LD-DPO, arXiv 2409.06411); null = 1.", ge=0, le=1
    )
    tdpo_alpha: float = setting(
        0.5, "tdpo2, radpo2: weight of the difference of sequential divergences (arXiv 2404.11999).", ge=0
    )
    radpo_confidence: float = setting(
        0.95, "radpo1, radpo2: share of the vocabulary, from the riskiest token on, that counts; 1 is tdpo.", gt=0, le=1
    )
    epsilon: float = setting(
        0.01, "epsilon: how far logits are moved away from the reference and towards it (arXiv 2502.13177).", ge=0, lt=1
    )
    use_weighting: bool = setting(
        False, "Weigh each pair by how likely the policy is to write it (WPO, arXiv 2406.11827)."
    )
    reward_model: str | None = setting(
        None,
        "Weigh each pair by the margin of its scores under this reward model (MADPO, arXiv 2510.05342): "
        "an earlier reward stage, a folder or hub id with the policy's tokenizer.",
    )
    madpo_c_max: float = setting(2.0, "reward_model: coefficient of the hardest pairs.", gt=1)
    madpo_c_min: float | None = setting(
        None, "reward_model: coefficient of the easiest pairs; default 1 / madpo_c_max.", gt=0, lt=1
    )
    madpo_lambda: float = setting(
        1.0, "reward_model: how fast the coefficient falls as the reward model's margin grows.", gt=0
    )
    madpo_tau: float = setting(
        6.906754778648554, "reward_model: margin at which a pair weighs 1; ln(0.999/0.001).", gt=0
    )

    @model_validator(mode="before")
    @classmethod
    def _fill(cls, values: Any) -> Any:
        return fill_defaults("dpo", values)


class KtoSettings(ReferenceSettings):
    """Kahneman–Tversky optimisation (arXiv 2402.01306): rows that are good or bad, without pairs."""

    kind: Literal["kto"] = setting("kto", "Preference optimisation from rows with a label.")
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    loss_type: Literal["kto", "apo_zero_unpaired"] = setting(
        "kto", "kto, or apo_zero_unpaired: without the KL baseline (arXiv 2408.06266)."
    )
    beta: float = setting(0.1, "Strength of the pull towards the reference.", gt=0)
    desirable_weight: float = setting(1.0, "Weight λ_D of rows whose label is true.", ge=0)
    undesirable_weight: float = setting(1.0, "Weight λ_U of rows whose label is false.", ge=0)


class DistillSettings(TrainSettings):
    """Supervised distillation: the student matches a teacher's distribution at each scored token."""

    kind: Literal["distill"] = setting("distill", "Distillation.")
    learning_rate: float = setting(2e-5, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(False, "Switch all dropout off.")
    teacher: str | None = setting(
        None, "Teacher: an earlier stage, a bundled model, a folder or hub id; same vocabulary."
    )
    loss_type: Literal["forward_kl", "reverse_kl", "jsd"] = setting(
        "forward_kl", "Divergence: KL(teacher ‖ student), KL(student ‖ teacher), or generalised Jensen–Shannon."
    )
    jsd_beta: float = setting(0.5, "jsd: share of the teacher in the mixture (arXiv 2306.13649).", gt=0, lt=1)
    alpha: float = setting(1.0, "Weight of the divergence; 1 - alpha is that of the data's cross-entropy.", gt=0, le=1)
    temperature: float = setting(
        1.0, "Divides both models' logits in the divergence, which is scaled by its square.", gt=0
    )


class CpoSettings(TrainSettings):
    """Contrastive preference optimisation (arXiv 2401.08417): pairs without a reference model, plus the chosen answer's NLL."""

    kind: Literal["cpo"] = setting("cpo", "Contrastive preference optimisation.")
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    loss_type: str | list[str] = setting(
        "sigmoid", "sigmoid, hinge, ipo, or module:function; a list is mixed by loss_weights."
    )
    loss_weights: list[float] | None = setting(None, "Weight of each loss type of a list; default 1 each.")
    beta: float = setting(0.1, "Scale of the margin of log-probs.", gt=0)
    dynamic_beta: DynamicBetaSettings | None = setting(None, _MOVING)
    margin_records: MarginRecordSettings | None = setting(MarginRecordSettings(), _RECORDS)
    label_smoothing: float = setting(0.0, "sigmoid: share of labels taken as flipped.", ge=0, lt=0.5)
    cpo_alpha: float = setting(1.0, "Weight of the chosen answers' mean negative log-likelihood a token.", ge=0)


class SimpoSettings(TrainSettings):
    """Simple preference optimisation (arXiv 2405.14734): mean log-probs with a target margin, without a reference model."""

    kind: Literal["simpo"] = setting("simpo", "Simple preference optimisation.")
    learning_rate: float = setting(1e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    beta: float = setting(2.0, "Scale of the mean log-prob a token.", gt=0)
    dynamic_beta: DynamicBetaSettings | None = setting(None, _MOVING)
    margin_records: MarginRecordSettings | None = setting(MarginRecordSettings(), _RECORDS)
    simpo_gamma: float = setting(
        1.0, "Margin that a pair should reach, on the scale of beta times the log-probs.", ge=0
    )
    label_smoothing: float = setting(0.0, "Share of labels taken as flipped.", ge=0, lt=0.5)
    cpo_alpha: float = setting(
        0.0,
        "Weight of the chosen answers' mean negative log-likelihood a token (CPO-SimPO); 0 = the paper's loss.",
        ge=0,
    )


class OrpoSettings(TrainSettings):
    """Odds-ratio preference optimisation (arXiv 2403.07691): NLL of the chosen answer plus a log odds ratio."""

    kind: Literal["orpo"] = setting("orpo", "Odds-ratio preference optimisation.")
    learning_rate: float = setting(8e-6, "Peak learning rate.", gt=0)
    disable_dropout: bool = setting(True, "Switch all dropout off.")
    beta: float = setting(0.1, "Weight of the odds-ratio term: the paper's lambda.", gt=0)
    dynamic_beta: DynamicBetaSettings | None = setting(None, _MOVING)
    margin_records: MarginRecordSettings | None = setting(MarginRecordSettings(), _RECORDS)


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
    attention: Literal["auto", "varlen", "flex", "sdpa", "padded"] = setting("auto", "Attention backend.")
    max_length: int | None = setting(None, "Tokens of prompt + completion at most.", ge=2)
    chat_template: str | None = setting(None, "Chat template: a file or a text.")

"""Which kinds of stages exist; plain strings, so that listing them loads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal

from burnish.config.spec import POLICY, ModelSpec


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of stage: its settings class and what runs it, both as "module:name".

    Attributes:
        trains: It trains models, by the method that `runner` names.
        models: Name → model that it trains; the first is the stage's result, further ones lie beside it.
        source: "module:function" that builds the stage's source of examples; None: the data, permuted in each epoch.
        best_metric: (name, greater is better) by default for the best checkpoint.
    """

    settings: str
    runner: str
    summary: str
    trains: bool = True
    models: Mapping[str, ModelSpec] = field(default_factory=lambda: {"policy": POLICY})
    source: str | None = None
    best_metric: tuple[str, bool] = ("eval_loss", False)


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name for a kind with some settings fixed: `kind: ipo` means `{kind: dpo, loss_type: ipo}`.

    Attributes:
        requires: Settings, off by default, that must be given with it.
    """

    kind: str
    fixed: dict[str, Any] = field(default_factory=dict)
    requires: tuple[str, ...] = ()

    def describe(self) -> str:
        """What it adds to its kind, for people: "loss_type: ipo", "a reward_model"."""
        values = {k: f"[{', '.join(v)}]" if isinstance(v, list) else v for k, v in self.fixed.items()}
        return ", ".join(
            [*(f"{key}: {value}" for key, value in values.items()), *(f"a {name}" for name in self.requires)]
        )


@dataclass(frozen=True, slots=True)
class LossEntry:
    """A loss type of a kind.

    Attributes:
        function: "module:name" of `f(pairs, *, settings…) -> PairLoss`.
        settings: Settings of the stage that it reads; they are passed by name.
        coupled: It needs the whole optimizer step at once: it sorts, or moves a statistic before it uses it.
        state: "module:name" of its running state (`initial()`, `advance(pairs, state, …)`), or None. The function gets it as
            `state`, and, if it is coupled too, `evaluating`: a state that it moves itself then stands still.
        aligned: Its number g belongs to pair g; False where it sorts, so that weights of single pairs have no meaning.
        unit: What its sum is divided by: pairs, or scored tokens of the chosen completions.
        defaults: Settings whose default is another with this loss, from its paper.
        positive: Settings that must not be 0 with it.
        functionals: "module:name" of `build(settings) -> tuple[Functional, …]`: what it reads of the distribution over the
            vocabulary; the function finds the sums over an answer's tokens in `pairs.sums`.
        live: It reads the reference's distribution, so the reference model runs in each step.
    """

    function: str
    settings: tuple[str, ...] = ()
    coupled: bool = False
    state: str | None = None
    aligned: bool = True
    unit: Literal["pair", "token"] = "pair"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    functionals: str | None = None
    live: bool = False


KINDS: dict[str, Kind] = {
    "sft": Kind("burnish.config.stages:SftSettings", "burnish.methods.sft:Sft", "supervised fine-tuning"),
    "reward": Kind(
        "burnish.config.stages:RewardSettings",
        "burnish.methods.reward:Reward",
        "reward model from pairs",
        models={"policy": ModelSpec(head="score")},
    ),
    "dpo": Kind("burnish.config.stages:DpoSettings", "burnish.methods.dpo:Dpo", "direct preference optimisation"),
    "cpo": Kind("burnish.config.stages:CpoSettings", "burnish.methods.cpo:Cpo", "contrastive preference optimisation"),
    "simpo": Kind(
        "burnish.config.stages:SimpoSettings", "burnish.methods.simpo:Simpo", "simple preference optimisation"
    ),
    "orpo": Kind(
        "burnish.config.stages:OrpoSettings", "burnish.methods.orpo:Orpo", "odds-ratio preference optimisation"
    ),
    "distill": Kind(
        "burnish.config.stages:DistillSettings", "burnish.methods.distill:Distill", "distillation from a teacher"
    ),
    "kto": Kind("burnish.config.stages:KtoSettings", "burnish.methods.kto:Kto", "preference optimisation from labels"),
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
    "robust": Alias("dpo", {"loss_type": "robust"}),
    "exo": Alias("dpo", {"loss_type": "exo_pair"}),
    "nca": Alias("dpo", {"loss_type": "nca_pair"}),
    "bco": Alias("dpo", {"loss_type": "bco_pair"}),
    "sppo": Alias("dpo", {"loss_type": "sppo_hard"}),
    "aot": Alias("dpo", {"loss_type": "aot"}),
    "apo-zero": Alias("dpo", {"loss_type": "apo_zero"}),
    "apo-down": Alias("dpo", {"loss_type": "apo_down"}),
    "discopop": Alias("dpo", {"loss_type": "discopop"}),
    "tdpo": Alias("dpo", {"loss_type": "tdpo2"}),
    "radpo": Alias("dpo", {"loss_type": "radpo2"}),
    "epsilon-dpo": Alias("dpo", {"loss_type": "epsilon"}),
    "rpo": Alias("dpo", {"loss_type": ["sigmoid", "sft"]}),
    "madpo": Alias("dpo", requires=("reward_model",)),
}

# Settings that are mappings of settings of their own.
SECTIONS: dict[str, str] = {
    "lora": "burnish.config.train:LoraSettings",
    "dynamic_beta": "burnish.config.dynamic_beta:DynamicBetaSettings",
    "margin_records": "burnish.config.dynamic_beta:MarginRecordSettings",
}

CONTROLLERS: dict[str, str] = {
    "constant": "burnish.losses.controllers:Constant",
    "linear": "burnish.losses.controllers:Linear",
    "cosine": "burnish.losses.controllers:Cosine",
    "risk": "burnish.losses.risk:Risk",
    "beta_dpo": "burnish.losses.beta_dpo:BetaDpo",
}

DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")

LOSS_TYPES: dict[str, dict[str, LossEntry]] = {
    "dpo": {
        "sigmoid": LossEntry(
            "burnish.losses.dpo:compute_sigmoid_loss",
            ("beta", "label_smoothing", *DIVERGENCE),
        ),
        "robust": LossEntry(
            "burnish.losses.dpo:compute_robust_loss",
            ("beta", "label_smoothing", *DIVERGENCE),
            defaults={"beta": 0.01, "label_smoothing": 0.1},
            positive=("label_smoothing",),
        ),
        "hinge": LossEntry("burnish.losses.dpo:compute_hinge_loss", ("beta", *DIVERGENCE)),
        "ipo": LossEntry("burnish.losses.dpo:compute_ipo_loss", ("beta", *DIVERGENCE)),
        "sigmoid_norm": LossEntry(
            "burnish.losses.dpo:compute_sigmoid_norm_loss",
            ("beta", "label_smoothing", *DIVERGENCE),
            defaults={"beta": 5.0},
        ),
        "exo_pair": LossEntry(
            "burnish.losses.dpo:compute_exo_pair_loss",
            ("beta", "label_smoothing", *DIVERGENCE),
            defaults={"label_smoothing": 1e-3},
            positive=("label_smoothing",),
        ),
        "discopop": LossEntry(
            "burnish.losses.dpo:compute_discopop_loss",
            ("beta", "discopop_tau", *DIVERGENCE),
            defaults={"beta": 0.05},
        ),
        "nca_pair": LossEntry("burnish.losses.anchored:compute_nca_pair_loss", ("beta",), defaults={"beta": 0.01}),
        "bco_pair": LossEntry(
            "burnish.losses.anchored:compute_bco_pair_loss",
            ("beta",),
            coupled=True,
            state="burnish.losses.anchored:RewardShift",
            defaults={"beta": 0.01},
        ),
        "sppo_hard": LossEntry("burnish.losses.anchored:compute_sppo_hard_loss", ("beta",), defaults={"beta": 1e-3}),
        "apo_zero": LossEntry("burnish.losses.anchored:compute_apo_zero_loss", ("beta",)),
        "apo_down": LossEntry("burnish.losses.anchored:compute_apo_down_loss", ("beta",)),
        "aot": LossEntry(
            "burnish.losses.aot:compute_aot_loss", ("beta", "label_smoothing"), coupled=True, aligned=False
        ),
        "aot_unpaired": LossEntry(
            "burnish.losses.aot:compute_aot_unpaired_loss", ("beta", "label_smoothing"), coupled=True, aligned=False
        ),
        "sft": LossEntry("burnish.losses.sft:compute_chosen_nll", unit="token"),
        "tdpo1": LossEntry(
            "burnish.losses.tdpo:compute_tdpo1_loss", ("beta",), functionals="burnish.losses.tdpo:build_tdpo", live=True
        ),
        "tdpo2": LossEntry(
            "burnish.losses.tdpo:compute_tdpo2_loss",
            ("beta", "tdpo_alpha"),
            functionals="burnish.losses.tdpo:build_tdpo",
            live=True,
        ),
        "radpo1": LossEntry(
            "burnish.losses.tdpo:compute_radpo1_loss",
            ("beta", "radpo_confidence"),
            functionals="burnish.losses.tdpo:build_radpo",
            live=True,
        ),
        "radpo2": LossEntry(
            "burnish.losses.tdpo:compute_radpo2_loss",
            ("beta", "radpo_confidence", "tdpo_alpha"),
            functionals="burnish.losses.tdpo:build_radpo",
            live=True,
        ),
        "epsilon": LossEntry(
            "burnish.losses.epsilon:compute_epsilon_loss",
            ("beta", "epsilon"),
            state="burnish.losses.epsilon:RunningBeta",
            defaults={"beta": 0.01},
            functionals="burnish.losses.epsilon:build_epsilon",
            live=True,
        ),
    },
    "cpo": {
        "sigmoid": LossEntry("burnish.losses.cpo:compute_cpo_sigmoid_loss", ("beta", "label_smoothing")),
        "hinge": LossEntry("burnish.losses.cpo:compute_cpo_hinge_loss", ("beta",)),
        "ipo": LossEntry("burnish.losses.cpo:compute_cpo_ipo_loss", ("beta",)),
    },
    "simpo": {"simpo": LossEntry("burnish.losses.cpo:compute_simpo_loss", ("beta", "simpo_gamma", "label_smoothing"))},
    "orpo": {"orpo": LossEntry("burnish.losses.orpo:compute_odds_ratio_loss", ("beta",))},
}


def load_object(path: str) -> Any:
    """The object named by "module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)

"""The loss types of the built-in kinds."""

from __future__ import annotations

from burnish.config.spec import LossEntry

DIVERGENCE = ("f_divergence_type", "f_alpha_divergence_coef")
DIVERGENCES = ("divergence/chosen", "divergence/rejected")

DPO: dict[str, LossEntry] = {
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
    "aot": LossEntry("burnish.losses.aot:compute_aot_loss", ("beta", "label_smoothing"), coupled=True, aligned=False),
    "aot_unpaired": LossEntry(
        "burnish.losses.aot:compute_aot_unpaired_loss", ("beta", "label_smoothing"), coupled=True, aligned=False
    ),
    "sft": LossEntry("burnish.losses.sft:compute_chosen_nll", unit="token"),
    "tdpo1": LossEntry(
        "burnish.losses.tdpo:compute_tdpo1_loss",
        ("beta",),
        functionals="burnish.losses.tdpo:build_tdpo",
        live=True,
        metrics=DIVERGENCES,
    ),
    "tdpo2": LossEntry(
        "burnish.losses.tdpo:compute_tdpo2_loss",
        ("beta", "tdpo_alpha"),
        functionals="burnish.losses.tdpo:build_tdpo",
        live=True,
        metrics=DIVERGENCES,
    ),
    "radpo1": LossEntry(
        "burnish.losses.tdpo:compute_radpo1_loss",
        ("beta", "radpo_confidence"),
        functionals="burnish.losses.tdpo:build_radpo",
        live=True,
        metrics=DIVERGENCES,
    ),
    "radpo2": LossEntry(
        "burnish.losses.tdpo:compute_radpo2_loss",
        ("beta", "radpo_confidence", "tdpo_alpha"),
        functionals="burnish.losses.tdpo:build_radpo",
        live=True,
        metrics=DIVERGENCES,
    ),
    "epsilon": LossEntry(
        "burnish.losses.epsilon:compute_epsilon_loss",
        ("beta", "epsilon"),
        state="burnish.losses.epsilon:RunningBeta",
        defaults={"beta": 0.01},
        functionals="burnish.losses.epsilon:build_epsilon",
        live=True,
        metrics=("beta", "epsilon_steps"),
    ),
}

CPO: dict[str, LossEntry] = {
    "sigmoid": LossEntry("burnish.losses.cpo:compute_cpo_sigmoid_loss", ("beta", "label_smoothing")),
    "hinge": LossEntry("burnish.losses.cpo:compute_cpo_hinge_loss", ("beta",)),
    "ipo": LossEntry("burnish.losses.cpo:compute_cpo_ipo_loss", ("beta",)),
}

SIMPO: dict[str, LossEntry] = {
    "simpo": LossEntry("burnish.losses.cpo:compute_simpo_loss", ("beta", "simpo_gamma", "label_smoothing"))
}

ORPO: dict[str, LossEntry] = {"orpo": LossEntry("burnish.losses.orpo:compute_odds_ratio_loss", ("beta",))}

# Losses on single rows; their functions are those of the kind, not `f(pairs, …)`.
_KTO_SETTINGS = ("beta", "desirable_weight", "undesirable_weight")
KTO: dict[str, LossEntry] = {
    "kto": LossEntry("burnish.losses.kto:compute_kto_loss", _KTO_SETTINGS, coupled=True, metrics=("kl",)),
    "apo_zero_unpaired": LossEntry("burnish.losses.kto:compute_apo_zero_unpaired_loss", _KTO_SETTINGS),
}

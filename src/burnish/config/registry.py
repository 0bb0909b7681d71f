"""Which kinds of stages exist; plain strings, so that listing them loads nothing."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from burnish.config import loss_types
from burnish.config.spec import LossEntry, MethodSpec, ModelSpec, StageSpec
from burnish.errors import ConfigError


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


STAGES = "burnish.config.stages"
ANSWERS = ("logps/chosen", "logps/rejected", "rewards/chosen", "rewards/rejected")
PAIRS = (*ANSWERS, "rewards/margins", "rewards/accuracies", "rewards/ties")
STEPS_OF_PAIRS = ("margins/zero_share", "dpo/beta", "dpo/margin_mean", "dpo/loss", "risk", "beta_dpo")

_DECLARED: tuple[StageSpec, ...] = (
    MethodSpec(
        name="sft",
        settings=f"{STAGES}:SftSettings",
        runner="burnish.methods.sft:Sft",
        summary="supervised fine-tuning",
        rows="completion",
        trains_tokens=True,
    ),
    MethodSpec(
        name="reward",
        settings=f"{STAGES}:RewardSettings",
        runner="burnish.methods.reward:Reward",
        summary="reward model from pairs",
        rows="pair",
        models={"policy": ModelSpec(head="score")},
        columns=("margin",),
        metrics=("accuracy", "ties", "scores/chosen", "scores/rejected", "margin"),
    ),
    MethodSpec(
        name="dpo",
        settings=f"{STAGES}:DpoSettings",
        runner="burnish.methods.dpo:Dpo",
        summary="direct preference optimisation",
        rows="pair",
        reference="logprobs",
        loss_types=loss_types.DPO,
        model_settings={"reference": "lm", "reward_model": "score"},
        harmless=frozenset({"margin_records"}),
        metrics=(*PAIRS, "wpo_weights", "madpo_weights", "madpo_margins"),
        step_metrics=STEPS_OF_PAIRS,
    ),
    MethodSpec(
        name="cpo",
        settings=f"{STAGES}:CpoSettings",
        runner="burnish.methods.cpo:Cpo",
        summary="contrastive preference optimisation",
        rows="pair",
        loss_types=loss_types.CPO,
        harmless=frozenset({"margin_records"}),
        metrics=PAIRS,
        step_metrics=STEPS_OF_PAIRS,
    ),
    MethodSpec(
        name="simpo",
        settings=f"{STAGES}:SimpoSettings",
        runner="burnish.methods.simpo:Simpo",
        summary="simple preference optimisation",
        rows="pair",
        loss_types=loss_types.SIMPO,
        harmless=frozenset({"margin_records"}),
        metrics=PAIRS,
        step_metrics=STEPS_OF_PAIRS,
    ),
    MethodSpec(
        name="orpo",
        settings=f"{STAGES}:OrpoSettings",
        runner="burnish.methods.orpo:Orpo",
        summary="odds-ratio preference optimisation",
        rows="pair",
        loss_types=loss_types.ORPO,
        harmless=frozenset({"margin_records"}),
        metrics=PAIRS,
        step_metrics=STEPS_OF_PAIRS,
    ),
    MethodSpec(
        name="distill",
        settings=f"{STAGES}:DistillSettings",
        runner="burnish.methods.distill:Distill",
        summary="distillation from a teacher",
        rows="completion",
        reference="logits",
        trains_tokens=True,
        model_settings={"teacher": "lm"},
        required=("teacher",),
        metrics=("cross_entropy",),
    ),
    MethodSpec(
        name="kto",
        settings=f"{STAGES}:KtoSettings",
        runner="burnish.methods.kto:Kto",
        summary="preference optimisation from labels",
        rows="label",
        reference="logprobs",
        loss_types=loss_types.KTO,
        model_settings={"reference": "lm"},
        metrics=ANSWERS,
    ),
    StageSpec(
        name="evaluate",
        settings=f"{STAGES}:EvaluateSettings",
        runner="burnish.evals.evaluate:evaluate_subjects",
        summary="held-out figures",
    ),
)
KINDS: dict[str, StageSpec] = {spec.name: spec for spec in _DECLARED}
# Kind → its loss types, functions of pairs.
LOSS_TYPES: dict[str, Mapping[str, LossEntry]] = {
    spec.name: spec.loss_types
    for spec in _DECLARED
    if isinstance(spec, MethodSpec) and spec.rows == "pair" and spec.loss_types
}
_OWN: dict[str, MethodSpec] = {}  # "module:NAME" → kinds of a user's own, once a recipe has named them


def find_spec(kind: str) -> StageSpec:
    """What a kind is: a built-in one, or a user's own as "module:NAME".

    Raises:
        ConfigError: There is no such kind.
    """
    return KINDS[kind] if kind in KINDS else load_own_spec(kind)


def find_known(kind: str) -> StageSpec | None:
    """What a kind is, if that is known without importing anything: a record of somebody's run may name any module."""
    return KINDS.get(kind) or _OWN.get(kind)


def find_method_spec(kind: str) -> MethodSpec:
    """What a kind that trains is.

    Raises:
        ConfigError: There is no such kind, or it does not train.
    """
    spec = find_spec(kind)
    if not isinstance(spec, MethodSpec):
        raise ConfigError(f"kind {kind} trains nothing", where="kind", found=kind, remedy="name a kind that trains")
    return spec


def list_model_settings() -> list[str]:
    """Settings of any kind that may name a model or an earlier stage, beside `model` and `init_from`."""
    specs = [*KINDS.values(), *_OWN.values()]
    return list(dict.fromkeys(name for spec in specs if isinstance(spec, MethodSpec) for name in spec.model_settings))


def is_own_kind(word: str) -> bool:
    """Whether a word can only mean a kind of the user's own."""
    module, colon, name = word.partition(":")
    return bool(colon) and all(part.isidentifier() for part in module.split(".")) and name.isidentifier()


def load_own_spec(word: str) -> MethodSpec:
    """A user's own kind, "module:NAME"; the module is importable or lies in the current folder.

    Raises:
        ConfigError: There is no such module or name, or it is no MethodSpec.
    """
    if word in _OWN:
        return _OWN[word]
    if not is_own_kind(word):
        raise ConfigError(
            f"there is no kind {word!r}",
            where="kind",
            found=word,
            remedy=f"use one of {', '.join(KINDS)}, or module:NAME of a MethodSpec",
        )
    try:
        spec = load_user_object(word)
    except Exception as error:  # whatever a module of the user's does while it is imported
        raise ConfigError(
            f"kind {word!r} cannot be loaded: {error or type(error).__name__}",
            where="kind",
            remedy="name an importable module, or one in this folder, and the MethodSpec in it, as module:NAME",
        ) from error
    if not isinstance(spec, MethodSpec):
        raise ConfigError(
            f"kind {word!r} is a {type(spec).__name__}, not a MethodSpec",
            where="kind",
            remedy="declare it as burnish.config.spec.MethodSpec(name=…, settings=…, runner=…, summary=…, rows=…)",
        )
    if spec.name in KINDS or spec.name in ALIASES:
        raise ConfigError(
            f"kind {word!r} has the name of a built-in kind: {spec.name}", where="kind", remedy="give it another name"
        )
    _OWN[word] = spec
    return spec


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
    "distributed": "burnish.config.distributed:DistributedSettings",
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


def load_object(path: str) -> Any:
    """The object named by "module:name"."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def load_user_object(path: str) -> Any:
    """The object of "module:name"; a module that is not installed is looked for in the current folder.

    Raises:
        ImportError, AttributeError: There is no such module or name.
    """
    try:
        return load_object(path)
    except ModuleNotFoundError as error:
        here = str(Path.cwd())
        if error.name != path.partition(":")[0].partition(".")[0] or here in sys.path:
            raise
    sys.path.insert(0, here)
    try:
        return load_object(path)
    finally:
        sys.path.remove(here)

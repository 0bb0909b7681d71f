"""Settings of a β that moves while a stage trains, and of the record of its margins."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

from burnish.config.base import Settings, setting

BETA_FLOOR = 1e-3  # β-DPO never goes below; so in the official code
ZERO_MARGIN = 1e-5  # nats: a cached reference and the policy that it was taken from differ by less


class PairsUnit(Settings):
    """A unit of some consecutive pairs, in data order."""

    pairs: int = setting(..., "Pairs in a unit; the last unit of a step holds what is left.", ge=1)


class DynamicBetaSettings(Settings):
    """How β moves; β_0 is the stage's `beta`. A setting that the chosen type does not read is an error."""

    type: Literal["constant", "risk", "beta_dpo", "linear", "cosine"] = setting(
        "constant", "The controller: constant, risk, beta_dpo, or a schedule (linear, cosine)."
    )
    unit: Literal["step"] | PairsUnit | None = setting(
        None, "risk, beta_dpo: what β is constant over: step (default), or {pairs: N} consecutive pairs in data order."
    )
    estimator: Literal["window", "robbins_monro", "ema"] | None = setting(
        None, "risk: how the quantile τ is tracked; default window. ema is the original, biased for small units."
    )
    delta: float | None = setting(None, "risk: wanted share of margins above τ; default 0.1.", gt=0, lt=1)
    warmup: int | None = setting(None, "risk: units during which β stays β_0 and margins are pooled; default 30.", ge=0)
    gamma: float | None = setting(None, "risk: slope within tanh; default 2.", gt=0)
    alpha: float | None = setting(
        None,
        "risk: largest change of log β a unit, default 0.005. beta_dpo: slope of β over the margin, default 0.6.",
        ge=0,
    )
    beta_min: float | None = setting(None, "risk: β stays above this; default 0.", ge=0)
    beta_max: float | None = setting(None, "risk: β stays below this; default 2.", gt=0)
    ema_rate: float | None = setting(None, "risk, ema: weight of the newest unit's quantile; default 0.1.", gt=0, le=1)
    window: int | None = setting(
        None, "risk, window: margins of earlier units that τ is the quantile of; default 1024.", ge=2
    )
    step_size: float | None = setting(
        None, "risk, robbins_monro: step of τ, in running standard deviations of the margins; default 0.5.", gt=0
    )
    level: Literal["batch", "instance"] | None = setting(
        None, "beta_dpo: one β for the unit (default) or one for each pair."
    )
    margin: Literal["log_ratio", "implicit_reward"] | None = setting(
        None, "beta_dpo: M is the log-ratio difference (the official code; default), or β_0 times it (the paper)."
    )
    momentum: float | None = setting(
        None, "beta_dpo: weight of the past in the running moments; default 0.9.", ge=0, lt=1
    )
    keep: float | None = setting(
        None, "beta_dpo: share of a unit's pairs that is trained on; default 0.8, 1 = all.", gt=0, le=1
    )
    moments: Literal["first", "zero"] | None = setting(
        None, "beta_dpo: running moments start at the first unit's (default) or at 0, as in the official code."
    )
    beta_end: float | None = setting(None, "linear, cosine: β after `steps` updates.", gt=0)
    steps: int | None = setting(None, "linear, cosine: updates over which β moves; it stays at beta_end then.", ge=1)

    def resolve(self) -> dict[str, Any]:
        """The settings of the chosen type, with its defaults where nothing is given."""
        given = {name: getattr(self, name) for name in type(self).model_fields if name != "type"}
        known = READ_BY[self.type]
        return {name: known[name] if given[name] is None else given[name] for name in known}

    @property
    def unit_pairs(self) -> int | None:
        """Pairs in a unit; None: a unit is a step."""
        return self.unit.pairs if isinstance(self.unit, PairsUnit) else None

    @property
    def coupled(self) -> bool:
        """Whether β of a pair, or whether it is trained on, depends on other pairs of its step."""
        values = self.resolve()
        moves = self.type in ("risk", "beta_dpo") and values["alpha"] > 0
        filters = self.type == "beta_dpo" and values["keep"] < 1
        return filters or (moves and (self.type == "beta_dpo" or self.unit_pairs is not None))


REQUIRED: Any = object()
READ_BY: dict[str, dict[str, Any]] = {
    "constant": {},
    "risk": {
        "unit": "step",
        "estimator": "window",
        "delta": 0.1,
        "warmup": 30,
        "gamma": 2.0,
        "alpha": 0.005,
        "beta_min": 0.0,
        "beta_max": 2.0,
        "ema_rate": 0.1,
        "window": 1024,
        "step_size": 0.5,
    },
    "beta_dpo": {
        "unit": "step",
        "level": "batch",
        "margin": "log_ratio",
        "alpha": 0.6,
        "momentum": 0.9,
        "keep": 0.8,
        "moments": "first",
    },
    "linear": {"beta_end": REQUIRED, "steps": REQUIRED},
    "cosine": {"beta_end": REQUIRED, "steps": REQUIRED},
}
OF_ESTIMATOR = {"ema_rate": "ema", "window": "window", "step_size": "robbins_monro"}


class MarginRecordSettings(Settings):
    """What is kept of each step's margins, in margins.jsonl."""

    sample: int = setting(16, "Margins written out in each record, the first of the step.", ge=0)
    vectors: bool = setting(False, "Keep all margins of each step, as margins/step-N.npy.")


def find_contradictions(s: DynamicBetaSettings, beta: float) -> Iterator[tuple[str, str, str]]:
    """(setting, what is wrong, what to do) for each contradiction within the section, and with β_0."""
    readers: dict[str, list[str]] = {}
    for kind, names in READ_BY.items():
        for name in names:
            readers.setdefault(name, []).append(kind)
    for name, kinds in readers.items():
        if getattr(s, name) is not None and s.type not in kinds:
            yield name, f"has no effect with type {s.type}", f"set type: {' or '.join(kinds)}, or remove it"
    if s.type == "risk":
        yield from _check_risk(s, beta)
    for name, default in READ_BY[s.type].items():
        if default is REQUIRED and getattr(s, name) is None:
            yield (
                name,
                f"is missing, and type {s.type} needs it",
                f"add {name}: {type(s).model_fields[name].description}",
            )
    if s.type == "beta_dpo":
        if beta < BETA_FLOOR:
            yield "type", f"is beta_dpo, whose β never goes below {BETA_FLOOR:g}, but beta is {beta:g}", "raise beta"
        if s.unit_pairs == 1:
            yield "unit", "is 1 pair, which has no spread to measure", "set unit: step, or {pairs: 8} or more"


def _check_risk(s: DynamicBetaSettings, beta: float) -> Iterator[tuple[str, str, str]]:
    values = s.resolve()
    for name, estimator in OF_ESTIMATOR.items():
        if getattr(s, name) is not None and values["estimator"] != estimator:
            yield (
                name,
                f"has no effect with estimator {values['estimator']}",
                f"set estimator: {estimator}, or remove it",
            )
    low, high = values["beta_min"], values["beta_max"]
    if not low <= beta <= high:
        name = "beta_min" if beta < low else "beta_max"
        yield name, f"is {values[name]:g}, which beta {beta:g} is beyond", f"β must lie within [{low:g}, {high:g}]"

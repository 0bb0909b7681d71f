"""From the names in `loss_type` to functions, their weights and the settings each of them reads."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from burnish.config.registry import LOSS_TYPES, load_object
from burnish.errors import ConfigError
from burnish.losses.pairs import PairLoss, Pairs


@dataclass(frozen=True, slots=True)
class LossType:
    """One loss type of a mix.

    Attributes:
        name: Short name for metrics: the registry's, or the function's of `module:function`.
        function: `f(pairs, **settings) -> PairLoss`.
        settings: The settings it reads, by name.
        weight: Its factor in the total loss.
    """

    name: str
    function: Callable[..., PairLoss]
    settings: dict[str, Any]
    weight: float

    def compute(self, pairs: Pairs) -> PairLoss:
        """The loss of some pairs.

        Raises:
            ConfigError: The function did not return a PairLoss of the pairs' shape.
        """
        out = self.function(pairs, **self.settings)
        shape = pairs.chosen.shape
        if not isinstance(out, PairLoss) or any(
            getattr(out, f).shape != shape for f in ("loss", "chosen_reward", "rejected_reward")
        ):
            raise ConfigError(
                f"loss type {self.name} did not return one number a pair",
                where="loss_type",
                remedy=f"return PairLoss(loss, chosen_reward, rejected_reward), each of shape {tuple(shape)}",
            )
        return out


def load_loss_type(name: str) -> Callable[..., PairLoss]:
    """The function of a registered loss type or of `module:function`.

    Raises:
        ConfigError: There is no such loss type, module or function.
    """
    path = LOSS_TYPES.get(name, name)
    if ":" not in path:
        known = ", ".join(sorted(LOSS_TYPES))
        raise ConfigError(
            f"there is no loss type {name!r}", where="loss_type", remedy=f"use one of {known}, or module:function"
        )
    try:
        function = _import(path)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"loss type {name!r} cannot be loaded: {error}",
            where="loss_type",
            remedy="name an importable module and a function in it, as module:function",
        ) from error
    if not callable(function):
        raise ConfigError(
            f"loss type {name!r} is no function", where="loss_type", remedy="name a function: module:function"
        )
    return cast(Callable[..., PairLoss], function)


def _import(path: str) -> Any:
    """The object of "module:name"; a module that is not installed is looked for in the current folder."""
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


def build_mix(loss_type: str | Sequence[str], weights: Sequence[float] | None, settings: Any) -> tuple[LossType, ...]:
    """The loss types of a stage with their weights and settings.

    Args:
        loss_type: A name, or several that are added up.
        weights: One for each name; None = 1 each.
        settings: An object with an attribute for each setting that a loss type may read (beta, label_smoothing …).

    Raises:
        ConfigError: An unknown or doubled name, a wrong number of weights, a required setting that does not exist, or
            label smoothing beside loss types that all ignore it.
    """
    names = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    if not names:
        raise ConfigError("loss_type is an empty list", where="loss_type", remedy="name at least one loss type")
    short = [name.rpartition(":")[2] for name in names]
    if len(set(short)) != len(short):
        raise ConfigError(
            f"loss_type names a loss twice: {', '.join(short)}",
            where="loss_type",
            remedy="name each loss once and set its weight in loss_weights; functions need different names",
        )
    factors = [1.0] * len(names) if weights is None else list(weights)
    if len(factors) != len(names):
        raise ConfigError(
            f"{len(factors)} loss_weights for {len(names)} loss types",
            where="loss_weights",
            remedy="give one weight each",
        )
    found = tuple(_build(name, weight, settings) for name, weight in zip(names, factors, strict=True))
    if getattr(settings, "label_smoothing", 0.0) and not any("label_smoothing" in t.settings for t in found):
        raise ConfigError(
            f"label_smoothing is {settings.label_smoothing}, but {', '.join(names)} does not use it",
            where="label_smoothing",
            remedy="set label_smoothing to 0, or use loss_type sigmoid",
        )
    return found


def _build(name: str, weight: float, settings: Any) -> LossType:
    function = load_loss_type(name)
    values, missing = {}, []
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            continue
        if hasattr(settings, parameter.name):
            values[parameter.name] = getattr(settings, parameter.name)
        elif parameter.default is parameter.empty:
            missing.append(parameter.name)
    if missing:
        raise ConfigError(
            f"loss type {name!r} needs settings that do not exist: {', '.join(missing)}",
            where="loss_type",
            remedy="give these keyword parameters defaults, or name them like settings of the stage (beta …)",
        )
    return LossType(name.rpartition(":")[2], function, values, weight)

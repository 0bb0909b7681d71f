"""From the names in `loss_type` to functions, their weights and the settings each of them reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from burnish.config.losses import find_entry, find_unread, get_loss_names
from burnish.config.registry import find_method_spec, load_object, load_user_object
from burnish.config.spec import LossEntry
from burnish.core.logits import Functional
from burnish.errors import ConfigError
from burnish.losses.pairs import PairLoss, Pairs

_DECLARED = "burnish_settings"


@dataclass(frozen=True, slots=True)
class LossType:
    """One loss type of a mix.

    Attributes:
        name: Short name for metrics: the registry's, or the function's of `module:function`.
        function: `f(pairs, **settings) -> PairLoss`.
        settings: The settings it reads, by name.
        weight: Its factor in the total loss.
        entry: What the registry says of it.
    """

    name: str
    function: Callable[..., PairLoss]
    settings: dict[str, Any]
    weight: float
    entry: LossEntry

    def compute(
        self, pairs: Pairs, state: Mapping[str, Any] | None = None, *, evaluating: bool = False, **changed: Any
    ) -> PairLoss:
        """The loss of some pairs.

        Args:
            state: Its running state, if it has one.
            evaluating: Held-out pairs: a running state that the loss itself moves is read as it is.
            changed: Other values of settings that it reads (a `beta` of this step, or of each pair); others are ignored.

        Raises:
            ConfigError: The function takes other settings than it declares, or did not return a PairLoss of the pairs' shape.
        """
        arguments = self._arguments(state, changed)
        if self.entry.state and self.entry.coupled:
            arguments["evaluating"] = evaluating
        try:
            out = self.function(pairs, **arguments)
        except TypeError as error:
            if "keyword argument" not in str(error):
                raise
            raise ConfigError(
                f"loss type {self.name} cannot be called with {', '.join(arguments) or 'no settings'}: {error}",
                where="loss_type",
                remedy="declare the settings that the function takes with @reads (burnish.losses.mix)",
            ) from error
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

    def initial_state(self) -> dict[str, Any]:
        """Its running state before the first step."""
        return load_object(self.entry.state).initial() if self.entry.state else {}

    def next_state(self, pairs: Pairs, state: Mapping[str, Any], **changed: Any) -> dict[str, Any]:
        """Its running state after a step with these pairs; arguments as in `compute`."""
        if not self.entry.state:
            return {}
        return load_object(self.entry.state).advance(pairs, **self._arguments(state, changed))

    def _arguments(self, state: Mapping[str, Any] | None, changed: Mapping[str, Any]) -> dict[str, Any]:
        values = self.settings | {name: value for name, value in changed.items() if name in self.settings}
        return values | {"state": state or self.initial_state()} if self.entry.state else values


def load_loss_type(kind: str, name: str) -> Callable[..., PairLoss]:
    """The function of a registered loss type of a kind or of `module:function`.

    Raises:
        ConfigError: There is no such loss type, module or function.
    """
    path = find_entry(kind, name).function
    if ":" not in path:
        known = ", ".join(sorted(find_method_spec(kind).loss_types))
        raise ConfigError(
            f"there is no loss type {name!r}", where="loss_type", remedy=f"use one of {known}, or module:function"
        )
    try:
        function = load_user_object(path)
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


def build_mix(
    kind: str, loss_type: str | Sequence[str], weights: Sequence[float] | None, settings: Any
) -> tuple[LossType, ...]:
    """The loss types of a stage with their weights and settings.

    Args:
        kind: The kind of stage, whose loss types these are.
        loss_type: A name, or several that are added up.
        weights: One for each name; None = 1 each.
        settings: The stage's settings, with a field for each that a loss type may read (beta, label_smoothing …).

    Raises:
        ConfigError: An unknown or doubled name, a wrong number of weights, a required setting that does not exist, or a
            changed setting of the family that none of these loss types reads.
    """
    names = get_loss_names(loss_type)
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
    found = tuple(build_loss_type(kind, n, w, settings) for n, w in zip(names, factors, strict=True))
    unread = find_unread(settings, kind, dict(zip(names, (loss.entry for loss in found), strict=True)))
    for name, default in unread.items():
        raise ConfigError(
            f"{name} is {getattr(settings, name)}, but {', '.join(names)} does not use it",
            where=name,
            remedy=f"remove it (default {default}), or use a loss type that reads it",
        )
    return found


def collect_functionals(mix: Sequence[LossType], settings: Any) -> tuple[Functional, ...]:
    """What the loss types of a mix read of the distribution over the vocabulary, each once."""
    found: dict[str, Functional] = {}
    for entry in (loss.entry for loss in mix):
        for functional in load_object(entry.functionals)(settings) if entry.functionals else ():
            found.setdefault(functional.name, functional)
    return tuple(found.values())


def reads(*settings: str) -> Callable[[Callable[..., PairLoss]], Callable[..., PairLoss]]:
    """Declares which settings of the stage a loss function of your own gets by name; without it, it gets `beta`.

    Example:
        >>> @reads("beta", "label_smoothing")
        ... def my_loss(pairs, *, beta, label_smoothing): ...
    """

    def declare(function: Callable[..., PairLoss]) -> Callable[..., PairLoss]:
        setattr(function, _DECLARED, settings)
        return function

    return declare


def build_loss_type(kind: str, name: str, weight: float, settings: Any) -> LossType:
    """One loss type with the settings that it reads.

    Raises:
        ConfigError: It does not exist, or a setting that it declares does not.
    """
    entry, function = find_entry(kind, name), load_loss_type(kind, name)
    entry = replace(entry, settings=getattr(function, _DECLARED, entry.settings))
    missing = [setting for setting in entry.settings if not hasattr(settings, setting)]
    if missing:
        raise ConfigError(
            f"loss type {name!r} needs settings that do not exist: {', '.join(missing)}",
            where="loss_type",
            remedy="declare settings of the stage (beta …) with @reads, and give other parameters defaults",
        )
    values = {setting: getattr(settings, setting) for setting in entry.settings}
    return LossType(name.rpartition(":")[2], function, values, weight, entry)

"""Settings that contradict each other, said where a model is built without a recipe as well."""

from __future__ import annotations

from burnish.config.train import LoraSettings, TrainSettings
from burnish.errors import ConfigError


def check_settings(s: TrainSettings) -> None:
    """What of a model is to train, in contradiction.

    Raises:
        ConfigError: Naming the setting.
    """
    if s.lora is not None and s.top_k:
        raise ConfigError(
            f"lora and top_k: {s.top_k} contradict each other", where="top_k", remedy="remove one of the two"
        )
    if s.lora is not None and s.untie_embeddings:
        raise ConfigError(
            "untie_embeddings does nothing for an adapter", where="untie_embeddings", remedy="remove it, or remove lora"
        )
    if s.lora is None and s.quantize != "none":
        raise ConfigError(
            f"quantize: {s.quantize} freezes the base, but nothing is trained on top of it",
            where="quantize",
            found=s.quantize,
            remedy="add lora: {}, or set quantize: none",
        )
    if s.lora is not None and s.lora.dropout and getattr(s, "disable_dropout", False):
        raise ConfigError(
            f"lora.dropout is {s.lora.dropout}, but disable_dropout is on",
            where="lora.dropout",
            found=s.lora.dropout,
            remedy="set lora.dropout: 0, or disable_dropout: false",
        )


def check_joinable(lora: LoraSettings, *, quantised: bool, merged: bool) -> None:
    """Over a quantised base an earlier adapter and the new one are written as one (`adapters.save_adapter`).

    Raises:
        ConfigError: The new one is of a kind that cannot be joined.
    """
    if quantised and merged and (lora.use_dora or lora.bias != "none"):
        what = "use_dora" if lora.use_dora else f"bias {lora.bias}"
        raise ConfigError(
            f"{what} over an earlier adapter on a quantised base cannot be written as one adapter",
            where="lora",
            found=what,
            remedy="leave it out, or fold the earlier adapter in first (burnish merge)",
        )

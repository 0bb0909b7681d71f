"""What a stage's settings imply, from what its kind and its loss types declare; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from burnish.config.losses import find_entry, get_loss_names
from burnish.config.registry import find_method_spec
from burnish.config.spec import LossEntry
from burnish.config.train import TrainSettings


@dataclass(frozen=True, slots=True)
class Needs:
    """What a stage needs of the engine.

    Attributes:
        reference: What it reads of a reference or teacher, for each scored token: its log-prob, its whole distribution.
        coupled: Its loss is no sum over groups; it is computed on the whole optimizer step.
    """

    reference: frozenset[Literal["logprobs", "logits"]]
    coupled: bool


def list_loss_names(settings: TrainSettings) -> list[str]:
    """A stage's loss types; of a kind without `loss_type` the kind's one loss."""
    return get_loss_names(getattr(settings, "loss_type", settings.kind))


def find_entries(settings: TrainSettings) -> dict[str, LossEntry]:
    """A stage's loss types by name; a function of the user's declares nothing here."""
    return {name: find_entry(settings.kind, name) for name in list_loss_names(settings)}


def find_needs(settings: TrainSettings) -> Needs:
    """What a stage needs by its kind, its loss types and a moving β."""
    spec, entries = find_method_spec(settings.kind), find_entries(settings)
    reference: set[Literal["logprobs", "logits"]] = set()
    if spec.reference != "none":
        reference.add(spec.reference)
    if any(entry.live for entry in entries.values()):
        reference.add("logits")
    section = getattr(settings, "dynamic_beta", None)
    coupled = (
        spec.coupling == "step"
        or any(entry.coupled for entry in entries.values())
        or (section is not None and section.coupled)
    )
    return Needs(frozenset(reference), coupled)


def list_metrics(settings: TrainSettings) -> list[str] | None:
    """Figures that evaluations of a stage have, without "eval_"; None where a loss function of the user's may add its own."""
    spec, entries = find_method_spec(settings.kind), find_entries(settings)
    if any(":" in name for name in entries if name != settings.kind):
        return None
    own = [name for entry in entries.values() for name in entry.metrics]
    return list(dict.fromkeys(["loss", *spec.metrics, *own]))


def is_among(metric: str, names: list[str] | tuple[str, ...]) -> bool:
    """Whether a figure is one of these, or one of their parts ("loss/sft", "accuracy/SOURCE")."""
    return any(metric == name or metric.startswith(f"{name}/") for name in names)

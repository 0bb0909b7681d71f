"""The models that a training stage trains: loaded, put behind their call, described, exported."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from burnish.config.spec import ModelSpec
from burnish.config.train import TrainSettings
from burnish.engine.parallel.interface import Parallel
from burnish.models.adapters import check_exportable
from burnish.models.export import export_model
from burnish.models.freeze import compute_share
from burnish.models.load import BuiltModel, build_model
from burnish.models.policy import Policy
from burnish.models.precision import PrecisionPlan
from burnish.models.quantise import Footprint, measure_footprint

log = logging.getLogger("burnish")


@dataclass(frozen=True)
class StageModel:
    """A model in training.

    Attributes:
        spec: What the kind says of it.
        folder: Where it started from.
        policy: The model behind its call.
    """

    name: str
    spec: ModelSpec
    folder: Path
    built: BuiltModel
    policy: Policy
    footprint: Footprint


def load_stage_model(
    name: str,
    spec: ModelSpec,
    settings: TrainSettings,
    path: str,
    folder: Path,
    precision: PrecisionPlan,
    parallel: Parallel,
) -> StageModel:
    """Load a model, decide what of it trains, put it behind its call, and lay it over the ranks.

    Args:
        path: As `resolve_model_path` gave it. folder: The same as a local folder.
    """

    def make() -> BuiltModel:
        built = build_model(settings, path, head=spec.head, seed=settings.seed, compute_dtype=precision.compute)
        if parallel.sharded and settings.lora is not None and built.loaded.merged:
            check_exportable(settings.lora, built.loaded.folder)
        return built

    built = parallel.build(make)
    label = "" if name == "policy" else f"{name}: "
    for note in built.notes:
        log.info("%s%s", label, note)
    footprint = measure_footprint(built.model)
    if built.loaded.quantization is not None:
        log.info("%s%s", label, footprint.describe(built.loaded.quantization))
    policy = Policy(
        built.model,
        head=spec.head,
        attention=settings.attention,
        compute_dtype=precision.compute,
        device=parallel.runtime.device,
    )
    parallel.prepare({name: policy})
    held = dict(built.model.named_parameters())  # sharding puts others in their place
    built.trainable = {n: held[n] for n in built.trainable}
    log.info("%sattention: %s%s", label, policy.backend, f" ({policy.why_padded})" if policy.why_padded else "")
    return StageModel(name, spec, folder, built, policy, footprint)


def name_parameters(models: Mapping[str, StageModel]) -> dict[str, Any]:
    """The job's fields that name parameters: trainable, no_decay, head."""
    built = {name: model.built for name, model in models.items()}
    return {
        "trainable": {f"{name}.{n}": p for name, b in built.items() for n, p in b.trainable.items()},
        "no_decay": frozenset(f"{name}.{n}" for name, b in built.items() for n in b.no_decay),
        "head": frozenset(f"{name}.{n}" for name, b in built.items() for n in b.head_parameters),
    }


def find_rates(models: Mapping[str, StageModel], settings: TrainSettings) -> dict[str, float]:
    """Model → its own peak learning rate, where the settings give it one."""
    found = {m.name: getattr(settings, m.spec.learning_rate) for m in models.values() if m.spec.learning_rate}
    return {name: float(rate) for name, rate in found.items() if rate is not None}


def export_stage_models(
    models: Mapping[str, StageModel],
    folder: Path | None,
    parallel: Parallel,
    *,
    extra: Mapping[str, Any],
    dtype: Any,
    stop_ids: list[int],
) -> None:
    """Write a stage's models: the first into the folder itself, each further one into a folder of its name within. Every rank
    must come here.

    Args:
        folder: Exists and is empty; the caller seals it. None: another rank writes.
        extra: Goes into training_info.pt.
        dtype: As for `export_model`.
        stop_ids: Ids that end an answer.
    """
    for place, model in enumerate(models.values()):
        target = folder / model.name if folder is not None and place else folder
        if target is not None:
            target.mkdir(exist_ok=True)
        export_model(
            model.built,
            target,
            tokenizer_source=model.folder,
            head=model.spec.head,
            extra=extra,
            dtype=dtype,
            stop_ids=stop_ids,
            read=parallel.full_tensors if parallel.sharded else None,
        )


def describe_weights(model: StageModel) -> dict[str, Any]:
    """How the weights lay in memory: bytes of all, and of those in few bits their number and bits a weight."""
    quantization, footprint = model.built.loaded.quantization, model.footprint
    found: dict[str, Any] = {"bytes": footprint.bytes}
    if quantization is not None:
        found |= {
            "stored": str(quantization),
            "quantised": footprint.quantised,
            "bits": round(footprint.bits, 4),
            "bytes_in_fp32": footprint.plain,
        }
    return found


def count_trainable(models: Mapping[str, StageModel]) -> dict[str, int]:
    """Trainable parameters, and all, over the stage's models."""
    return {
        "parameters": sum(p.numel() for m in models.values() for p in m.built.trainable.values()),
        "of": sum(compute_share(m.built.model).total for m in models.values()),
    }

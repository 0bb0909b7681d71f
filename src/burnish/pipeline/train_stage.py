"""One training stage: data, model, reference, training, export."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.artifacts.folder import FolderWriter
from burnish.artifacts.redact import redact, redact_tree
from burnish.artifacts.run_folder import RunFolder
from burnish.config.batch import compute_batch
from burnish.config.registry import find_method_spec, load_user_object
from burnish.config.spec import ModelSpec
from burnish.config.train import TrainSettings
from burnish.data.prepare import PreparedData, prepare_data
from burnish.data.tokenizer import TextTokenizer
from burnish.engine.budget import choose_budget
from burnish.engine.job import TrainJob, TrainOutcome, build_source
from burnish.engine.loop import run_training
from burnish.engine.method import Method, arrange_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.parallel.interface import Parallel
from burnish.engine.runtime import Runtime
from burnish.engine.source import Source
from burnish.faults import fault_point
from burnish.models.folder import read_context, read_hidden_size
from burnish.models.load import fetch_model_folder, resolve_model_path
from burnish.models.precision import PrecisionPlan, resolve_precision
from burnish.pipeline.disk_space import estimate_export
from burnish.pipeline.inputs import check_reward_model, fingerprint_inputs
from burnish.pipeline.reference import Referenced, attach_reference
from burnish.pipeline.reward_margins import attach_reward_margins
from burnish.pipeline.stage_models import (
    StageModel,
    count_trainable,
    describe_weights,
    export_stage_models,
    find_rates,
    load_stage_model,
    name_parameters,
)
from burnish.track.sinks import SinkContext, build_sinks
from burnish.track.whereabouts import enter_phase, note_budget

log = logging.getLogger("burnish")

SAVE_DTYPES: dict[str, Any] = {"fp32": "masters", "source": "source", "bf16": torch.bfloat16}


@dataclass
class StageInputs:
    """What a training stage starts from, found before anything heavy is loaded.

    Attributes:
        path: The model: a local folder or hub id.
        folder: Its local folder.
        tokenizer: Its tokenizer.
        data: Training and held-out groups.
        other: The model that serves as reference or teacher: a local folder or hub id; None where it is the policy, or none.
        fingerprints: name → fingerprint of every input, for the stage's key.
        reward_model: Folder of the reward model that weighs the pairs, if there is one.
        starts: Model → (path, local folder), for models of the stage that start from another than `path`.
    """

    path: str
    folder: Path
    tokenizer: TextTokenizer
    data: PreparedData
    fingerprints: dict[str, str]
    other: str | None = None
    reward_model: Path | None = None
    starts: Mapping[str, tuple[str, Path]] = field(default_factory=dict)


def load_inputs(
    settings: TrainSettings,
    model: str,
    fingerprint: Callable[[Path], str],
    other: str | None = None,
    reward_model: str | None = None,
    starts: Mapping[str, str] | None = None,
) -> StageInputs:
    """Resolve the model, tokenise the data; torch is not touched.

    Args:
        model: Bundled name, folder or hub id: the stage's own model or the result of the stage it starts from.
        fingerprint: Fingerprint of a model folder.
        other: Bundled name, folder or hub id of the reference or teacher, where it is another model.
        reward_model: Folder or hub id of the reward model that weighs the pairs.
        starts: Model → bundled name, folder or hub id that it starts from, where that is not the stage's own.

    Raises:
        ConfigError: The reward model is none, or cannot read what the policy reads.
    """
    path = resolve_model_path(model, revision=settings.revision)
    folder = fetch_model_folder(path, revision=settings.revision, trust_remote_code=settings.trust_remote_code)
    tokenizer = TextTokenizer.load(str(folder))
    data = prepare_data(settings, tokenizer, context=read_context(folder))
    second = None if other is None else resolve_model_path(other)
    beside = None if second is None else fetch_model_folder(second)
    judge = None if reward_model is None else fetch_model_folder(resolve_model_path(reward_model))
    if judge is not None:
        check_reward_model(judge, tokenizer, data.longest)
    paths = {name: resolve_model_path(start) for name, start in (starts or {}).items()}
    begun = {name: (start, fetch_model_folder(start)) for name, start in paths.items()}
    further = {name: place for name, (_, place) in begun.items()}
    found = fingerprint_inputs(settings, folder, tokenizer, data.fingerprint, fingerprint, beside, judge, further)
    return StageInputs(path, folder, tokenizer, data, found, second, judge, begun)


def run_train_stage(
    settings: TrainSettings,
    inputs: StageInputs,
    stage_dir: Path,
    runtime: Runtime,
    *,
    key: str,
    resume: bool,
    resume_from: Path | None = None,
    label: str = "",
    run: RunFolder,
    reference_dir: Path | None = None,
) -> dict[str, Any]:
    """Train and write `final/`; returns what goes into stage.json.

    Args:
        reference_dir: Folder for the reference's cached log-probs and a reward model's scores; default: `reference` in
            the stage's folder.
    """
    kind = find_method_spec(settings.kind)
    method: Method = load_user_object(kind.runner)(settings)
    for note in method.examine(inputs.data.train):
        log.warning("%s", note)
    train, held_out = inputs.data.train, inputs.data.held_out
    kept = reference_dir or stage_dir / "reference"
    parallel = build_parallel(runtime, settings.distributed, deterministic=settings.deterministic)
    note_budget(choose_budget(settings, runtime.device.type))
    if inputs.reward_model is not None:
        train, held_out = attach_reward_margins(settings, method, inputs, kept, parallel)
        enter_phase("load")
    precision = resolve_precision(settings.precision, runtime.device, read_hidden_size(inputs.folder))
    log.info("precision: %s", precision.why)
    models = load_stage_models(kind.models, settings, inputs, precision, parallel)
    data = Referenced(train, arrange_groups(method, held_out))
    if method.reference:
        enter_phase("reference")
        data = attach_reference(settings, method, inputs, models, data.train, data.held_out, kept, parallel)
    with ExitStack() as stack:
        sinks = _open_sinks(settings, stage_dir, runtime, run, label, stack)
        job = TrainJob(
            models={name: model.policy for name, model in models.items()},
            method=method,
            settings=settings,
            source=_build_source(kind.source, settings, data, method, runtime),
            held_out=data.held_out,
            runtime=runtime,
            parallel=parallel,
            **name_parameters(models),
            rates=find_rates(models, settings),
            reference=data.model,
            stage_dir=stage_dir,
            resume=resume,
            resume_from=resume_from,
            fp16=precision.fp16,
            stamp={"key": key, "inputs": inputs.fingerprints, "kind": settings.kind, "run_id": run.run_id},
            sinks=sinks,
            label=label,
            best_metric=kind.best_metric,
            export_bytes=sum(
                estimate_export(m.folder, m.built.model, m.built.trainable, settings) for m in models.values()
            ),
        )
        enter_phase("start")
        outcome = run_training(job)
    enter_phase("export")
    save_final(settings, inputs, models, outcome, stage_dir / "final", parallel)
    runtime.barrier()
    return _describe(inputs, models, precision, outcome)


def load_stage_models(
    specs: Mapping[str, ModelSpec],
    settings: TrainSettings,
    inputs: StageInputs,
    precision: PrecisionPlan,
    parallel: Parallel,
) -> dict[str, StageModel]:
    """The models that the stage trains, by name."""
    found = {}
    for name, spec in specs.items():
        path, folder = inputs.starts.get(name, (inputs.path, inputs.folder))
        found[name] = load_stage_model(name, spec, settings, path, folder, precision, parallel)
    return found


def _build_source(
    path: str | None, settings: TrainSettings, data: Referenced, method: Method, runtime: Runtime
) -> Source:
    """The kind's own source of examples, or the data, permuted in each epoch."""
    if path is None:
        return build_source(settings, data.train, runtime.world, method, data.complete)
    return load_user_object(path)(settings, data.train, batch_size=compute_batch(settings, runtime.world).batch_size)


def save_final(
    settings: TrainSettings,
    inputs: StageInputs,
    models: Mapping[str, StageModel],
    outcome: TrainOutcome,
    final: Path,
    parallel: Parallel,
) -> None:
    """Write the result of a stage so that plain transformers or PEFT loads it; whole or not at all. Rank 0 writes; of sharded
    models the other ranks send their rows."""
    given: dict[str, Any] = {"dtype": SAVE_DTYPES[settings.save_dtype], "stop_ids": sorted(inputs.tokenizer.eos_ids)}
    if not parallel.runtime.is_main:
        if parallel.sharded:
            export_stage_models(models, None, parallel, extra={}, **given)
        return
    extra = {
        "base_model_path": inputs.path,
        "training_config": settings.model_dump(mode="json"),
        "model_type": settings.kind,
        "dataset_name": _name_data(settings),
        "train_samples": len(inputs.data.train),
        "eval_samples": len(inputs.data.held_out),
        "training_steps": outcome.steps,
    }
    meta = {"stage": settings.name or settings.kind, "steps": outcome.steps}
    with FolderWriter(final, kind="final", meta=meta) as writer:
        export_stage_models(models, writer.folder, parallel, extra=redact_tree(extra), **given)
        fault_point("export.written")


def _describe(
    inputs: StageInputs, models: Mapping[str, StageModel], precision: PrecisionPlan, o: TrainOutcome
) -> dict[str, Any]:
    first = next(iter(models.values()))
    return {
        "figures": {
            "steps": o.steps,
            "updates": o.updates,
            "seconds": round(o.seconds, 3),
            "tokens": o.tokens,
            "train_loss": o.figures.get("loss"),
            "train": o.figures,
            "eval": o.evaluation,
            "best_step": o.best_step,
            "stopped_early": o.stopped_early,
        },
        "data": inputs.data.report.to_json(),
        "trainable": count_trainable(models),
        "precision": precision.name,
        "attention": first.policy.backend,
        "resumed_from": o.resumed_from,
        "ledger": o.ledger,
        "weights": describe_weights(first),
    }


def _name_data(settings: TrainSettings) -> str:
    data = settings.data
    sources = data if isinstance(data, list) else [data]
    return ", ".join(s if isinstance(s, str) else s.source for s in sources if s is not None)


def _open_sinks(
    settings: TrainSettings, stage_dir: Path, runtime: Runtime, run: RunFolder, label: str, stack: ExitStack
) -> Sequence[Callable[[Mapping[str, Any]], None]]:
    if not settings.report_to or not runtime.is_main:
        return ()
    context = SinkContext(
        folder=stage_dir,
        run=run.path.name,
        stage=label,
        run_id=run.run_id,
        project=settings.wandb_project,
        settings=settings.model_dump(mode="json"),
        redact=redact,
        start_step=max((ref.step for ref in list_checkpoints(stage_dir)), default=0),
    )
    return (stack.enter_context(build_sinks(settings.report_to, context)).write,)

"""One training stage: data, model, reference, training, export."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.artifacts.folder import FolderWriter
from burnish.artifacts.redact import redact, redact_tree
from burnish.artifacts.run_folder import RunFolder
from burnish.config.registry import KINDS, load_object
from burnish.config.train import TrainSettings
from burnish.data.prepare import PreparedData, prepare_data
from burnish.data.tokenizer import TextTokenizer
from burnish.engine.job import TrainJob, TrainOutcome, choose_budget
from burnish.engine.loop import run_training
from burnish.engine.method import Method
from burnish.engine.runtime import Runtime
from burnish.faults import fault_point
from burnish.models.export import export_model
from burnish.models.folder import read_context, read_hidden_size
from burnish.models.freeze import compute_share
from burnish.models.load import BuiltModel, build_model, fetch_model_folder, resolve_model_path
from burnish.models.policy import Policy
from burnish.models.precision import PrecisionPlan, resolve_precision
from burnish.models.quantise import Footprint, measure_footprint
from burnish.pipeline.inputs import check_reward_model, fingerprint_inputs
from burnish.pipeline.reference import Referenced, attach_reference
from burnish.pipeline.reward_margins import attach_reward_margins
from burnish.pipeline.space import estimate_export
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
    """

    path: str
    folder: Path
    tokenizer: TextTokenizer
    data: PreparedData
    fingerprints: dict[str, str]
    other: str | None = None
    reward_model: Path | None = None


def load_inputs(
    settings: TrainSettings,
    model: str,
    fingerprint: Callable[[Path], str],
    other: str | None = None,
    reward_model: str | None = None,
) -> StageInputs:
    """Resolve the model, tokenise the data; torch is not touched.

    Args:
        model: Bundled name, folder or hub id: the stage's own model or the result of the stage it starts from.
        fingerprint: Fingerprint of a model folder.
        other: Bundled name, folder or hub id of the reference or teacher, where it is another model.
        reward_model: Folder or hub id of the reward model that weighs the pairs.

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
    found = fingerprint_inputs(settings, folder, tokenizer, data.fingerprint, fingerprint, beside, judge)
    return StageInputs(path, folder, tokenizer, data, found, second, judge)


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
    method: Method = load_object(KINDS[settings.kind].runner)(settings)
    for note in method.examine(inputs.data.train):
        log.warning("%s", note)
    train, held_out = inputs.data.train, inputs.data.held_out
    kept = reference_dir or stage_dir / "reference"
    note_budget(choose_budget(settings, runtime.device.type))
    if inputs.reward_model is not None:
        train, held_out = attach_reward_margins(settings, method, inputs, kept, runtime)
        enter_phase("load")
    precision = resolve_precision(settings.precision, runtime.device, read_hidden_size(inputs.folder))
    log.info("precision: %s", precision.why)
    built = build_model(settings, inputs.path, head=method.head, seed=settings.seed, compute_dtype=precision.compute)
    built.model.to(runtime.device)
    for note in built.notes:
        log.info("%s", note)
    footprint = measure_footprint(built.model)
    if built.loaded.quantization is not None:
        log.info("%s", footprint.describe(built.loaded.quantization))
    policy = Policy(built.model, head=method.head, attention=settings.attention, compute_dtype=precision.compute)
    log.info("attention: %s%s", policy.backend, f" ({policy.why_padded})" if policy.why_padded else "")
    data = Referenced(train, method.arrange(held_out))
    if method.needs_reference or method.needs_reference_head:
        enter_phase("reference")
        data = attach_reference(settings, method, inputs, built, policy, data.train, data.held_out, kept, runtime)
    with ExitStack() as stack:
        sinks = _open_sinks(settings, stage_dir, runtime, run, label, stack)
        job = TrainJob(
            policy=policy,
            method=method,
            settings=settings,
            train=data.train,
            held_out=data.held_out,
            runtime=runtime,
            trainable={f"policy.{n}": p for n, p in built.trainable.items()},
            no_decay=frozenset(f"policy.{n}" for n in built.no_decay),
            head=frozenset(f"policy.{n}" for n in built.head_parameters),
            reference=data.model,
            complete=data.complete,
            stage_dir=stage_dir,
            resume=resume,
            resume_from=resume_from,
            fp16=precision.fp16,
            stamp={"key": key, "inputs": inputs.fingerprints, "kind": settings.kind, "run_id": run.run_id},
            sinks=sinks,
            label=label,
            export_bytes=estimate_export(inputs.folder, built.model, built.trainable, settings),
        )
        enter_phase("start")
        outcome = run_training(job)
    if runtime.is_main:
        enter_phase("export")
        save_final(settings, inputs, built, outcome, method.head, stage_dir / "final")
    runtime.barrier()
    return _describe(settings, inputs, built, policy, precision, outcome) | {
        "weights": _describe_weights(built, footprint)
    }


def save_final(
    settings: TrainSettings, inputs: StageInputs, built: BuiltModel, outcome: TrainOutcome, head: Any, final: Path
) -> None:
    """Write the result of a stage so that plain transformers or PEFT loads it; whole or not at all."""
    extra = {
        "base_model_path": inputs.path,
        "training_config": settings.model_dump(mode="json"),
        "model_type": settings.kind,
        "dataset_name": _name_data(settings),
        "train_samples": len(inputs.data.train),
        "eval_samples": len(inputs.data.held_out),
        "training_steps": outcome.steps,
    }
    with FolderWriter(
        final, kind="final", meta={"stage": settings.name or settings.kind, "steps": outcome.steps}
    ) as writer:
        export_model(
            built,
            writer.folder,
            tokenizer_source=inputs.folder,
            head=head,
            extra=redact_tree(extra),
            dtype=SAVE_DTYPES[settings.save_dtype],
            stop_ids=sorted(inputs.tokenizer.eos_ids),
        )
        fault_point("export.written")


def _describe(
    settings: TrainSettings,
    inputs: StageInputs,
    built: BuiltModel,
    policy: Policy,
    precision: PrecisionPlan,
    o: TrainOutcome,
) -> dict[str, Any]:
    total = compute_share(built.model).total
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
        "trainable": {"parameters": sum(p.numel() for p in built.trainable.values()), "of": total},
        "precision": precision.name,
        "attention": policy.backend,
        "resumed_from": o.resumed_from,
        "ledger": o.ledger,
    }


def _describe_weights(built: BuiltModel, footprint: Footprint) -> dict[str, Any]:
    """How the weights lay in memory: bytes of all, and of those in few bits their number and bits a weight."""
    quantization = built.loaded.quantization
    found: dict[str, Any] = {"bytes": footprint.bytes}
    if quantization is not None:
        found |= {
            "stored": str(quantization),
            "quantised": footprint.quantised,
            "bits": round(footprint.bits, 4),
            "bytes_in_fp32": footprint.plain,
        }
    return found


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

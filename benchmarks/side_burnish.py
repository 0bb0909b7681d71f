"""Our side of the benchmark: the engine on the rows' token ids, at its default settings."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from workload import LORA_ALPHA, LORA_RANK, TOP_K, Pair, Plan

from burnish.config.registry import KINDS, load_object
from burnish.config.train import TrainSettings
from burnish.core.group import Completion, Group
from burnish.engine.budget import choose_budget
from burnish.engine.job import TrainJob, build_source
from burnish.engine.loop import run_training
from burnish.engine.method import arrange_groups
from burnish.engine.runtime import build_runtime
from burnish.engine.source import Change
from burnish.models.load import build_model
from burnish.models.policy import Policy
from burnish.models.precision import resolve_precision
from burnish.models.reference import COLUMN, Reference, attach_table, compute_reference_table


def build_groups(plan: Plan, pairs: Sequence[Pair], reference: float | None = None) -> list[Group]:
    """The rows as groups; every answer token is scored.

    Args:
        reference: Put this number in place of the reference's log-probs, where only the cost matters.
    """

    def completion(ids: list[int]) -> Completion:
        columns = {} if reference is None else {COLUMN: np.full(len(ids), reference, dtype=np.float32)}
        return Completion(np.array(ids, dtype=np.int32), np.ones(len(ids), dtype=bool), token_columns=columns)

    groups = []
    for pair in pairs:
        answers = [pair.chosen_ids] if plan.method == "sft" else [pair.chosen_ids, pair.rejected_ids]
        prompt = np.array(pair.prompt_ids, dtype=np.int32)
        if plan.method == "kto":
            label = {"label": float(pair.is_good)}
            groups.append(Group(pair.id, prompt, (completion(pair.answer_ids),), columns=label))
            continue
        groups.append(Group(pair.id, prompt, tuple(completion(ids) for ids in answers)))
    return groups


def build_settings(plan: Plan, model: Path) -> TrainSettings:
    """The stage's settings: what the comparison fixes, the rest at its defaults."""
    settings: dict[str, Any] = {
        "model": str(model),
        "learning_rate": plan.learning_rate,
        "max_grad_norm": plan.max_grad_norm,
        "precision": plan.precision,
        "batch_size": plan.batch_size,
        "seed": plan.seed,
        "shuffle": False,
    }
    if plan.method in ("dpo", "kto", "orpo"):
        settings["beta"] = plan.beta
    if plan.setting == "lora":
        settings["lora"] = {"r": LORA_RANK, "alpha": LORA_ALPHA}
    elif plan.setting == "top_k":
        settings["top_k"] = TOP_K
    elif plan.setting == "padded":
        settings["attention"] = "padded"
    if plan.micro_batch_tokens:
        settings["micro_batch_tokens"] = plan.micro_batch_tokens
    return load_object(KINDS[plan.method].settings)(**settings)


class Watch:
    """Losses and times of the steps; optionally a profile of the steps after the warm-up."""

    def __init__(self, warmup_steps: int, profile: Path | None) -> None:
        self.losses: list[float] = []
        self.ends: list[float] = []
        self.cpu: list[float] = []
        self.start, self.start_cpu = 0.0, 0.0
        self.warmup_steps = warmup_steps
        self.profiler = (
            torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True)
            if profile
            else None
        )
        self.profile = profile

    def __call__(self, step: int, figures: Any, seconds: float) -> None:
        self.ends.append(time.perf_counter())
        self.cpu.append(time.process_time())
        self.losses.append(float(figures["loss"]))
        if self.profiler and step + 1 == self.warmup_steps:
            self.profiler.start()

    def close(self) -> None:
        """Write the profile, if one was asked for."""
        if self.profiler and self.profile:
            self.profiler.stop()
            plain = self.profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25)
            shapes = self.profiler.key_averages(group_by_input_shape=True)
            text = plain + "\n" + shapes.table(sort_by="self_cpu_time_total", row_limit=25)
            self.profile.write_text(text, encoding="utf-8")


def build_side(plan: Plan, model: Path) -> tuple[TrainSettings, Any, Any, Policy]:
    """(settings, method, built model, policy) of a stage on this machine."""
    settings, runtime = build_settings(plan, model), build_runtime()
    kind = KINDS[plan.method]
    method, head = load_object(kind.runner)(settings), kind.models["policy"].head
    precision = resolve_precision(plan.precision, runtime.device, plan.shape.hidden)
    built = build_model(settings, str(model), head=head, seed=plan.seed, compute_dtype=precision.compute)
    built.model.to(runtime.device)
    policy = Policy(built.model, head=head, attention=settings.attention, compute_dtype=precision.compute)
    return settings, method, built, policy


def _build_job(
    side: tuple[TrainSettings, Any, Any, Policy], groups: list[Group], watch: Watch, complete: Change = list
) -> TrainJob:
    settings, method, built, policy = side
    runtime = build_runtime()
    return TrainJob(
        models={"policy": policy},
        method=method,
        settings=settings,
        source=build_source(settings, groups, runtime.world, method, complete),
        held_out=[],
        trainable=built.trainable,
        runtime=runtime,
        no_decay=built.no_decay,
        head=built.head_parameters,
        on_step=watch,
    )


def train_groups(plan: Plan, groups: list[Group], folder: Path) -> Watch:
    """One pass over groups that carry their reference's log-probs; what was watched comes back."""
    watch = Watch(0, None)
    job = _build_job(build_side(plan, folder / "model"), groups, watch)
    watch.start, watch.start_cpu = time.perf_counter(), time.process_time()
    run_training(job)
    return watch


def run_burnish(plan: Plan, pairs: Sequence[Pair], folder: Path, profile: Path | None = None) -> dict[str, Any]:
    """Train once over `pairs` in their order; the same figures as `peer_trl.run_trl`."""
    side = build_side(plan, folder / "model")
    settings, method, built, policy = side
    groups, reference, reference_cpu = build_groups(plan, pairs), 0.0, 0.0
    complete: Change = list
    if "logprobs" in method.reference:
        start, start_cpu = time.perf_counter(), time.process_time()
        budget = choose_budget(settings, policy.device.type)
        arranged = arrange_groups(method, groups)
        table = compute_reference_table(Reference(policy, "copy"), arranged, budget=budget)
        if method.partners is not None:  # rows take answers of one another as the epoch begins
            complete = lambda rows: attach_table(rows, table)  # noqa: E731
        else:
            groups = attach_table(groups, table)
        reference, reference_cpu = time.perf_counter() - start, time.process_time() - start_cpu
    watch = Watch(plan.warmup_steps, profile)
    run_training(_build_job(side, groups, watch, complete))
    watch.close()
    timed = 1.0 - plan.warmup_steps * plan.batch_size / len(pairs)
    first = plan.warmup_steps - 1
    return {
        "losses": watch.losses,
        "seconds": watch.ends[-1] - watch.ends[first] + reference * timed,
        "cpu_seconds": watch.cpu[-1] - watch.cpu[first] + reference_cpu * timed,
        "reference_seconds": reference,
        "trainable": sum(p.numel() for p in built.trainable.values()),
        "backend": policy.backend,
    }

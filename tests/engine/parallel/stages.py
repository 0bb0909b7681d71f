"""A small stage trained on several ranks, for the tests of resume; each function runs on every rank (`tests.ranks`)."""

from __future__ import annotations

import hashlib
import os
import signal
from pathlib import Path
from typing import Any

import torch

from burnish.config.registry import find_method_spec, load_object
from burnish.engine.job import TrainJob, build_source
from burnish.engine.loop import Trainer
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.runtime import Runtime
from tests.engine.parallel.cases import build_qwen
from tests.engine.tiny import build_groups, build_method


class Wish:
    """What the settings would say."""

    def __init__(self, strategy: str, reshard: bool = True) -> None:
        self.strategy, self.reshard_after_forward, self.cpu_offload = strategy, reshard, False


def build_trainer(runtime: Runtime, given: dict[str, Any]) -> Trainer:
    """A stage of six steps of four examples.

    given: folder, strategy, method; optim, lora, checkpointing, evaluate, kill (rank, after step), resume, resume_from.
    """
    method, head, k, reference = build_method(given["method"])
    settings = load_object(find_method_spec("sft").settings)(
        learning_rate=1e-2,
        batch_size=4,
        max_steps=given.get("steps", 6),
        seed=5,
        save_steps=2,
        save_total_limit=0,
        micro_batch_tokens=60,
        optim=given.get("optim", "adamw"),
        eval_steps=3,
    )
    options = {"checkpointing": given.get("checkpointing", False), "lora": given.get("lora", False)}
    policy = build_qwen(head, **options)
    policy.train(True)
    parallel = build_parallel(runtime, Wish(given["strategy"], given.get("reshard", True)), deterministic=True)
    parallel.prepare({"policy": policy})
    groups = build_groups(24, k=k, reference=reference)
    folder = Path(given["folder"])
    folder.mkdir(parents=True, exist_ok=True)
    job = TrainJob(
        models={"policy": policy},
        method=method,
        settings=settings,
        source=build_source(settings, groups, runtime.world, method),
        held_out=build_groups(5, k=k, seed=9, reference=reference) if given.get("evaluate") else [],
        trainable={f"policy.{n}": p for n, p in policy.named_parameters() if p.requires_grad},
        runtime=runtime,
        parallel=parallel,
        stage_dir=folder,
        resume=bool(given.get("resume") or given.get("resume_from")),
        resume_from=Path(given["resume_from"]) if given.get("resume_from") else None,
    )
    if kill := given.get("kill"):
        rank, step = kill

        def die(done: int, figures: Any, seconds: float) -> None:
            if runtime.rank == rank and done + 1 == step:
                os.kill(os.getpid(), signal.SIGKILL)

        job.on_step = die
    return Trainer(job)


def digest(trainer: Trainer) -> dict[str, str]:
    """SHA-256 of every tensor of the state, whole; and of the rest."""
    model, moments, meta = trainer.state.to_tree()
    found = {}
    for name, tensor in sorted({**model, **{f"moment/{n}": t for n, t in moments.items()}}.items()):
        whole: Any = tensor.detach()
        whole = whole.full_tensor() if hasattr(whole, "full_tensor") else whole
        found[name] = hashlib.sha256(whole.cpu().contiguous().numpy().tobytes()).hexdigest()
    counters = {k: v for k, v in meta["counters"].items() if "mark" not in k}
    return found | {"rest": repr([counters, meta["method"], meta["scale"]])}


def train(runtime: Runtime, given: dict[str, Any]) -> dict[str, str]:
    """Train to the end; the digest of what came out."""
    trainer = build_trainer(runtime, given)
    trainer.run()
    if given.get("save"):
        trainer.saves.save()
    return digest(trainer)


def train_alone(given: dict[str, Any]) -> dict[str, str]:
    """The same in this process."""
    with torch.random.fork_rng():
        return train(Runtime(torch.device("cpu")), given)

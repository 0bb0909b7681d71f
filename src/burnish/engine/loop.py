"""Training a stage: the loop over optimizer steps, with evaluation, checkpoints, resume and guards around it."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from burnish.artifacts.checkpoints import hold_checkpoint, list_checkpoints, verify_checkpoint
from burnish.clock import mono
from burnish.core.kernels.build import load_kernels
from burnish.disk import format_bytes, free_bytes
from burnish.engine.checkpoint import (
    find_resumable,
    load_checkpoint,
    load_parameters,
    prune_checkpoints,
    restore_log,
    save_checkpoint,
)
from burnish.engine.evaluation import run_evaluation
from burnish.engine.job import TrainJob, TrainOutcome, build_source, choose_budget
from burnish.engine.memory import build_memory_error
from burnish.engine.observe import StepRecord
from burnish.engine.optimizer import build_optimizer, build_parameter_groups
from burnish.engine.plan import build_plan
from burnish.engine.source import StepData, extend_ledger
from burnish.engine.space import check_disk, estimate_checkpoint, measure_folder, plan_disk
from burnish.engine.state import TrainState
from burnish.engine.step import Gradient, StepContext, Stopped, compute_gradient
from burnish.engine.update import Update, run_update
from burnish.errors import InterruptedRun, NumericStop, ResourceError, is_out_of_memory
from burnish.faults import fault_point
from burnish.track.log import check_log_file
from burnish.track.margins import MarginLog
from burnish.track.metrics import MetricsLog, read_metrics
from burnish.track.progress import Progress
from burnish.track.signals import SignalFlag
from burnish.track.whereabouts import enter_phase, here, note_step

log = logging.getLogger("burnish")

_CUT = {
    "threads": "{} threads",
    "ranks": "{} processes",
    "micro_batch": "{} in a micro-batch",
    "kernels": "C kernels {}",
}


class Trainer:
    """One stage in training. All that changes is in `state`; the rest is fixed when it is built."""

    def __init__(self, job: TrainJob) -> None:
        s = job.settings
        self.job = job
        self.budget = choose_budget(s, job.runtime.device.type)
        self.source = build_source(s, job.train, job.runtime.world, job.method, job.complete)
        groups = build_parameter_groups(job.trainable, s, no_decay=job.no_decay, head=job.head)
        self.parameters = list(job.trainable.values())
        self.state = TrainState(
            trainable=job.trainable,
            optimizer=build_optimizer(groups, s),
            method=job.method.initial_state(),
            scale=2.0**16 if job.fp16 else None,
        )
        self.signals = SignalFlag()
        self.ctx = StepContext(
            policy=job.policy,
            method=job.method,
            runtime=job.runtime,
            parameters=self.parameters,
            seed=s.seed,
            reference=job.reference,
            reseed=job.dropout,
            should_stop=lambda: bool(self.signals) and job.runtime.world == 1,
        )
        self.metrics = MetricsLog(job.stage_dir / "metrics.jsonl") if job.stage_dir and job.runtime.is_main else None
        self.timing = MetricsLog(job.stage_dir / "timing.jsonl") if job.stage_dir and job.runtime.is_main else None
        wanted = job.stage_dir and job.runtime.is_main and job.method.records
        self.margins = MarginLog(job.stage_dir) if job.stage_dir and wanted else None
        self.save_every = self._resolve_save_steps()
        self.last_figures: dict[str, float] = {}
        self.last_evaluation: dict[str, float] = {}
        self.said: set[str] = set()  # kinds of warnings given
        self.whole = True  # False from the optimizer's step until counters and rows have followed

    def _resolve_save_steps(self) -> int:
        s, source = self.job.settings, self.source
        if s.save_steps == 0:
            return source.steps_per_epoch
        return s.save_steps if s.save_steps > 0 else max(source.total_steps // 4, 1)

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> TrainOutcome:
        """Train to the end, from the start or from the newest good checkpoint.

        Raises:
            NumericStop: Too many non-finite steps in a row; the state before them is saved.
            InterruptedRun: A signal arrived; the state is saved.
            ResourceError: Disk or memory ran out.
        """
        started = mono()
        self._plan_disk()
        resumed = self._resume() if self.job.resume else None
        note_step(self.state.counters.step)
        fork = torch.random.fork_rng(devices=[]) if self.job.runtime.device.type == "cpu" else torch.random.fork_rng()
        progress = Progress(
            self.job.label, self.source.total_steps, done=self.state.counters.step, quiet=not self._speaks()
        )
        with fork, deterministic(self.job.settings.deterministic), self.signals, progress:
            try:
                stopped_early = self._loop(progress)
            except (NumericStop, InterruptedRun):
                raise
            except ResourceError:  # the disk is full or gone: the last checkpoint is the state to go on from
                raise
            except Exception as error:
                if is_out_of_memory(error):
                    raise self._memory_error(error) from error
                if self.whole and self.job.stage_dir and self.job.runtime.world == 1:
                    self._save()
                    log.warning("saved checkpoint-%d before stopping", self.state.counters.step)
                raise
        c = self.state.counters
        best = c.best_step if self.job.settings.load_best_model_at_end else None
        if best is not None and self.job.stage_dir:
            load_parameters(self.job.stage_dir / f"checkpoint-{best}", self.job.trainable)
        return TrainOutcome(
            c.step,
            c.updates,
            c.tokens,
            mono() - started,
            self.last_figures,
            self.last_evaluation,
            c.best_step,
            stopped_early,
            resumed,
            c.ledger,
        )

    def _plan_disk(self) -> None:
        """Say how much disk the stage takes at most; refuse to begin when that is not free."""
        folder = self.job.stage_dir
        if folder is None or not self.job.runtime.is_main:
            return
        item = max((p.element_size() for p in self.parameters), default=4)
        checkpoint = estimate_checkpoint(
            [p.shape for p in self.parameters], self.job.settings.optim, item=item, logs=len(self._logs())
        )
        plan = plan_disk(
            self.job.settings,
            checkpoint,
            total_steps=self.source.total_steps,
            save_every=self.save_every,
            steps_per_epoch=self.source.steps_per_epoch,
            export=self.job.export_bytes,
            other=measure_folder(folder / "reference"),
            examples=self.source.batch_size,
        )
        if self.job.label:
            log.info("disk: at most %s; %s free", plan, format_bytes(free_bytes(folder)))
        check_disk(plan, folder, what=self.job.label or self.job.method.name)

    def _speaks(self) -> bool:
        return self.job.runtime.is_main and bool(self.job.label)

    def _loop(self, progress: Progress) -> bool:
        c = self.state.counters
        s = self.job.settings
        if c.step == 0 and s.eval_on_start and self.job.held_out:
            self._evaluate()
        elif self._owes_evaluation() and self._evaluate():
            return True
        self.job.policy.train(True)
        while c.step < self.source.total_steps:
            self._stop_if_asked()
            data = self.source.step(c.step)
            begun = mono()
            try:
                gradient = self._gradient(data)
            except Stopped:
                self._stop_if_asked()
                raise
            update = self._apply(gradient)
            fault_point("loop.after_step")
            self._account(data, gradient, update, mono() - begun, progress)
            if self._evaluation_due(data.ends_epoch) and self._evaluate():
                self._checkpoint_if_due(data, force=True)
                return True
            self._checkpoint_if_due(data)
        if self.job.held_out and "eval_loss" not in self.last_evaluation_at(c.step):
            self._evaluate()
        return False

    def last_evaluation_at(self, step: int) -> dict[str, float]:
        """The figures of the last evaluation if it was made at this step, else nothing."""
        return self.last_evaluation if self.last_evaluation.get("step") == step else {}

    def _gradient(self, data: StepData) -> Gradient:
        plan = build_plan(
            data.groups,
            budget=self.budget,
            cap=self.job.settings.per_device_train_batch_size,
            world=self.job.runtime.world,
            coupled=self.job.method.coupled,
        )
        self._warn_oversized(data, plan.oversized)
        self.ctx.scale = self.state.scale
        return compute_gradient(self.ctx, data.groups, plan, self.state.method, self.state.counters.step)

    def _warn_oversized(self, data: StepData, oversized: Sequence[int]) -> None:
        if oversized and not getattr(self, "_warned", False):
            self._warned = True
            group = data.groups[oversized[0]]
            log.warning("%s is longer than micro_batch_tokens (%d) and runs alone", group.id, self.budget)

    def _apply(self, gradient: Gradient) -> Update:
        self.whole = False
        if gradient.bad:
            return Update(False, float("nan"), 0.0)
        return run_update(self.state, self.parameters, self.job.settings, self.source.total_steps, gradient)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _account(self, data: StepData, gradient: Gradient, update: Update, seconds: float, progress: Progress) -> None:
        """Count the step and write its rows; only then is the state whole, and may be saved."""
        c = self.state.counters
        c.step += 1
        note_step(c.step)
        tokens = sum(g.tokens for g in data.groups)
        c.tokens += tokens
        c.ledger = extend_ledger(c.ledger, data.groups)
        if update.applied:
            c.bad_steps = 0
            self._account_good(gradient, update)
        elif update.overflow:
            self._write({"step": c.step, "kind": "overflow", "scale": self.state.scale})
        else:
            self._account_bad(data, gradient)
        if self.timing:
            self.timing.append({"step": c.step, "seconds": round(seconds, 4), "tokens": tokens})
        self.whole = True
        if update.applied and self.job.on_step:
            self.job.on_step(c.step - 1, self.last_figures, seconds)
        if not update.applied and not update.overflow and c.bad_steps >= self.job.settings.max_bad_steps:
            self._stop_for_numbers(data, gradient)
        progress.advance(self.last_figures, tokens=tokens, seconds=seconds)

    def _account_good(self, gradient: Gradient, update: Update) -> None:
        c = self.state.counters
        self.last_figures = {
            **gradient.figures,
            "grad_norm": update.grad_norm,
            "learning_rate": update.learning_rate,
        }
        epoch = round(c.step / self.source.steps_per_epoch, 4)
        if gradient.record:
            self._record(gradient.record, {"step": c.step, "epoch": epoch})
        if c.step % self.job.settings.logging_steps == 0 or c.step == self.source.total_steps:
            self._write({"step": c.step, "epoch": epoch, "kind": "train", **self.last_figures})

    def _record(self, record: StepRecord, place: dict[str, Any]) -> None:
        """Take over what the method says of a step: figures, its row, warnings (each kind once)."""
        self.last_figures |= record.figures
        if self.margins and record.row is not None:
            self.margins.write({**place, **record.row}, record.vectors)
        for kind, text in record.warnings.items():
            if kind not in self.said and self.job.runtime.is_main:
                log.warning("step %d: %s", self.state.counters.step, text)
            self.said.add(kind)

    def _account_bad(self, data: StepData, gradient: Gradient) -> None:
        c = self.state.counters
        c.bad_steps += 1
        what, rows = _blame(data, gradient)
        log.warning("step %d skipped: non-finite %s on %s", c.step, what, ", ".join(rows[:5]))
        self._write({"step": c.step, "kind": "skipped", "what": what, "terms": gradient.terms, "rows": rows[:20]})

    def _stop_for_numbers(self, data: StepData, gradient: Gradient) -> None:
        c = self.state.counters
        what, rows = _blame(data, gradient)
        self._save()
        raise NumericStop(
            f"{c.bad_steps} steps in a row gave a non-finite {what}; the last rows were {', '.join(rows[:5])}",
            where=f"{self.job.label or self.job.method.name} step {c.step}",
            remedy="lower learning_rate, use precision: fp32, look at these rows with `burnish data show`, "
            "or raise max_bad_steps; the parameters before these steps are saved",
        )

    def _write(self, row: dict[str, Any]) -> None:
        if self.metrics:
            self.metrics.append(row)
        for sink in self.job.sinks:
            sink(row)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self, ends_epoch: bool) -> bool:
        every = self.job.settings.eval_steps
        if not self.job.held_out or every < 0:
            return False
        return ends_epoch if every == 0 else self.state.counters.step % every == 0

    def _owes_evaluation(self) -> bool:
        """Whether the restored state stopped between a step and the evaluation that belongs to it."""
        step = self.state.counters.step
        if step == 0 or step >= self.source.total_steps or self.last_evaluation_at(step):
            return False
        return self._evaluation_due(step % self.source.steps_per_epoch == 0)

    def _evaluate(self) -> bool:
        """Evaluate, remember the best; True if training should stop early."""
        c, s = self.state.counters, self.job.settings
        figures = run_evaluation(
            self.ctx,
            self.job.held_out,
            self.state.method,
            budget=self.budget,
            cap=s.per_device_train_batch_size,
            chunk=self.source.batch_size,
        )
        self.job.policy.train(True)
        self.last_evaluation = {"step": c.step, **figures}
        self._write({"step": c.step, "kind": "eval", **figures})
        default_name, default_greater = self.job.method.best_metric
        name = s.metric_for_best_model or default_name
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in figures:
            raise ResourceError(
                f"metric_for_best_model {name!r} is not among the evaluation's figures: {', '.join(sorted(figures))}",
                remedy="choose one of these",
            )
        greater = (
            s.greater_is_better
            if s.greater_is_better is not None
            else (default_greater if name == default_name else "loss" not in name)
        )
        value = figures[name]
        if c.best_value is None or (value > c.best_value if greater else value < c.best_value):
            c.best_value, c.best_step, c.stale_evaluations = value, c.step, 0
            if s.load_best_model_at_end:
                self._save()
        else:
            c.stale_evaluations += 1
        patience = s.early_stopping_patience
        if patience is not None and c.stale_evaluations >= patience:
            log.info("stopped early: %s has not improved for %d evaluations", name, c.stale_evaluations)
            return True
        return False

    # -- checkpoints ------------------------------------------------------------------------------------------------

    def _checkpoint_if_due(self, data: StepData, force: bool = False) -> None:
        c = self.state.counters
        at_end = c.step == self.source.total_steps
        due = data.ends_epoch if self.job.settings.save_steps == 0 else c.step % self.save_every == 0
        if force or due or at_end:
            self._save()

    def _save(self) -> None:
        stage_dir = self.job.stage_dir
        if stage_dir is None:
            return
        enter_phase("save")
        self.job.runtime.barrier()
        if self.job.runtime.is_main:
            c = self.state.counters
            if self.metrics and self.timing:
                c.metrics_mark, c.timing_mark = self.metrics.mark(), self.timing.mark()
            meta = {**self.job.stamp, **self._find_cut()}
            if self.margins:
                meta["margins_mark"] = self.margins.mark()
            save_checkpoint(stage_dir, self.state, meta, self._logs())
            best = c.best_step if self.job.settings.load_best_model_at_end else None
            prune_checkpoints(
                stage_dir, self.job.settings.save_total_limit, best=best, newest=c.step, run_id=self.job.run_id
            )
            check_log_file()
        self.job.runtime.barrier()

    def _find_cut(self) -> dict[str, Any]:
        """How sums are cut into parts, which decides their last bits: threads, processes, micro-batches, kernels."""
        cap = self.job.settings.per_device_train_batch_size
        size = f"{self.budget} tokens" + (f", {cap} examples" if cap is not None else "")
        kernels = load_kernels().identity if self.job.runtime.device.type == "cpu" else "not used"
        return {
            "threads": torch.get_num_threads(),
            "ranks": self.job.runtime.world,
            "micro_batch": size,
            "kernels": kernels,
        }

    def _resume(self) -> int | None:
        stage_dir = self.job.stage_dir
        if self.job.resume_from is not None:
            with hold_checkpoint(self.job.resume_from):
                load_checkpoint(verify_checkpoint(self.job.resume_from).path, self.state)
        elif stage_dir is not None:
            found = find_resumable(stage_dir, log.warning, run_id=self.job.run_id)
            if found is None:
                for file in self._logs():
                    file.cut_back(0)
                if self.margins:
                    self.margins.drop_vectors(0)
                return None
            for name, now in self._find_cut().items():
                before = found.manifest.meta.get(name, now)
                if before != now:
                    said = _CUT[name].format(now)
                    log.warning("resuming with %s, not %s: results will not be bit-equal", said, before)
            load_checkpoint(found.path, self.state)
            if self.metrics and self.timing:
                restore_log(found.path, self.metrics, self.state.counters.metrics_mark, log.warning)
                restore_log(found.path, self.timing, self.state.counters.timing_mark, log.warning)
                self._recall(self.metrics.path)
            if self.margins:
                restore_log(found.path, self.margins, found.manifest.meta.get("margins_mark", 0), log.warning)
                self.margins.drop_vectors(self.state.counters.step)
            remembered = self.job.runtime.gather((self.last_figures, self.last_evaluation))[0]
            self.last_figures, self.last_evaluation = remembered  # every rank must decide alike what is due
        return self.state.counters.step

    def _logs(self) -> list[MetricsLog]:
        return [file for file in (self.metrics, self.timing, self.margins) if file]

    def _recall(self, path: Path) -> None:
        """Take the last figures from the rows that belong to the restored state."""
        for row in read_metrics(path)[0]:
            kind = row.pop("kind", "")
            if kind == "eval":
                self.last_evaluation = row
            elif kind == "train":
                self.last_figures = {k: v for k, v in row.items() if k not in ("step", "epoch")}

    # -- stopping ---------------------------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        signum = self.signals.signum
        asked = max(self.job.runtime.gather(signum or 0)) if self.job.runtime.world > 1 else signum
        if not asked:
            return
        self._save()
        raise InterruptedRun(
            f"stopped by a signal after step {self.state.counters.step}; everything up to it is saved",
            signum=int(asked),
            remedy="give the same command again to go on",
        )

    def _memory_error(self, error: BaseException) -> ResourceError:
        """The message; the state is saved first if it is whole and there is room for it."""
        place = replace(here())
        error.__traceback__ = None  # its frames hold the tensors of the step
        for parameter in self.parameters:
            parameter.grad = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return build_memory_error(error, place, saved=self._save_in_need())

    def _save_in_need(self) -> str:
        """Save if that can be done now; says what there is to go on from."""
        stage_dir, step = self.job.stage_dir, self.state.counters.step
        if stage_dir is None:
            return ""
        if self.whole and step and self.job.runtime.world == 1:
            try:
                self._save()
                return f"checkpoint-{step} is saved, the same command goes on from it"
            except Exception as error:
                if not (is_out_of_memory(error) or isinstance(error, ResourceError)):
                    raise
        steps = [ref.step for ref in list_checkpoints(stage_dir)]
        return f"checkpoint-{steps[-1]} is intact, the same command goes on from it" if steps else "nothing is lost yet"


def _blame(data: StepData, gradient: Gradient) -> tuple[str, list[str]]:
    """What was not finite, and in which rows."""
    return "loss" if gradient.bad else "gradient", gradient.bad or [g.id for g in data.groups]


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Let torch choose kernels that give equal bits each time, where there are such (warns where there are none)."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # filling fresh memory costs time and helps only to find defects
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(wanted, warn_only=True)
    switches.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        switches.fill_uninitialized_memory = filling


def run_training(job: TrainJob) -> TrainOutcome:
    """Train a stage; see `Trainer.run`."""
    return Trainer(job).run()

"""Training a stage: the loop over optimizer steps, with evaluation, checkpoints, resume and guards around it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.clock import mono
from burnish.core.group import Group
from burnish.disk import format_bytes, free_bytes
from burnish.engine.budget import Budget, find_smaller
from burnish.engine.context import StepContext, Stopped
from burnish.engine.determinism import deterministic
from burnish.engine.evaluation import run_evaluation
from burnish.engine.job import TrainJob, TrainOutcome
from burnish.engine.memory import build_memory_error
from burnish.engine.method import build_initial_state
from burnish.engine.optimizer import build_optimizer, build_parameter_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import StepPlan, build_plan
from burnish.engine.record import StageRecord
from burnish.engine.saves import Saves
from burnish.engine.source import StepData, extend_ledger
from burnish.engine.space import check_disk, estimate_checkpoint, measure_folder, plan_disk
from burnish.engine.state import TrainState
from burnish.engine.step import Gradient, compute_gradient
from burnish.engine.update import Update, run_update
from burnish.errors import ConfigError, InterruptedRun, NumericStop, ResourceError, is_out_of_memory
from burnish.faults import fault_point
from burnish.track.progress import Progress
from burnish.track.signals import SignalFlag
from burnish.track.whereabouts import here, note_step

log = logging.getLogger("burnish")
T = TypeVar("T")


class Trainer:
    """One stage in training. All that changes is in `state`; the rest is fixed when it is built."""

    def __init__(self, job: TrainJob) -> None:
        s = job.settings
        self.job, self.source = job, job.source
        self.parallel = job.parallel or build_parallel(job.runtime)
        groups = build_parameter_groups(job.trainable, s, no_decay=job.no_decay, head=job.head, rates=job.rates)
        self.parameters = list(job.trainable.values())
        self.state = TrainState(
            trainable=job.trainable,
            optimizer=build_optimizer(groups, s),
            method=build_initial_state(job.method),
            scale=2.0**16 if job.fp16 else None,
        )
        self.budget = Budget(s, self.state, job.runtime)
        self.signals = SignalFlag()
        self.ctx = StepContext(
            models=job.models,
            method=job.method,
            parallel=self.parallel,
            parameters=self.parameters,
            seed=s.seed,
            reference=job.reference,
            reseed=job.dropout,
            should_stop=lambda: bool(self.signals) and job.runtime.world == 1,
        )
        self.record = StageRecord(job)
        self.saves = Saves(job, self.state, self.record, self.parallel, self.budget)
        self.save_every = self._resolve_save_steps()
        self.consistent = True  # False from the optimizer's step until counters and rows have followed

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
        resumed = self.saves.resume() if self.job.resume else None
        self.budget.size(self.job.models, self.parameters)
        c, device = self.state.counters, self.job.runtime.device
        note_step(c.step)
        fork = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        quiet = not (self.job.runtime.is_main and self.job.label)
        progress = Progress(self.job.label, self.source.total_steps, done=c.step, quiet=quiet)
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
                if self.consistent and self.job.stage_dir and self.job.runtime.world == 1:
                    self.saves.save()
                    log.warning("saved checkpoint-%d before stopping", self.state.counters.step)
                raise
        self.saves.load_best()
        c, record = self.state.counters, self.record
        return TrainOutcome(
            steps=c.step,
            updates=c.updates,
            tokens=c.tokens,
            seconds=mono() - started,
            figures=record.figures,
            evaluation=record.evaluation,
            best_step=c.best_step,
            stopped_early=stopped_early,
            resumed_from=resumed,
            ledger=c.ledger,
        )

    def _plan_disk(self) -> None:
        """Log how much disk the stage takes at most; refuse to begin when that is not free."""
        folder = self.job.stage_dir
        if folder is None or not self.job.runtime.is_main:
            return
        item = max((p.element_size() for p in self.parameters), default=4)
        shapes, logs = [p.shape for p in self.parameters], len(self.record.logs)
        plan = plan_disk(
            self.job.settings,
            estimate_checkpoint(shapes, self.job.settings.optim, item=item, logs=logs),
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

    def _loop(self, progress: Progress) -> bool:
        s = self.job.settings
        if self.state.counters.step == 0 and s.eval_on_start and self.job.held_out:
            self._evaluate()
        elif self._owes_evaluation() and self._evaluate():
            return True
        self.ctx.train(True)
        while self.state.counters.step < self.source.total_steps:
            self._stop_if_asked()
            self.saves.prepare_window()
            data = self.source.step(self.state.counters.step)
            begun = mono()
            try:
                gradient = self._compute_gradient(data)
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
        if self.job.held_out and "eval_loss" not in self.record.evaluation_at(self.state.counters.step):
            self._evaluate()
        return False

    def _compute_gradient(self, data: StepData) -> Gradient:
        def compute() -> Gradient:
            plan = self._build_plan(data.groups)
            if plan.oversized:
                row, most = data.groups[plan.oversized[0]].id, self.budget.tokens
                self.record.warn_once("oversized", f"{row} is longer than micro_batch_tokens ({most}) and runs alone")
            self.ctx.scale = self.state.scale
            return compute_gradient(self.ctx, data.groups, plan, self.state.method, self.state.counters.step)

        return self._fit_memory(data.groups, compute, told=self.ctx.can_tell_others)

    def _build_plan(self, groups: Sequence[Group]) -> StepPlan:
        return build_plan(
            groups,
            budget=self.budget.tokens,
            cap=self.job.settings.per_device_train_batch_size,
            world=self.job.runtime.world,
            coupled=self.job.method.coupled,
        )

    def _fit_memory(self, groups: Sequence[Group], compute: Callable[[], T], *, told: bool) -> T:
        """Compute something of some groups that changes no state; where memory runs out, again with smaller micro-batches.

        Args:
            told: Of several ranks all learn of it within `compute`, so that they cut alike.
        """
        before = self.state.counters.budget_limit
        while True:
            try:
                return compute()
            except Exception as error:
                again = is_out_of_memory(error) and (told or self.job.runtime.world == 1)
                smaller = find_smaller(self._build_plan(groups), groups, self.budget.tokens) if again else None
                if smaller is None:
                    self.budget.forget(before)  # it did not help
                    raise
                error.__traceback__ = None  # its frames hold the tensors of the step
            self._free_memory()
            self.budget.lower(smaller)

    def _free_memory(self) -> None:
        self.parallel.discard(self.parameters)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def _apply(self, gradient: Gradient) -> Update:
        self.consistent = False
        if gradient.bad:
            return Update(False, float("nan"), 0.0)
        total = self.source.total_steps
        return run_update(self.state, self.parameters, self.job.settings, total, gradient, self.parallel)

    # -- bookkeeping ------------------------------------------------------------------------------------------------

    def _account(self, data: StepData, gradient: Gradient, update: Update, seconds: float, progress: Progress) -> None:
        """Count the step and write its rows; only then is the state consistent, and may be saved."""
        c = self.state.counters
        c.step += 1
        note_step(c.step)
        tokens = sum(g.tokens for g in data.groups)
        c.tokens += tokens
        c.ledger = extend_ledger(c.ledger, data.groups)
        if update.applied:
            c.bad_steps = 0
            figures = {**gradient.figures, "grad_norm": update.grad_norm, "learning_rate": update.learning_rate}
            epoch, last = round(c.step / self.source.steps_per_epoch, 4), c.step == self.source.total_steps
            self.record.write_step(c.step, epoch, figures, gradient.record, last=last)
        elif update.overflow:
            self.record.write({"step": c.step, "kind": "overflow", "scale": self.state.scale})
        else:
            c.bad_steps += 1
            what, rows = _find_fault(data, gradient)
            log.warning("step %d skipped: non-finite %s on %s", c.step, what, ", ".join(rows[:5]))
            fault = {"what": what, "terms": gradient.terms, "rows": rows[:20]}
            self.record.write({"step": c.step, "kind": "skipped", **fault})
        self.record.write_timing(c.step, seconds, tokens)
        self.consistent = True
        if update.applied and self.job.on_step:
            self.job.on_step(c.step - 1, self.record.figures, seconds)
        if not update.applied and not update.overflow and c.bad_steps >= self.job.settings.max_bad_steps:
            self._stop_for_numbers(data, gradient)
        progress.advance(self.record.figures, tokens=tokens, seconds=seconds)

    # -- evaluation -------------------------------------------------------------------------------------------------

    def _evaluation_due(self, ends_epoch: bool) -> bool:
        every = self.job.settings.eval_steps
        if not self.job.held_out or every < 0:
            return False
        return ends_epoch if every == 0 else self.state.counters.step % every == 0

    def _owes_evaluation(self) -> bool:
        """Whether the restored state stopped between a step and the evaluation that belongs to it."""
        step = self.state.counters.step
        if step == 0 or step >= self.source.total_steps or self.record.evaluation_at(step):
            return False
        return self._evaluation_due(self.source.ends_epoch(step - 1))

    def _evaluate(self) -> bool:
        """Evaluate, remember the best; True if training should stop early."""
        cap, chunk = self.job.settings.per_device_train_batch_size, self.source.batch_size

        def evaluate() -> dict[str, float]:
            state, budget = self.state.method, self.budget.tokens
            return run_evaluation(self.ctx, self.job.held_out, state, budget=budget, cap=cap, chunk=chunk)

        figures = self._fit_memory(self.job.held_out, evaluate, told=False)
        self.ctx.train(True)
        self.record.write_evaluation(self.state.counters.step, figures)
        return self._compare_with_best(figures)

    def _compare_with_best(self, figures: dict[str, float]) -> bool:
        """Remember the best evaluation; True if there was no better one for too long."""
        c, s = self.state.counters, self.job.settings
        default_name, default_greater = self.job.best_metric
        name = s.metric_for_best_model or default_name
        name = name if name.startswith("eval_") else f"eval_{name}"
        if name not in figures:
            raise ConfigError(
                f"{name!r} is not among the evaluation's figures: {', '.join(sorted(figures))}",
                where="metric_for_best_model",
                remedy="choose one of these",
            )
        greater = s.greater_is_better
        if greater is None:
            greater = default_greater if name == default_name else "loss" not in name
        value = figures[name]
        if c.best_value is None or (value > c.best_value if greater else value < c.best_value):
            c.best_value, c.best_step, c.stale_evaluations = value, c.step, 0
            if s.load_best_model_at_end:
                self.saves.save()
        else:
            c.stale_evaluations += 1
        patience = s.early_stopping_patience
        if patience is None or c.stale_evaluations < patience:
            return False
        log.info("stopped early: %s has not improved for %d evaluations", name, c.stale_evaluations)
        return True

    def _checkpoint_if_due(self, data: StepData, force: bool = False) -> None:
        step = self.state.counters.step
        due = data.ends_epoch if self.job.settings.save_steps == 0 else step % self.save_every == 0
        if force or due or step == self.source.total_steps:
            self.saves.save()

    # -- stopping ---------------------------------------------------------------------------------------------------

    def _stop_if_asked(self) -> None:
        signum = self.signals.signum
        asked = max(self.job.runtime.gather(signum or 0)) if self.job.runtime.world > 1 else signum
        if not asked:
            return
        self.saves.save()
        raise InterruptedRun(
            f"stopped by a signal after step {self.state.counters.step}; everything up to it is saved",
            signum=int(asked),
            remedy="give the same command again to go on",
        )

    def _stop_for_numbers(self, data: StepData, gradient: Gradient) -> None:
        c = self.state.counters
        what, rows = _find_fault(data, gradient)
        self.saves.save()
        raise NumericStop(
            f"{c.bad_steps} steps in a row gave a non-finite {what}; the last rows were {', '.join(rows[:5])}",
            where=f"{self.job.label or self.job.method.name} step {c.step}",
            remedy="lower learning_rate, use precision: fp32, look at these rows with `burnish data show`, "
            "or raise max_bad_steps; the parameters before these steps are saved",
        )

    def _memory_error(self, error: BaseException) -> ResourceError:
        """The message; the state is saved first if it is consistent and there is room for it."""
        place = replace(here())
        error.__traceback__ = None  # its frames hold the tensors of the step
        self._free_memory()
        return build_memory_error(error, place, saved=self._save_in_need())

    def _save_in_need(self) -> str:
        """Save if that can be done now; says what there is to go on from."""
        stage_dir, step = self.job.stage_dir, self.state.counters.step
        if stage_dir is None:
            return ""
        if self.consistent and step and self.job.runtime.world == 1:
            try:
                self.saves.save()
                return f"checkpoint-{step} is saved, the same command goes on from it"
            except Exception as error:
                if not (is_out_of_memory(error) or isinstance(error, ResourceError)):
                    raise
        steps = [ref.step for ref in list_checkpoints(stage_dir)]
        return f"checkpoint-{steps[-1]} is intact, the same command goes on from it" if steps else "nothing is lost yet"


def _find_fault(data: StepData, gradient: Gradient) -> tuple[str, list[str]]:
    """What was not finite, and in which rows."""
    return "loss" if gradient.bad else "gradient", gradient.bad or [g.id for g in data.groups]


def run_training(job: TrainJob) -> TrainOutcome:
    """Train a stage; see `Trainer.run`."""
    return Trainer(job).run()

"""Saving and restoring a stage: checkpoints, the marks of its files, the window in progress."""

from __future__ import annotations

import logging
from typing import Any

import torch

from burnish.artifacts.checkpoints import hold_checkpoint, verify_checkpoint
from burnish.core.kernels.build import load_kernels
from burnish.engine.budget import Budget
from burnish.engine.checkpoint import (
    find_resumable,
    load_checkpoint,
    load_parameters,
    prune_checkpoints,
    save_checkpoint,
)
from burnish.engine.job import TrainJob
from burnish.engine.parallel.interface import Parallel
from burnish.engine.record import StageRecord
from burnish.engine.source import Window
from burnish.engine.state import TrainState
from burnish.engine.windows import (
    commit_window,
    compute_window_key,
    digest_parameters,
    load_window,
    prune_windows,
    restore_window,
)
from burnish.track.log import check_log_file
from burnish.track.whereabouts import enter_phase

log = logging.getLogger("burnish")

_BITS = {
    "threads": "{} threads",
    "strategy": "strategy {}",
    "ranks": "{} processes",
    "micro_batch": "{} in a micro-batch",
    "kernels": "C kernels {}",
}


class Saves:
    """Keeps the state of a stage on the disk, for as long as the stage has a folder."""

    def __init__(
        self, job: TrainJob, state: TrainState, record: StageRecord, parallel: Parallel, budget: Budget
    ) -> None:
        self.job, self.state, self.record, self.parallel, self.budget = job, state, record, parallel, budget

    def save(self) -> None:
        """Write a checkpoint of the state as it is, and drop the oldest; every rank must come here."""
        stage_dir = self.job.stage_dir
        if stage_dir is None:
            return
        enter_phase("save")
        runtime, c, keep = self.job.runtime, self.state.counters, self.job.settings.load_best_model_at_end
        runtime.barrier()
        meta = {**self.job.stamp, **self._find_bits(), **self.record.mark(c)}
        save_checkpoint(stage_dir, self.state, meta, self.record.logs, self.parallel)
        if runtime.is_main:
            best = c.best_step if keep else None
            limit = self.job.settings.save_total_limit
            prune_checkpoints(stage_dir, limit, best=best, newest=c.step, run_id=self.job.run_id)
            prune_windows(stage_dir)
            check_log_file()
        runtime.barrier()

    def resume(self) -> int | None:
        """Restore the newest good checkpoint, or the one that the job names; returns its step, None if there is none.

        Raises:
            ResourceError: There are checkpoints and none is good, or it does not fit the stage.
        """
        stage_dir, named = self.job.stage_dir, self.job.resume_from
        if named is not None:
            with hold_checkpoint(named):
                load_checkpoint(verify_checkpoint(named).path, self.state, self.parallel)
        elif stage_dir is not None:
            found = find_resumable(stage_dir, log.warning, run_id=self.job.run_id)
            if found is None:
                self.record.clear()
                return None
            self._warn_of_other_bits(found.manifest.meta)
            load_checkpoint(found.path, self.state, self.parallel)
            self.record.restore(found.path, self.state.counters, found.manifest.meta)
            known = self.job.runtime.gather((self.record.figures, self.record.evaluation))[0]
            self.record.figures, self.record.evaluation = known  # every rank must decide alike what is due
        if stage_dir is not None and self.state.window is not None:
            folder = stage_dir if named is None else named.parent
            self.job.source.use(restore_window(folder, self.state.window))
        return self.state.counters.step

    def load_best(self) -> None:
        """Put the parameters of the best checkpoint into the models, where the settings ask for it."""
        best = self.state.counters.best_step if self.job.settings.load_best_model_at_end else None
        if best is not None and self.job.stage_dir:
            load_parameters(self.job.stage_dir / f"checkpoint-{best}", self.job.trainable, self.parallel)

    def prepare_window(self) -> None:
        """Before a step: let the source make its window, and commit it; or take the one that was committed before a kill."""
        step, held, source = self.state.counters.step, self.state.window, self.job.source
        if held is not None and step <= held["last"]:
            return
        window = self._make_window(step) if source.has_windows else None
        if window is not None:
            source.use(window)

    def _make_window(self, step: int) -> Window | None:
        runtime, stage_dir = self.job.runtime, self.job.stage_dir
        digest = "".join(runtime.gather(digest_parameters(self.job.trainable.values())))
        key = compute_window_key(str(self.job.stamp.get("key", "")), step, self.state, digest)
        window = load_window(stage_dir, step, key) if stage_dir else None
        if not all(runtime.gather(window is not None)):
            window = self.job.source.prepare(step, self.job.models)
            if window is None:
                return None
            if stage_dir and runtime.is_main:
                commit_window(stage_dir, window, key)
            runtime.barrier()
        assert window is not None
        self.state.window = {"first": window.first, "last": window.last, "key": key}
        return window

    def _find_bits(self) -> dict[str, Any]:
        """What decides the last bits of sums: threads, strategy, processes, micro-batches, kernels."""
        cap = self.job.settings.per_device_train_batch_size
        size = f"{self.budget.tokens} tokens" + (f", {cap} examples" if cap is not None else "")
        kernels = load_kernels().identity if self.job.runtime.device.type == "cpu" else "not used"
        threads = torch.get_num_threads()
        return {"threads": threads, **self.parallel.identity(), "micro_batch": size, "kernels": kernels}

    def _warn_of_other_bits(self, meta: dict[str, Any]) -> None:
        for name, now in self._find_bits().items():
            before = meta.get(name, now)
            if before != now:
                described = _BITS[name].format(now) if name in _BITS else f"{name} {now}"
                log.warning("resuming with %s, not %s: results will not be bit-equal", described, before)

"""Seeded defects (R-40): faults that programs of this kind have had, each put into burnish on purpose in a child test run.

As a pytest plugin (`-p tests.reliability.defects`) it puts in the defect that BURNISH_SEEDED_DEFECT names, and the tests
named beside it must fail. A defect exchanges a function or method by one that behaves wrongly, wherever it has been imported;
it knows what the function does, not how it is written. Run as a module it prints the table of docs/reliability.md.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

VARIABLE = "BURNISH_SEEDED_DEFECT"


@dataclass(frozen=True)
class Defect:
    """A fault and what finds it.

    Attributes:
        what: In words, for the table.
        where: "module:function" or "module:Class.method".
        make: The function as it is → the one that stands in its place.
        tests: Node ids; at least one of them must fail.
        everywhere: Also where other modules have imported it by name; False: only for the callers in its own module.
    """

    what: str
    where: str
    make: Callable[[Callable[..., Any]], Callable[..., Any]]
    tests: tuple[str, ...]
    everywhere: bool = True


def _nothing(original: Callable[..., Any]) -> Callable[..., Any]:
    """It does nothing and returns None."""
    return lambda *args, **kwargs: None


def _afterwards(change: Callable[[Any], None]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method does what it should, and then something happens to its object."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            result = original(self, *args, **kwargs)
            change(self)
            return result

        return changed

    return make


def _without(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """A method works while `name`, a method of its object ("part.name": of a part), does nothing."""
    *path, last = name.split(".")

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
            owner = functools.reduce(getattr, path, self)
            setattr(owner, last, lambda *args, **kwargs: None)
            try:
                return original(self, *args, **kwargs)
            finally:
                delattr(owner, last)

        return changed

    return make


# -- the engine -----------------------------------------------------------------------------------------------------------


def _set_updates(state: Any) -> None:
    state.counters.updates = 0


def _count_steps_from_the_start(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, n: int) -> Any:
        self.first_asked = getattr(self, "first_asked", n)
        return original(self, n - self.first_asked)

    return step


def _swallow(error: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """An error of burnish does not come out; a method's object is returned instead, as if all were well."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def changed(*args: Any, **kwargs: Any) -> Any:
            try:
                return original(*args, **kwargs)
            except getattr(importlib.import_module("burnish.errors"), error):
                return args[0] if "." in original.__qualname__ else None

        return changed

    return make


def _believe_the_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def update(state: Any, parameters: Any, settings: Any, total: int, gradient: Any, parallel: Any) -> Any:
        return original(state, parameters, settings, total, replace(gradient, norm=1.0), parallel)

    return update


# -- files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _no_fsync() -> Iterator[None]:
    real = os.fsync
    os.fsync = lambda fd: None
    try:
        yield
    finally:
        os.fsync = real


def _never_flush(original: Callable[..., Any]) -> Callable[..., Any]:
    def do(self: Any, operation: str, *args: Any, **kwargs: Any) -> Any:
        if operation != "fsync_file":
            return original(self, operation, *args, **kwargs)
        with _no_fsync():
            return original(self, operation, *args, **kwargs)

    return do


def _flush_after_the_manifest(original: Callable[..., Any]) -> Callable[..., Any]:
    late = _never_flush(original)

    def do(self: Any, operation: str, *args: Any, **kwargs: Any) -> Any:
        result = late(self, operation, *args, **kwargs)
        if operation == "manifest":
            for place in sorted(self._open.temporary.rglob("*")):
                if place.is_file():
                    with place.open("rb+") as stream:
                        os.fsync(stream.fileno())
        return result

    return do


def _leave_the_parent(original: Callable[..., Any]) -> Callable[..., Any]:
    def do(self: Any, operation: str, *args: Any, **kwargs: Any) -> Any:
        return None if operation == "fsync_parent" else original(self, operation, *args, **kwargs)

    return do


def _in_place(original: Callable[..., Any]) -> Callable[..., Any]:
    def name(final: Path) -> Path:
        final.unlink(missing_ok=True)
        return final

    return name


def _by_time(original: Callable[..., Any]) -> Callable[..., Any]:
    def scan(*args: Any) -> Any:
        refs, problems = original(*args)
        return sorted(refs, key=lambda ref: ref.path.stat().st_mtime), problems

    return scan


def _follow_links(original: Callable[..., Any]) -> Callable[..., Any]:
    def delete(root: Path, name: str) -> Path:
        place = (Path(root) / name).resolve()
        return original(place.parent, place.name)

    return delete


# -- the losses, the models and the data ------------------------------------------------------------------------------------


def _swap_the_pair(original: Callable[..., Any]) -> Callable[..., Any]:
    def pairs(*args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        names = [name.removeprefix("chosen") for name in found.__slots__ if name.startswith("chosen")]
        swapped = {f"chosen{n}": getattr(found, f"rejected{n}") for n in names}
        swapped |= {f"rejected{n}": getattr(found, f"chosen{n}") for n in names}
        return replace(found, **swapped)

    return pairs


def _use_the_policy(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(policy: Any, mode: str, **kwargs: Any) -> Any:
        if mode != "copy" or kwargs.get("path") is not None:
            return original(policy, mode, **kwargs)
        return importlib.import_module("burnish.models.reference").Reference(policy, "copy")

    return build


def _run_positions_on(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        import torch

        batch = original(*args, **kwargs)
        spans = [torch.arange(group.end - group.start) for group in batch.layout.groups]
        return replace(batch, position_ids=torch.cat(spans)) if spans else batch

    return build


def _read_its_own_position(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(*args: Any, **kwargs: Any) -> Any:
        import torch

        batch, table = (found := original(*args, **kwargs)), found.table
        starts = torch.tensor([c.start for group in batch.layout.groups for c in group.completions], dtype=torch.int64)
        return replace(batch, source_index=starts[table.token_completion] + table.token_position)

    return build


def _score_everything(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(groups: Any, *args: Any, **kwargs: Any) -> Any:
        unmasked = [
            replace(g, completions=tuple(replace(c, mask=c.mask | True) for c in g.completions)) for g in groups
        ]
        return original(unmasked, *args, **kwargs)

    return build


def _see_the_first_completion(original: Callable[..., Any]) -> Callable[..., Any]:
    def build(layout: Any) -> Any:
        plan = original(layout)
        ends = {g.start: g.completions[0].start + g.completions[0].length for g in layout.groups}
        segments = [replace(s, prompt_stop=ends[s.prompt]) if s.prompt_stop else s for s in plan.segments]
        return replace(plan, segments=tuple(segments))

    return build


def _shift_the_mask(original: Callable[..., Any]) -> Callable[..., Any]:
    def encode(*args: Any) -> Any:
        drafts = original(*args)
        for draft in drafts:
            draft.completions[:] = [replace(c, mask=c.mask[1:] + c.mask[:1]) for c in draft.completions]
        return drafts

    return encode


def _sum_the_first_rows(original: Callable[..., Any]) -> Callable[..., Any]:
    def backward(grad: Any, x: Any, rstd: Any, weight: Any, residual: Any, need_weight: bool) -> Any:
        dx, _ = original(grad, x, rstd, weight, residual, need_weight)
        first = [None if t is None else t[: max(1, x.shape[0] // 2)] for t in (grad, x, rstd)]
        rest = None if residual is None else residual[: max(1, x.shape[0] // 2)]
        return dx, original(*first, weight, rest, need_weight)[1]

    return backward


LOOP = "tests/engine/test_loop.py::test_s1_11_a_resumed_stage_ends_with_the_same_bits"
KILL = "tests/pipeline/test_kill.py::test_r01_one_kill"
FOLDER = "tests/artifacts/test_folder.py::"
FLUSHED = f"{FOLDER}test_r04_everything_is_flushed_before_the_rename_and_the_parent_after"

DEFECTS: dict[str, Defect] = {
    "dropout_not_reseeded": Defect(
        "dropout draws from a generator that is not restored",
        "burnish.engine.forward:reseed",
        _nothing,
        (f"{KILL}[sft-True]",),
    ),
    "moments_not_restored": Defect(
        "a resume starts with empty optimizer moments",
        "burnish.engine.state:TrainState.load_tree",
        _afterwards(lambda state: state.optimizer.state.clear()),
        (LOOP,),
    ),
    "schedule_not_restored": Defect(
        "a resume starts the learning-rate schedule anew",
        "burnish.engine.state:TrainState.load_tree",
        _afterwards(_set_updates),
        (LOOP,),
    ),
    "data_position_not_restored": Defect(
        "a resume reads the data from the beginning",
        "burnish.engine.source:OfflineSource.step",
        _count_steps_from_the_start,
        (LOOP,),
    ),
    "order_ignores_the_epoch": Defect(
        "every epoch has the order of the first",
        "burnish.engine.source:OfflineSource.order",
        lambda original: lambda self, epoch: original(self, 0),
        ("tests/engine/test_source.py::test_the_order_is_a_function_of_seed_and_epoch_alone",),
    ),
    "ledger_skips_rows": Defect(
        "the ledger of consumed examples does not depend on their order",
        "burnish.engine.source:extend_ledger",
        lambda original: lambda ledger, groups: original(ledger, sorted(groups, key=lambda g: g.id)),
        ("tests/engine/test_source.py::test_the_ledger_depends_on_order",),
    ),
    "metrics_not_cut_back": Defect(
        "steps that are done again appear twice in metrics.jsonl",
        "burnish.track.metrics:MetricsLog.cut_back",
        _nothing,
        ("tests/track/test_metrics.py::test_r34_resume_cuts_back_to_the_mark", LOOP),
    ),
    "torn_line_kept": Defect(
        "a torn last line stays in metrics.jsonl and the next row is glued to it",
        "burnish.track.metrics:_find_sound_length",
        lambda original: len,
        ("tests/track/test_metrics.py::test_r34_cut_at_every_byte_of_the_last_300",),
    ),
    "half_row_after_full_disk": Defect(
        "a row that did not fit on the disk is left half written",
        "burnish.track.metrics:MetricsLog.append",
        _without("_cut"),
        ("tests/track/test_metrics.py::test_r14_a_full_disk_stops_loudly_and_leaves_whole_rows",),
    ),
    "evaluation_leaves_eval_mode": Defect(
        "the policy stays in evaluation mode after an evaluation: no dropout from there on",
        "burnish.engine.loop:Trainer._evaluate",
        _afterwards(lambda trainer: trainer.ctx.train(False)),
        (f"{KILL}[sft-True]",),
    ),
    "fsync_dropped": Defect(
        "files are renamed without having been flushed to the disk",
        "burnish.artifacts.folder:FolderWriter._do",
        _never_flush,
        (FLUSHED,),
    ),
    "parent_fsync_dropped": Defect(
        "the renamed folder's entry is not flushed",
        "burnish.artifacts.folder:FolderWriter._do",
        _leave_the_parent,
        (FLUSHED,),
    ),
    "manifest_first": Defect(
        "the manifest is written before the files are flushed",
        "burnish.artifacts.folder:FolderWriter._do",
        _flush_after_the_manifest,
        (FLUSHED,),
    ),
    "written_in_place": Defect(
        "records are written under their final name instead of beside it",
        "burnish.artifacts.files:temporary_name",
        _in_place,
        ("tests/artifacts/test_files.py::test_r04_single_files_are_atomic_too",),
        everywhere=False,
    ),
    "hash_check_skipped": Defect(
        "checkpoints are checked by the sizes of their files only",
        "burnish.artifacts.folder:verify_folder",
        lambda original: lambda path, **kwargs: original(path, **(kwargs | {"sizes_only": True})),
        (f"{FOLDER}test_r03_every_damage_to_every_file_is_found_and_named",),
    ),
    "silent_fresh_start": Defect(
        "with every checkpoint damaged, training starts over without a word",
        "burnish.engine.checkpoint:find_resumable",
        _swallow("ResourceError"),
        ("tests/engine/test_loop.py::test_r03_a_damaged_checkpoint_is_named_and_the_one_before_used",),
    ),
    "newest_by_mtime": Defect(
        "checkpoints are ordered by their times of modification",
        "burnish.artifacts.checkpoints:_scan",
        _by_time,
        ("tests/artifacts/test_checkpoints.py::test_order_is_by_the_manifests_step_not_by_name_or_time",),
    ),
    "retention_deletes_the_best": Defect(
        "retention deletes checkpoints that must stay (the best)",
        "burnish.artifacts.checkpoints:prune",
        lambda original: lambda stage_dir, keep, protect, **kwargs: original(stage_dir, keep, set(), **kwargs),
        ("tests/artifacts/test_checkpoints.py::test_r19_retention_over_random_histories",),
    ),
    "lock_skipped": Defect(
        "a second run enters a folder that is in use",
        "burnish.artifacts.lock:RunLock.acquire",
        _swallow("UsageError"),
        ("tests/artifacts/test_lock.py::test_r28_the_second_is_refused_with_pid_host_and_start",),
    ),
    "deletion_follows_links": Defect(
        "`runs delete` follows a link out of the runs folder",
        "burnish.artifacts.deletion:delete_run",
        _follow_links,
        ("tests/artifacts/test_disk.py::test_r15_only_runs_directly_under_the_root_are_deleted",),
    ),
    "space_not_checked": Defect(
        "a checkpoint is begun on a disk that cannot hold it",
        "burnish.disk:check_space",
        _nothing,
        (f"{FOLDER}test_r14_the_space_is_checked_before_writing",),
    ),
    "secrets_not_redacted": Defect(
        "tokens and keys reach logs and records",
        "burnish.artifacts.redact:_mask",
        lambda original: lambda text, values: text,
        (
            "tests/artifacts/test_disk.py::test_r29_redact",
            "tests/track/test_log.py::test_r29_secrets_in_messages_and_tracebacks",
        ),
    ),
    "signal_not_saved": Defect(
        "SIGTERM ends a run without a checkpoint",
        "burnish.engine.loop:Trainer._stop_if_asked",
        _without("saves.save"),
        ("tests/engine/test_loop.py::test_s4_06_a_signal_saves_the_current_step",),
    ),
    "nan_guard_off": Defect(
        "a non-finite gradient reaches parameters and moments",
        "burnish.engine.update:run_update",
        _believe_the_norm,
        ("tests/engine/test_loop.py::test_r05_a_nan_changes_no_parameter",),
    ),
    "bad_steps_never_stop": Defect(
        "training goes on however many steps in a row are non-finite",
        "burnish.engine.loop:Trainer._stop_for_numbers",
        _nothing,
        ("tests/engine/test_loop.py::test_r05_three_bad_steps_in_a_row_stop_with_the_last_good_state",),
    ),
    "mean_over_micro_batches": Defect(
        "each micro-batch is divided by its own count instead of the step's",
        "burnish.engine.step:_compute_total",
        lambda original: lambda result, counts: original(result, {t.name: t.count for t in result.terms}),
        ("tests/engine/test_step.py::test_r11_the_gradient_is_the_same_under_any_cut",),
    ),
    "chosen_rejected_swapped": Defect(
        "chosen and rejected answers are exchanged",
        "burnish.losses.pairs:compute_pairs",
        _swap_the_pair,
        (
            "tests/losses/test_dpo.py::test_pairs_are_summed_from_tokens",
            "tests/losses/test_golden.py::test_dpo_equals_trl",
        ),
    ),
    "label_smoothing_ignored": Defect(
        "label_smoothing is accepted and changes nothing",
        "burnish.losses.dpo:compute_smoothed_logistic",
        lambda original: lambda margin, label_smoothing: original(margin, 0.0),
        ("tests/losses/test_dpo.py::test_t01_label_smoothing_is_conservative_dpo",),
    ),
    "reward_margin_ignored": Defect(
        "the margin column of the data does not reach the reward loss",
        "burnish.losses.reward:compute_bradley_terry_loss",
        lambda original: lambda chosen, rejected, margin=None: original(chosen, rejected),
        ("tests/methods/test_reward.py::test_the_margin_column_moves_the_loss_but_not_the_accuracy",),
    ),
    "reference_not_frozen": Defect(
        "the reference is the policy itself and moves with it",
        "burnish.models.reference:build_reference",
        _use_the_policy,
        ("tests/models/test_reference.py::test_three_ways_agree",),
    ),
    "reference_cache_of_other_data": Defect(
        "cached reference log-probs are used for other data",
        "burnish.models.stored:build_stored_key",
        lambda original: lambda **kwargs: original(**kwargs) | {"data": ""},
        ("tests/models/test_reference.py::test_key_holds_every_input",),
    ),
    "positions_do_not_restart": Defect(
        "position ids run on over the completions of a group",
        "burnish.core.batch:build_packed_batch",
        _run_positions_on,
        ("tests/models/test_policy.py::test_r22_position_ids_restart_at_the_prompt",),
    ),
    "head_shifted": Defect(
        "a token is predicted from its own position instead of the one before",
        "burnish.core.batch:build_packed_batch",
        _read_its_own_position,
        (
            "tests/core/test_batch.py::test_the_row_and_what_predicts_each_token",
            "tests/losses/test_golden.py::test_logprobs_equal_trl",
        ),
    ),
    "mask_off_by_one": Defect(
        "the mask of scored tokens is shifted by one",
        "burnish.data.tokenise:_encode",
        _shift_the_mask,
        ("tests/data/test_tokenise.py::test_t18_only_assistant_turns_are_scored",),
    ),
    "masked_tokens_trained": Defect(
        "masked tokens are scored and get gradients",
        "burnish.core.batch:build_packed_batch",
        _score_everything,
        ("tests/models/test_policy.py::test_r22_masked_tokens_have_exactly_zero_gradient",),
    ),
    "leak_between_siblings": Defect(
        "a completion attends to the one before it",
        "burnish.core.segments:build_attention_plan",
        _see_the_first_completion,
        ("tests/core/test_attention.py::test_r22_float64_equals_a_dense_mask_to_1e_12",),
    ),
    "kernel_sums_lost": Defect(
        "of the gradient of a norm's weight only the first rows' part is kept, where kernels compute it",
        "burnish.core.kernels.calls:norm_backward",
        _sum_the_first_rows,
        (
            "tests/core/kernels/test_calls.py::test_norm_and_its_gradient",
            "tests/models/test_fuse.py::test_every_gradient_equals_the_modules[kernels-qwen3]",
        ),
    ),
    "changed_settings_resumed": Defect(
        "an interrupted stage goes on with other settings",
        "burnish.pipeline.decide:find_changed",
        lambda original: lambda record, settings, inputs, code: original(record, record["settings"], inputs, code),
        ("tests/pipeline/test_run.py::test_r18_an_interrupted_stage_with_changed_settings_is_refused",),
    ),
}


def find(where: str) -> tuple[Any, str, Callable[..., Any]]:
    """(owner, name, function) behind "module:function" or "module:Class.method"."""
    module, _, path = where.partition(":")
    *outer, name = path.split(".")
    owner = functools.reduce(getattr, outer, importlib.import_module(module))
    return owner, name, getattr(owner, name)


def apply(name: str) -> None:
    """Put one defect into this process."""
    defect = DEFECTS[name]
    owner, attribute, original = find(defect.where)
    changed = defect.make(original)
    setattr(owner, attribute, changed)
    for module in list(sys.modules.values()) if defect.everywhere else ():
        if getattr(module, "__name__", "").partition(".")[0] in ("burnish", "tests"):
            for key in [key for key, value in vars(module).items() if value is original]:
                setattr(module, key, changed)


def pytest_configure() -> None:
    if name := os.environ.get(VARIABLE):
        apply(name)


def build_table() -> str:
    """The table of docs/reliability.md."""
    rows = ["| Defect | Caught by |", "|---|---|"]
    for defect in DEFECTS.values():
        tests = ", ".join(f"`{t.removeprefix('tests/').partition('[')[0]}`" for t in defect.tests)
        rows.append(f"| {defect.what} | {tests} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    print(build_table(), end="")

"""Seeded defects (R-40): faults that programs of this kind have had, each put into burnish on purpose in a child test run.

As a pytest plugin (`-p tests.reliability.defects`) it puts in the defect that BURNISH_SEEDED_DEFECT names, and the tests
named beside it must fail. A defect is an edit of one function's source; the function's code is exchanged in place, so it
does not matter who imported it. Run as a module it prints the table of docs/reliability.md.
"""

from __future__ import annotations
import __future__

import importlib
import inspect
import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from types import CodeType
from typing import Any

VARIABLE = "BURNISH_SEEDED_DEFECT"


@dataclass(frozen=True)
class Defect:
    """A fault and what finds it.

    Attributes:
        what: In words, for the table.
        where: "module:function" or "module:Class.method".
        edits: (text of the function's source, what stands there instead); each text occurs exactly once. Lines are
            indented as if the function stood at the margin.
        tests: Node ids; at least one of them must fail.
    """

    what: str
    where: str
    edits: tuple[tuple[str, str], ...]
    tests: tuple[str, ...]


LOOP = "tests/engine/test_loop.py::test_s1_11_a_resumed_stage_ends_with_the_same_bits"
KILL = "tests/pipeline/test_kill.py::test_r01_one_kill"
FOLDER = "tests/artifacts/test_folder.py::"

DEFECTS: dict[str, Defect] = {
    "dropout_not_reseeded": Defect(
        "dropout draws from a generator that is not restored",
        "burnish.engine.step:_reseed",
        (("torch.default_generator.manual_seed(seed)", "pass"),),
        (f"{KILL}[sft-True]",),
    ),
    "moments_not_restored": Defect(
        "a resume starts with empty optimizer moments",
        "burnish.engine.state:TrainState._load_optimizer",
        (("self.optimizer.state[parameter][key] = value", "pass"),),
        (LOOP,),
    ),
    "schedule_not_restored": Defect(
        "a resume starts the learning-rate schedule anew",
        "burnish.engine.state:TrainState.load_tree",
        (('Counters(**meta["counters"])', 'Counters(**{**meta["counters"], "updates": 0})'),),
        (LOOP,),
    ),
    "data_position_not_restored": Defect(
        "a resume reads the data from the beginning",
        "burnish.engine.loop:Trainer._loop",
        (
            ("data = self.source.step(c.step)", "data = self.source.step(c.step - (self._resumed or 0))"),
            ("s = self.job.settings", "s = self.job.settings; self._resumed = c.step"),
        ),
        (LOOP,),
    ),
    "order_ignores_the_epoch": Defect(
        "every epoch has the order of the first",
        "burnish.engine.source:OfflineSource.order",
        (('"data", epoch, n)', '"data", 0, n)'),),
        ("tests/engine/test_source.py::test_the_order_is_a_function_of_seed_and_epoch_alone",),
    ),
    "ledger_skips_rows": Defect(
        "the ledger of consumed examples does not depend on their order",
        "burnish.engine.source:extend_ledger",
        (("for group in groups:", "for group in sorted(groups, key=lambda g: g.id):"),),
        ("tests/engine/test_source.py::test_the_ledger_depends_on_order",),
    ),
    "metrics_not_cut_back": Defect(
        "steps that are done again appear twice in metrics.jsonl",
        "burnish.track.metrics:MetricsLog.cut_back",
        (("self._cut(whole)", "pass"),),
        ("tests/track/test_metrics.py::test_r34_resume_cuts_back_to_the_mark", LOOP),
    ),
    "torn_line_kept": Defect(
        "a torn last line stays in metrics.jsonl and the next row is glued to it",
        "burnish.track.metrics:_whole_length",
        (("return whole if", "return len(raw)\n    return whole if"),),
        ("tests/track/test_metrics.py::test_r34_cut_at_every_byte_of_the_last_300",),
    ),
    "half_row_after_full_disk": Defect(
        "a row that did not fit on the disk is left half written",
        "burnish.track.metrics:MetricsLog.append",
        (("self._cut(self._end)", "pass"),),
        ("tests/track/test_metrics.py::test_r14_a_full_disk_stops_loudly_and_leaves_whole_rows",),
    ),
    "evaluation_leaves_eval_mode": Defect(
        "the policy stays in evaluation mode after an evaluation: no dropout from there on",
        "burnish.engine.loop:Trainer._evaluate",
        (("self.job.policy.train(True)", "self.job.policy.eval()"),),
        (f"{KILL}[sft-True]",),
    ),
    "fsync_dropped": Defect(
        "files written by libraries are not flushed to the disk",
        "burnish.artifacts.folder:FolderWriter._seal",
        (('with place.open("rb+") as stream:\n            os.fsync(stream.fileno())', "pass"),),
        (f"{FOLDER}test_r04_everything_is_flushed_before_the_rename_and_the_parent_after",),
    ),
    "parent_fsync_dropped": Defect(
        "the renamed folder's entry is not flushed",
        "burnish.artifacts.folder:FolderWriter._publish",
        (("lambda: fsync_folder(final.parent)", "lambda: None"),),
        (f"{FOLDER}test_r04_everything_is_flushed_before_the_rename_and_the_parent_after",),
    ),
    "manifest_first": Defect(
        "the manifest is written before the files are flushed",
        "burnish.artifacts.folder:FolderWriter._seal",
        (
            (
                'self._do("fsync_file", ", ".join(strangers), flush_all)',
                "state.files.update({n: hash_file(state.temporary / n) for n in strangers})",
            ),
            (
                'self._do("fsync_dir", "", lambda: fsync_folder(state.temporary))',
                'self._do("fsync_dir", "", lambda: fsync_folder(state.temporary))\n'
                '    self._do("fsync_file", "", flush_all) if strangers else None',
            ),
        ),
        (f"{FOLDER}test_r04_everything_is_flushed_before_the_rename_and_the_parent_after",),
    ),
    "written_in_place": Defect(
        "records are written under their final name instead of beside it",
        "burnish.artifacts.files:write_file",
        (
            ("temporary = temporary_name(path)", "temporary = path; path.unlink(missing_ok=True)"),
            ("temporary.replace(path)", "pass"),
        ),
        ("tests/artifacts/test_files.py::test_r04_single_files_are_atomic_too",),
    ),
    "hash_check_skipped": Defect(
        "checkpoints are checked by the sizes of their files only",
        "burnish.artifacts.folder:verify_folder",
        (("if sizes_only:", "if True:"),),
        (f"{FOLDER}test_r03_every_damage_to_every_file_is_found_and_named",),
    ),
    "silent_fresh_start": Defect(
        "with every checkpoint damaged, training starts over without a word",
        "burnish.engine.checkpoint:find_resumable",
        (("if found is None and problems:", "if False:"),),
        ("tests/engine/test_loop.py::test_r03_a_damaged_checkpoint_is_named_and_the_one_before_used",),
    ),
    "newest_by_mtime": Defect(
        "checkpoints are ordered by their times of modification",
        "burnish.artifacts.checkpoints:_scan",
        (("key=lambda r: (r.step, r.path.name)", "key=lambda r: r.path.stat().st_mtime"),),
        ("tests/artifacts/test_checkpoints.py::test_order_is_by_the_manifests_step_not_by_name_or_time",),
    ),
    "retention_deletes_the_best": Defect(
        "retention deletes checkpoints that must stay (the best, pinned ones)",
        "burnish.artifacts.checkpoints:prune",
        (("if ref.step in protect or ref.pinned or", "if"),),
        ("tests/artifacts/test_checkpoints.py::test_r19_retention_over_random_histories",),
    ),
    "lock_skipped": Defect(
        "a second run enters a folder that is in use",
        "burnish.artifacts.lock:RunLock.acquire",
        (("if not _take(fd) or self._held_elsewhere(fd):", "if False:"),),
        ("tests/artifacts/test_lock.py::test_r28_the_second_is_refused_with_pid_host_and_start",),
    ),
    "deletion_follows_links": Defect(
        "`runs delete` follows a link out of the runs folder",
        "burnish.artifacts.deletion:delete_run",
        (
            ("path = inside(Path(root), check_name(name))", "path = Path(root) / name"),
            ("path.parent != Path(root) or path.is_symlink() or", ""),
        ),
        ("tests/artifacts/test_disk.py::test_r15_only_runs_directly_under_the_root_are_deleted",),
    ),
    "space_not_checked": Defect(
        "a checkpoint is begun on a disk that cannot hold it",
        "burnish.disk:check_space",
        (("if free < needed:", "if False:"),),
        (f"{FOLDER}test_r14_the_space_is_checked_before_writing",),
    ),
    "secrets_not_redacted": Defect(
        "tokens and keys reach logs and records",
        "burnish.artifacts.redact:_mask",
        (("for pattern in _PATTERNS:", "for pattern in ():"),),
        (
            "tests/artifacts/test_disk.py::test_r29_redact",
            "tests/track/test_log.py::test_r29_secrets_in_messages_and_tracebacks",
        ),
    ),
    "signal_not_saved": Defect(
        "SIGTERM ends a run without a checkpoint",
        "burnish.engine.loop:Trainer._stop_if_asked",
        (("self._save()", "pass"),),
        ("tests/engine/test_loop.py::test_s4_06_a_signal_saves_the_current_step",),
    ),
    "nan_guard_off": Defect(
        "a non-finite gradient reaches parameters and moments",
        "burnish.engine.update:run_update",
        (("if not math.isfinite(gradient.norm):", "if False:"),),
        ("tests/engine/test_loop.py::test_r05_a_nan_changes_no_parameter",),
    ),
    "bad_steps_never_stop": Defect(
        "training goes on however many steps in a row are non-finite",
        "burnish.engine.loop:Trainer._account",
        (("c.bad_steps >= self.job.settings.max_bad_steps:", "False:"),),
        ("tests/engine/test_loop.py::test_r05_three_bad_steps_in_a_row_stop_with_the_last_good_state",),
    ),
    "mean_over_micro_batches": Defect(
        "each micro-batch is divided by its own count instead of the step's",
        "burnish.engine.step:_total",
        (("t.sum * (t.weight / counts[t.name])", "t.sum * (t.weight / t.count)"),),
        ("tests/engine/test_step.py::test_r11_the_gradient_is_the_same_under_any_cut",),
    ),
    "chosen_rejected_swapped": Defect(
        "chosen and rejected answers are exchanged",
        "burnish.losses.pairs:_split",
        (("table.slot(values, 0), table.slot(values, 1)", "table.slot(values, 1), table.slot(values, 0)"),),
        (
            "tests/losses/test_dpo.py::test_pairs_are_summed_from_tokens",
            "tests/losses/test_golden.py::test_dpo_equals_trl",
        ),
    ),
    "label_smoothing_ignored": Defect(
        "label_smoothing is accepted and changes nothing",
        "burnish.losses.dpo:compute_smoothed_logistic",
        (("if label_smoothing:", "if False:"),),
        ("tests/losses/test_dpo.py::test_t01_label_smoothing_is_conservative_dpo",),
    ),
    "reward_margin_ignored": Defect(
        "the margin column of the data does not reach the reward loss",
        "burnish.losses.reward:compute_bradley_terry_loss",
        (("if margin is not None:", "if False:"),),
        ("tests/methods/test_reward.py::test_the_margin_column_moves_the_loss_but_not_the_accuracy",),
    ),
    "reference_not_frozen": Defect(
        "the reference is the policy itself and moves with it",
        "burnish.models.reference:build_reference",
        (("frozen = copy.deepcopy(policy)", "return Reference(policy, 'copy')"),),
        ("tests/models/test_reference.py::test_three_ways_agree",),
    ),
    "reference_cache_of_other_data": Defect(
        "cached reference log-probs are used for other data",
        "burnish.models.stored:build_stored_key",
        (('"data": fingerprint_groups(groups)', '"data": ""'),),
        ("tests/models/test_reference.py::test_key_holds_every_input",),
    ),
    "positions_do_not_restart": Defect(
        "position ids run on over the completions of a group",
        "burnish.core.batch:build_packed_batch",
        (("positions.append(np.arange(p, p + n))", "positions.append(np.arange(cursor - start, cursor - start + n))"),),
        ("tests/models/test_policy.py::test_r22_position_ids_restart_at_the_prompt",),
    ),
    "head_shifted": Defect(
        "a token is predicted from its own position instead of the one before",
        "burnish.core.batch:build_packed_batch",
        (("np.where(where == 0, start + p - 1, cursor + where - 1)", "cursor + where"),),
        (
            "tests/core/test_batch.py::test_the_row_and_what_predicts_each_token",
            "tests/losses/test_golden.py::test_logprobs_equal_trl",
        ),
    ),
    "mask_off_by_one": Defect(
        "the mask of scored tokens is shifted by one",
        "burnish.data.tokenise:_encode",
        (("completions.append(Tokens(ids, mask))", "completions.append(Tokens(ids, mask[1:] + mask[:1]))"),),
        ("tests/data/test_tokenise.py::test_t18_only_assistant_turns_are_scored",),
    ),
    "masked_tokens_trained": Defect(
        "masked tokens are scored and get gradients",
        "burnish.core.batch:build_packed_batch",
        (("where = np.flatnonzero(c.mask)", "where = np.arange(n)"),),
        ("tests/models/test_policy.py::test_r22_masked_tokens_have_exactly_zero_gradient",),
    ),
    "leak_between_siblings": Defect(
        "a completion attends to the one before it",
        "burnish.core.segments:build_attention_plan",
        (("group.start, prompt_stop) for c in rest", "group.start, first.start + first.length) for c in rest"),),
        ("tests/core/test_attention.py::test_r22_float64_equals_a_dense_mask_to_1e_12",),
    ),
    "kernel_sums_lost": Defect(
        "of the gradient of a norm's weight only the first rows' part is kept, where kernels compute it",
        "burnish.core.kernels.calls:norm_backward",
        (("parts.sum(0)", "parts[0]"),),
        (
            "tests/core/kernels/test_calls.py::test_norm_and_its_gradient",
            "tests/models/test_fuse.py::test_every_gradient_equals_the_modules[kernels-qwen3]",
        ),
    ),
    "changed_settings_resumed": Defect(
        "an interrupted stage goes on with other settings",
        "burnish.pipeline.decide:find_changed",
        (('now = {"settings": _relevant(settings), "inputs"', 'now = {"inputs"'),),
        ("tests/pipeline/test_run.py::test_r18_an_interrupted_stage_with_changed_settings_is_refused",),
    ),
}


def find(where: str) -> Callable[..., Any]:
    """The plain function behind "module:function" or "module:Class.method"."""
    module, _, path = where.partition(":")
    found: Any = importlib.import_module(module)
    for part in path.split("."):
        found = getattr(found, part)
    return inspect.unwrap(found)


def build_code(defect: Defect) -> CodeType:
    """The code of the function with the defect in it; an edit that no longer fits is an error."""
    function = find(defect.where)
    source = textwrap.dedent(inspect.getsource(function))
    for old, new in defect.edits:
        if source.count(old) != 1:
            raise ValueError(f"{defect.where} has no longer exactly one {old!r}: adapt the edit in {__name__}")
        source = source.replace(old, new)
    scope: dict[str, Any] = {}
    exec(
        compile(source, f"<{defect.where}>", "exec", __future__.annotations.compiler_flag), function.__globals__, scope
    )
    return inspect.unwrap(scope[function.__name__]).__code__


def apply(name: str) -> None:
    """Put one defect into this process."""
    find(DEFECTS[name].where).__code__ = build_code(DEFECTS[name])


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

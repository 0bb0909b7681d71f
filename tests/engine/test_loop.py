"""The training loop: resume, guards, evaluation, best checkpoint, early stopping, signals."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.config.stages import DpoSettings, SftSettings
from burnish.core.batch import Outputs, PackedBatch
from burnish.core.group import Group
from burnish.engine.context import StepContext
from burnish.engine.evaluation import run_evaluation
from burnish.engine.job import TrainJob, build_source
from burnish.engine.loop import Trainer, run_training
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.runtime import Runtime
from burnish.engine.source import extend_ledger
from burnish.engine.state import TrainState
from burnish.errors import ConfigError, InterruptedRun, NumericStop, ResourceError
from burnish.models.reference import Reference
from burnish.track.metrics import read_metrics
from tests.engine.tiny import CONTROLLED, MIXES, build_groups, build_method, build_policy, trainable
from tests.losses.drawn import REGISTRY


def make_job(
    folder: Path | None,
    name: str = "sigmoid",
    *,
    n: int = 20,
    held_out: int = 6,
    dtype: torch.dtype = torch.float32,
    **changes,
) -> TrainJob:
    options = {"learning_rate": 1e-2, "batch_size": 4, "num_train_epochs": 2.0, "seed": 5, "save_steps": 3} | changes
    method, head, k, reference = build_method(name)
    settings = DpoSettings(**options) if k == 2 else SftSettings(**options)
    policy = build_policy(head, dtype=dtype)
    needs = "logits" in method.reference or ("logprobs" in method.reference and not reference)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    return TrainJob(
        models={"policy": policy},
        method=method,
        settings=settings,
        source=build_source(settings, build_groups(n, k=k, reference=reference), 1, method),
        held_out=build_groups(held_out, k=k, seed=9, reference=reference) if held_out else [],
        trainable=trainable(policy),
        runtime=Runtime(torch.device("cpu")),
        stage_dir=folder,
        reference=Reference(build_policy(head, dtype=dtype, seed=1), "copy") if needs else None,
    )


class Poisoned:
    """A policy that writes a number into one output of one row: its first scored token, or its first score."""

    def __init__(self, policy: Any, number: float = float("nan")) -> None:
        self.policy, self.number = policy, number
        self.row, self.output, self.slot = "", "", 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.policy, name)

    def __call__(self, batch: PackedBatch, want: frozenset[str], **more: Any) -> Outputs:
        outputs = self.policy(batch, want, **more)
        table = batch.table
        if self.row in table.group_ids:
            own = (table.completion_group == table.group_ids.index(self.row)) & (table.completion_slot == self.slot)
            rows = torch.nonzero(own if self.output == "scores" else own[table.token_completion])[:1, 0]
            if len(rows):
                values = outputs.named()[self.output]
                spoilt = values + torch.zeros_like(values).index_fill(0, rows, self.number)
                outputs = Outputs.from_named(outputs.named() | {self.output: spoilt})
        return outputs


def find_outputs(name: str) -> list[str]:
    """What a method reads of the policy."""
    method = build_method(name)[0]
    return [*sorted(method.want["policy"]), *(f"functionals.{f.name}" for f in method.functionals)]


def snapshot(state: TrainState) -> tuple[dict[str, Any], dict[str, Any]]:
    """(tensors, JSON values) of everything that changes, copied."""
    model, moments, meta = state.to_tree()
    tensors = {n: t.clone() for n, t in {**model, **{f"moment/{n}": t for n, t in moments.items()}}.items()}
    return tensors, json.loads(json.dumps(meta))


def are_same(one: tuple[dict[str, Any], dict[str, Any]], other: tuple[dict[str, Any], dict[str, Any]]) -> bool:
    tensors = one[0].keys() == other[0].keys() and all(torch.equal(t, other[0][n]) for n, t in one[0].items())
    return tensors and one[1] == other[1]


SPOILS = [(10_000, math.nan), (30, math.nan), (30, math.inf), (10_000, -math.inf)]  # micro_batch_tokens, number


@pytest.mark.parametrize(
    ("name", "output"), [(name, output) for name in [*REGISTRY, *MIXES, *CONTROLLED] for output in find_outputs(name)]
)
def test_t11_a_non_finite_row_is_named_and_moves_nothing(name, output):
    """T-11, R-05: for every loss, and every number that it reads of the policy, in one micro-batch or several.

    Infinities too, which a loss that saturates would hide. That row alone is named, whichever rows it is compared with; parameters, moments, schedule, controller and running state
    are those of the step before. The same step without it moves them.
    """
    job = make_job(None, name, n=8, held_out=0, num_train_epochs=1.0)
    policy = Poisoned(job.models["policy"])
    job.models = {"policy": policy}
    trainer = Trainer(job)
    assert trainer._apply(trainer._compute_gradient(trainer.source.step(0))).applied
    before, data = snapshot(trainer.state), trainer.source.step(1)
    assert before[0] and any(n.startswith("moment/") for n in before[0])
    policy.row, policy.output = data.groups[2].id, output
    for trainer.state.counters.budget_limit, policy.number in SPOILS:
        gradient = trainer._compute_gradient(data)
        assert (gradient.bad, gradient.figures, gradient.state) == ([policy.row], {}, None)
        assert gradient.terms
        assert not trainer._apply(gradient).applied
        assert are_same(snapshot(trainer.state), before)
    policy.row = ""
    assert trainer._apply(trainer._compute_gradient(data)).applied
    after = snapshot(trainer.state)
    assert not are_same(after, before)
    assert not job.method.state or after[1]["method"] != before[1]["method"]


@pytest.mark.parametrize("slot", [0, 1])
def test_t11_a_kto_row_is_named_also_where_only_its_partner_is_not_finite(slot):
    """A partner enters the baseline of all rows; TRL's NaN-skipping mean gives a normal loss and a NaN gradient."""
    job = make_job(None, "kto kto", n=8, held_out=0)
    policy = Poisoned(job.models["policy"])
    job.models = {"policy": policy}
    trainer = Trainer(job)
    data, before = trainer.source.step(0), snapshot(trainer.state)
    policy.row, policy.output, policy.slot = data.groups[1].id, "logprobs", slot
    for trainer.state.counters.budget_limit, policy.number in SPOILS:
        gradient = trainer._compute_gradient(data)
        assert (gradient.bad, gradient.figures) == ([policy.row], {})
        assert not trainer._apply(gradient).applied and are_same(snapshot(trainer.state), before)


@pytest.mark.parametrize("name", ["sigmoid", "dpo aot", "kto kto"])
def test_t11_a_row_whose_reference_is_not_finite_is_named(name):
    """Stored log-probs of a reference are watched like the policy's own, in one micro-batch or several."""
    job = make_job(None, name, n=8, held_out=0)
    trainer = Trainer(job)
    data = trainer.source.step(0)
    own = data.groups[2].completions[-1]
    columns = {"ref_logprobs": np.full(len(own.ids), np.nan, np.float32)}
    for group in data.groups:
        for completion in group.completions:
            completion.token_columns.setdefault("ref_logprobs", np.full(len(completion.ids), -3.0, np.float32))  # type: ignore[attr-defined]
    spoilt = replace(
        data.groups[2], completions=(*data.groups[2].completions[:-1], replace(own, token_columns=columns))
    )
    data = replace(data, groups=[*data.groups[:2], spoilt, *data.groups[3:]])
    for trainer.state.counters.budget_limit in (10_000, 30):
        assert trainer._compute_gradient(data).bad == [spoilt.id]


def digest(job: TrainJob) -> str:
    chain = hashlib.sha256()
    for name, parameter in sorted(job.trainable.items()):
        chain.update(name.encode())
        chain.update(parameter.detach().numpy().tobytes())
    return chain.hexdigest()


def finish(job: TrainJob) -> tuple[str, bytes]:
    run_training(job)
    assert job.stage_dir is not None
    return digest(job), (job.stage_dir / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("name", ["sft", "sigmoid", "coupled", "dpo bco_pair"])
@pytest.mark.parametrize("step", [1, 4, 7, 10])
def test_s1_11_a_resumed_stage_ends_with_the_same_bits(tmp_path, name, step, arm_fault):
    """S1-11, S4-05: stopped after any step and resumed = never stopped: parameters and metrics byte for byte."""
    expected = finish(make_job(tmp_path / "a", name, eval_steps=2))
    arm_fault(f"loop.after_step:{step}:raise")
    job = make_job(tmp_path / "b", name, eval_steps=2)
    with pytest.raises(RuntimeError, match="fault injected"):
        run_training(job)
    arm_fault("")
    resumed = make_job(tmp_path / "b", name, eval_steps=2)
    resumed.resume = True
    assert finish(resumed) == expected


@pytest.mark.parametrize("name", ["sigmoid", "kto kto", "dpo bco_pair"])
def test_r31_other_micro_batches_read_the_same_samples(tmp_path, name, monkeypatch, caplog, arm_fault):
    """R-31: 8 to 4 in a micro-batch at a global batch of 8, after step 4 of 9: the ledger is that of a calm run.

    Each sample exactly once an epoch, the same global batches in the same order, equal parameters up to the rounding of fp64,
    and a warning that their bits may differ.
    """
    options = {
        "n": 20,
        "batch_size": 8,
        "num_train_epochs": 3.0,
        "save_steps": 4,
        "dtype": torch.float64,
        "held_out": 0,
    }
    batches: list[list[str]] = []

    def note(ledger: str, groups: Sequence[Group]) -> str:
        batches.append([group.id for group in groups])
        return extend_ledger(ledger, groups)

    monkeypatch.setattr("burnish.engine.loop.extend_ledger", note)
    calm = make_job(tmp_path / "calm", name, per_device_train_batch_size=8, **options)
    expected, want = run_training(calm), batches.copy()
    assert [len(b) for b in want] == [8, 8, 4] * 3
    batches.clear()
    arm_fault("loop.after_step:5:raise")
    with pytest.raises(RuntimeError, match="fault injected"):
        run_training(make_job(tmp_path / "cut", name, per_device_train_batch_size=8, **options))
    arm_fault("")
    second = make_job(tmp_path / "cut", name, per_device_train_batch_size=4, **options)
    second.resume = True
    found = run_training(second)
    assert found.resumed_from == 4 and found.ledger == expected.ledger
    assert batches == want
    for epoch in range(3):
        rows = [row for batch in batches[3 * epoch : 3 * epoch + 3] for row in batch]
        assert sorted(rows) == sorted(group.id for group in calm.source.groups)
    for key, parameter in calm.trainable.items():
        torch.testing.assert_close(second.trainable[key], parameter, rtol=0, atol=1e-8)
    text = "resuming with 8192 tokens, 4 examples in a micro-batch, not 8192 tokens, 8 examples: results will not be bit-equal"
    assert [r.message for r in caplog.records if "bit-equal" in r.message] == [text]


def test_r12_logging_evaluating_and_saving_move_nothing(tmp_path):
    """R-12: other intervals of logging, evaluation and saving: the same parameters."""
    a = finish(make_job(tmp_path / "a"))[0]
    b = finish(make_job(tmp_path / "b", eval_steps=1, save_steps=1, logging_steps=5, eval_on_start=True))[0]
    assert a == b


def test_t37_global_random_state_is_left_alone(tmp_path):
    """T-37: training draws from its own streams and puts the global one back."""
    torch.manual_seed(11)
    before = torch.get_rng_state()
    run_training(make_job(tmp_path / "a", n=8))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("place", ["step.nan_loss", "step.nan_logprobs", "step.nan_gradient"])
def test_r05_a_nan_changes_no_parameter(tmp_path, place, arm_fault):
    """R-05, T-30: the step is skipped and logged with its rows; parameters, moments and schedule stay."""
    job = make_job(tmp_path / "a", num_train_epochs=1.0, max_steps=3)
    seen: list[str] = []
    job.on_step = lambda step, figures, seconds: seen.append(digest(job))
    arm_fault(f"{place}:2:nan")
    outcome = run_training(job)
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert (outcome.steps, outcome.updates) == (3, 2)
    assert [r["kind"] for r in rows] == ["train", "skipped", "train", "eval"]
    assert rows[1]["step"] == 2
    assert all(r.startswith("row:") for r in rows[1]["rows"])
    assert all(r["loss"] == r["loss"] and r["loss"] != 0 for r in rows if r["kind"] == "train")
    twin = make_job(tmp_path / "b", num_train_epochs=1.0, max_steps=1)
    run_training(twin)
    assert seen[0] == digest(twin)


def test_r05_three_bad_steps_in_a_row_stop_with_the_last_good_state(tmp_path):
    """R-05: exit status 4, a remedy, and a checkpoint of the parameters before."""
    job = make_job(tmp_path / "a", held_out=0)
    before = digest(job)
    for group in job.source.groups:
        for completion in group.completions:
            completion.token_columns["ref_logprobs"][:] = float("nan")
    with pytest.raises(NumericStop) as caught:
        run_training(job)
    assert caught.value.exit_code == 4
    assert "row:" in caught.value.message
    assert "learning_rate" in caught.value.remedy
    assert digest(job) == before
    assert [c.step for c in list_checkpoints(tmp_path / "a")] == [3]


def test_max_bad_steps_one_stops_at_the_first(tmp_path, arm_fault):
    arm_fault("step.nan_loss:2:nan")
    with pytest.raises(NumericStop):
        run_training(make_job(tmp_path / "a", max_bad_steps=1))


def test_s1_10_retention_best_and_early_stopping(tmp_path):
    """S1-10: save_total_limit keeps the newest and the best; load_best_model_at_end; early stopping really stops."""
    job = make_job(
        tmp_path / "a",
        num_train_epochs=20.0,
        learning_rate=0.05,
        eval_steps=2,
        save_steps=2,
        save_total_limit=1,
        load_best_model_at_end=True,
        early_stopping_patience=2,
    )
    outcome = run_training(job)
    assert outcome.stopped_early
    assert outcome.steps < 100
    rows = [r for r in read_metrics(tmp_path / "a" / "metrics.jsonl")[0] if r["kind"] == "eval"]
    best = min(rows, key=lambda r: r["eval_loss"])
    assert outcome.best_step == best["step"]
    assert rows[-1]["step"] == outcome.steps == best["step"] + 4
    assert {c.step for c in list_checkpoints(tmp_path / "a")} == {best["step"], outcome.steps}
    twin = make_job(tmp_path / "b", num_train_epochs=20.0, learning_rate=0.05, max_steps=-1, held_out=0)
    stopped = {}
    twin.on_step = lambda step, figures, seconds: stopped.setdefault(step + 1, digest(twin))
    run_training(twin)
    assert digest(job) == stopped[best["step"]]


@pytest.mark.parametrize(("every", "expected"), [(-1, [10]), (0, [5, 10]), (4, [4, 8, 10])])
def test_s4_18_evaluation_intervals(tmp_path, every, expected):
    """S4-18: −1 = only at the end, 0 = at epoch ends, N = every N steps."""
    run_training(make_job(tmp_path / "a", eval_steps=every))
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert [r["step"] for r in rows if r["kind"] == "eval"] == expected


def test_eval_on_start(tmp_path):
    run_training(make_job(tmp_path / "a", eval_on_start=True))
    rows = read_metrics(tmp_path / "a" / "metrics.jsonl")[0]
    assert (rows[0]["kind"], rows[0]["step"]) == ("eval", 0)


def test_an_unknown_best_metric_says_which_there_are(tmp_path):
    with pytest.raises(ConfigError, match="eval_loss"):
        run_training(make_job(tmp_path / "a", metric_for_best_model="eval_bleu"))


@pytest.mark.parametrize("budget", ["auto", 40, 15])
def test_t33_evaluation_is_the_same_for_every_batch_size(tmp_path, budget):
    """T-33: held-out figures are sums over the set, not means of batch means."""
    found = run_training(make_job(tmp_path / str(budget), max_steps=1, micro_batch_tokens=10_000)).evaluation
    again = run_training(make_job(tmp_path / f"{budget}b", max_steps=1, micro_batch_tokens=10_000))
    assert found == again.evaluation
    other = make_job(tmp_path / f"{budget}c", max_steps=1, micro_batch_tokens=10_000)
    run_training(other)
    ctx = StepContext(other.models, other.method, build_parallel(other.runtime), list(other.trainable.values()), seed=0)
    small = run_evaluation(ctx, other.held_out, {}, budget=10_000 if budget == "auto" else budget, cap=None)
    assert small == pytest.approx({k: v for k, v in found.items() if k != "step"}, rel=1e-5)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_s4_06_a_signal_saves_the_current_step(tmp_path, signum):
    """S4-06, R-13: Ctrl-C and SIGTERM save the current step and say how to go on; resume ends with the same bits."""
    expected = finish(make_job(tmp_path / "a"))
    job = make_job(tmp_path / "b")
    job.on_step = lambda step, figures, seconds: os.kill(os.getpid(), signum) if step == 3 else None
    with pytest.raises(InterruptedRun) as caught:
        run_training(job)
    assert caught.value.exit_code == 128 + signum
    assert list_checkpoints(tmp_path / "b")[-1].step == 4
    again = make_job(tmp_path / "b")
    again.resume = True
    assert finish(again) == expected


def test_r03_a_damaged_checkpoint_is_named_and_the_one_before_used(tmp_path, caplog):
    """R-03: a flipped byte is found by the hash; same bits in the end; with none left: an error, no fresh start."""
    expected = finish(make_job(tmp_path / "a"))
    run_training(make_job(tmp_path / "b", save_total_limit=0))
    for step in (9, 10):
        shutil.rmtree(tmp_path / "b" / f"checkpoint-{step}")
    file = tmp_path / "b" / "checkpoint-6" / "optimizer.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    again = make_job(tmp_path / "b")
    again.resume = True
    assert finish(again)[0] == expected[0]
    assert any("checkpoint-6" in r.message for r in caplog.records)
    for ref in list_checkpoints(tmp_path / "b"):
        (ref.path / "state.json").write_text("{}")
    last = make_job(tmp_path / "b")
    last.resume = True
    with pytest.raises(ResourceError, match="damaged"):
        run_training(last)


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run_training(make_job(tmp_path / "a", max_steps=3))
    state = json.loads((tmp_path / "a" / "checkpoint-3" / "state.json").read_text())
    assert state["counters"]["step"] == 3
    other = make_job(tmp_path / "a")
    other.trainable = dict(list(other.trainable.items())[:-1])
    other.resume = True
    with pytest.raises(ResourceError, match="do not fit"):
        run_training(other)


def test_s2_11_state_is_saved_when_training_fails(tmp_path):
    """S2-11: an exception in the middle leaves a checkpoint of the current step."""
    job = make_job(tmp_path / "a")

    def fail(step, figures, seconds):
        if step == 4:
            raise ValueError("boom")

    job.on_step = fail
    with pytest.raises(ValueError, match="boom"):
        run_training(job)
    assert list_checkpoints(tmp_path / "a")[-1].step == 5


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_holds_while_training_only(tmp_path, wanted):
    job = make_job(tmp_path / "a", max_steps=1, deterministic=wanted)
    seen: list[bool] = []
    job.on_step = lambda step, figures, seconds: seen.append(torch.are_deterministic_algorithms_enabled())
    run_training(job)
    assert seen == [wanted]
    assert not torch.are_deterministic_algorithms_enabled()

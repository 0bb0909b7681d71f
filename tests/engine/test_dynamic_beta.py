"""β that moves, in training: resume to the bit, plain DPO when it may not move, evaluation that moves nothing."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from burnish.config.dynamic_beta import DynamicBetaSettings, MarginRecordSettings
from burnish.engine.job import TrainJob
from burnish.engine.loop import Trainer, run_training
from burnish.methods.dpo import Dpo
from burnish.track.margins import MARGINS
from burnish.track.metrics import read_metrics
from tests.engine.test_loop import digest, finish, make_job
from tests.engine.tiny import CONTROLLED


def build_job(folder: Path | None, dynamic: dict[str, Any] | None, **changes: Any) -> TrainJob:
    if dynamic is not None:
        changes["dynamic_beta"] = DynamicBetaSettings.model_validate(dynamic)
    job = make_job(folder, "sigmoid", **changes)
    job.method = Dpo(job.settings)  # pyright: ignore[reportArgumentType]
    return job


def read_all(folder: Path) -> dict[str, bytes]:
    """margins.jsonl and the vectors."""
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.glob("margins*/*"))} | {
        MARGINS: (folder / MARGINS).read_bytes()
    }


@pytest.mark.parametrize("name", CONTROLLED)
@pytest.mark.parametrize("step", [2, 8])
def test_s0_15_a_resumed_stage_has_the_same_beta_and_the_same_records(tmp_path, name, step, arm_fault):
    """S0-14, S0-15: parameters, metrics, margins.jsonl and vectors byte for byte; two rows of steps that are done again go."""
    changes = {"eval_steps": 3, "margin_records": MarginRecordSettings(vectors=True, sample=3)}
    expected = finish(build_job(tmp_path / "a", CONTROLLED[name], **changes))
    records = read_all(tmp_path / "a")
    assert len(records) == 11
    arm_fault(f"loop.after_step:{step}:raise")
    with pytest.raises(RuntimeError, match="fault injected"):
        run_training(build_job(tmp_path / "b", CONTROLLED[name], **changes))
    arm_fault("")
    with (tmp_path / "b" / MARGINS).open("ab") as file:
        file.write(b'{"step": 99}\n{"step": 100, "me')
    again = build_job(tmp_path / "b", CONTROLLED[name], **changes)
    again.resume = True
    assert finish(again) == expected
    assert read_all(tmp_path / "b") == records


STILL = {
    "risk": {"type": "risk", "alpha": 0.0, "warmup": 1},
    "risk, pairs": {"type": "risk", "alpha": 0.0, "warmup": 1, "estimator": "ema", "unit": {"pairs": 3}},
    "beta_dpo": {"type": "beta_dpo", "alpha": 0.0, "keep": 1.0},
    "beta_dpo, pairs": {"type": "beta_dpo", "alpha": 0.0, "keep": 1.0, "unit": {"pairs": 2}, "level": "instance"},
    "constant": {"type": "constant"},
}


@pytest.mark.parametrize("name", STILL)
def test_s0_06_a_beta_that_may_not_move_is_plain_dpo_bit_for_bit(tmp_path, name):
    """S0-06, S0-23: α = 0: the same parameters (SHA-256), several micro-batches in a step; yet the controller measures."""
    plain = build_job(tmp_path / "a", None, micro_batch_tokens=60)
    run_training(plain)
    still = build_job(tmp_path / "b", STILL[name], micro_batch_tokens=60)
    assert not still.method.coupled
    run_training(still)
    assert digest(still) == digest(plain)
    rows = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    if name != "constant":
        assert {r["dpo/beta"] for r in rows if r["kind"] == "train"} == {0.1}
        measured = "risk/p_hat" if "risk" in name else "beta_dpo/mean"
        assert any(measured in r for r in rows)


def test_s0_06_a_beta_that_moves_is_not_plain_dpo(tmp_path):
    digests = set()
    for name, dynamic in {"plain": None, **CONTROLLED}.items():
        job = build_job(None, dynamic, held_out=0)
        run_training(job)
        digests.add(digest(job))
        assert len(digests) > 1 or name == "plain"
    assert len(digests) == 1 + len(CONTROLLED)


@pytest.mark.parametrize("name", CONTROLLED)
def test_evaluation_uses_the_beta_of_the_moment_and_moves_nothing(tmp_path, name):
    """S0-23: running moments, τ and β stay as they are in evaluation; so training does not know how often it is evaluated."""
    seldom = build_job(tmp_path / "a", CONTROLLED[name], eval_steps=-1)
    run_training(seldom)
    often = build_job(tmp_path / "b", CONTROLLED[name], eval_steps=1, eval_on_start=True, logging_steps=3)
    run_training(often)
    assert digest(seldom) == digest(often)
    assert read_all(tmp_path / "a") == read_all(tmp_path / "b")
    small = build_job(tmp_path / "c", CONTROLLED[name], micro_batch_tokens=10_000, max_steps=4)
    trainer = Trainer(small)
    trainer.run()
    figures = {k: v for k, v in trainer.record.evaluation.items() if k != "step"}
    before = json.dumps(trainer.state.method)
    trainer.state.counters.budget_limit = 30
    trainer._evaluate()
    assert json.dumps(trainer.state.method) == before
    assert {k: v for k, v in trainer.record.evaluation.items() if k != "step"} == pytest.approx(figures, rel=1e-5)


def test_s0_07_a_step_uses_the_beta_from_before_it(tmp_path):
    """S0-07: the loss of step t is made with β_t; the record of step t names β_t as used and β_{t+1} as what follows."""
    job = build_job(tmp_path / "a", CONTROLLED["risk"])
    run_training(job)
    rows = read_metrics(tmp_path / "a" / MARGINS)[0]
    for row, after in pairwise(rows):
        assert row["controller"]["beta"] == after["beta_used"] != row["beta_used"]
    metrics = [r for r in read_metrics(tmp_path / "a" / "metrics.jsonl")[0] if r["kind"] == "train"]
    for row, metric in zip(rows, metrics, strict=True):
        assert metric["rewards/margins"] == pytest.approx(row["beta_used"] * row["mean"], rel=1e-5)


def test_s0_16_scalars_are_logged(tmp_path):
    """S0-16: dpo/* and risk/* are in metrics.jsonl, and so in every further sink."""
    seen: list[dict[str, Any]] = []
    job = build_job(tmp_path / "a", CONTROLLED["risk"])
    job.sinks = (lambda row: seen.append(dict(row)),)
    run_training(job)
    row = [r for r in seen if r["kind"] == "train"][-1]
    names = {"dpo/beta", "dpo/margin_mean", "dpo/loss"} | {f"risk/{n}" for n in ("p_hat", "tau", "fail", "u_k", "s_k")}
    assert names <= row.keys()
    assert row["dpo/loss"] == row["loss"] and 0 <= row["risk/p_hat"] <= 1


def test_a_step_that_is_skipped_moves_no_beta(tmp_path, arm_fault):
    """R-05 for controllers: after a non-finite step β, τ and the records are as if it had not been."""
    arm_fault("step.nan_loss:4:nan")
    job = build_job(tmp_path / "a", CONTROLLED["risk"], held_out=0)
    run_training(job)
    rows = read_metrics(tmp_path / "a" / MARGINS)[0]
    assert [r["step"] for r in rows] == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    assert rows[2]["controller"]["beta"] == rows[3]["beta_used"]
    assert rows[-1]["controller"]["units"] == 9


def test_s0_11_accumulation_moves_the_controller_once_a_step(tmp_path):
    """S0-10, S0-11: n in u is the whole step's; micro-batches of one pair or all: the same controller, once a step."""
    found = []
    for cap in (1, 2, 4):
        job = build_job(tmp_path / str(cap), CONTROLLED["risk"], per_device_train_batch_size=cap, held_out=0)
        run_training(job)
        rows = read_metrics(tmp_path / str(cap) / MARGINS)[0]
        assert [r["controller"]["units"] for r in rows] == list(range(1, 11))
        assert {r["batch_size"] for r in rows} == {4}
        found.append([r["beta_used"] for r in rows])
    assert found[1] == pytest.approx(found[0], rel=1e-4) and found[2] == pytest.approx(found[0], rel=1e-4)


def test_s0_14_full_vectors_hold_the_whole_step(tmp_path):
    """S0-14: one file a step, never overwritten by its micro-batches, agreeing with the summary; a sample as long as wanted."""
    records = MarginRecordSettings(vectors=True, sample=2)
    job = build_job(tmp_path / "a", None, micro_batch_tokens=20, margin_records=records, held_out=0)
    run_training(job)
    rows = read_metrics(tmp_path / "a" / MARGINS)[0]
    assert len({r["npy"] for r in rows}) == len(rows) == 10
    for row in rows:
        margins = np.load(tmp_path / "a" / row["npy"])
        assert margins.shape == (4,) and row["batch_size"] == 4
        assert row["sample"] == margins[:2].tolist()
        assert row["mean"] == margins.mean() and row["std"] == margins.std() and row["max"] == margins.max()
        assert (row["p10"], row["p90"]) == tuple(np.quantile(margins, [0.1, 0.9]))
    off = build_job(tmp_path / "b", None, margin_records=None, held_out=0)
    run_training(off)
    assert not (tmp_path / "b" / MARGINS).exists()
    metrics = read_metrics(tmp_path / "b" / "metrics.jsonl")[0]
    assert all("margins/zero_share" in r for r in metrics), "the health figure does not need the records"


def test_s0_14_a_long_run_of_zeros_is_said_once_and_loudly(tmp_path, caplog):
    """A policy that stays its reference: |M| < 1e-5 for more than ten steps; the first steps say nothing."""
    job = build_job(tmp_path / "a", CONTROLLED["risk"], held_out=0, learning_rate=1e-12, num_train_epochs=3.0)
    from burnish.models.reference import attach_table, compute_reference_table

    table = compute_reference_table(build_reference_of(job), job.source.groups, budget=10_000)
    job.source.groups = attach_table(job.source.groups, table)
    run_training(job)
    said = [r.getMessage() for r in caplog.records if "margins are 0" in r.getMessage()]
    assert len(said) == 1 and said[0].startswith("step 11: 100 % of the margins are 0")
    held = [r.getMessage() for r in caplog.records if "all equal" in r.getMessage()]
    assert len(held) == 1 and held[0].startswith("step 11")
    rows = read_metrics(tmp_path / "a" / MARGINS)[0]
    assert {r["zero_frac"] for r in rows} == {1.0}
    assert {r["beta_used"] for r in rows} == {0.1}, "S0-13: the controller held"


def build_reference_of(job: TrainJob):
    from burnish.models.reference import build_reference

    return build_reference(job.models["policy"], "copy")

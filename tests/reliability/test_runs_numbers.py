"""R-05, R-12: numbers that are none change nothing; the same recipe gives the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.artifacts.checkpoints import list_checkpoints
from burnish.core.kernels.build import Kernels, load_kernels
from burnish.engine.loop import Trainer
from burnish.errors import NumericStop
from burnish.track.metrics import read_metrics
from tests.engine.test_loop import make_job
from tests.pipeline.test_kill import build_command, compute_digest, run_until_done
from tests.waiting import BOUND

PLACES = {"sft": "logprobs", "reward": "scores", "sigmoid": "logprobs", "coupled": "logprobs"}
OPTIONS: dict[str, Any] = {"num_train_epochs": 4.0, "lr_scheduler_type": "constant", "save_steps": 1000}


def compute_state(trainer: Trainer) -> str:
    """SHA-256 over parameters, moments, schedule position, the method's own state and the scale."""
    model, moments, values = trainer.state.to_tree()
    chain = hashlib.sha256()
    for tree in (model, moments):
        for name in sorted(tree):
            chain.update(name.encode() + tree[name].detach().cpu().contiguous().numpy().tobytes())
    counters = values["counters"]
    kept = {k: values[k] for k in ("method", "scale", "optimizer")} | {"updates": counters["updates"]}
    chain.update(json.dumps(kept, sort_keys=True).encode())
    return chain.hexdigest()


def train(folder: Path, name: str, steps: int, **options: Any) -> Trainer:
    trainer = Trainer(make_job(folder, name, held_out=0, **(OPTIONS | {"max_steps": steps} | options)))
    trainer.run()
    return trainer


def check_bad_step(tmp_path: Path, arm_fault, name: str, place: str, number: str) -> None:
    """State after [good, bad] == state after [good]; the bad step is logged with its rows and terms."""
    arm_fault("")
    good = compute_state(train(tmp_path / "good", name, 1))
    arm_fault(f"step.nan_{place}:2:{number}")
    bad = train(tmp_path / "bad", name, 2)
    assert compute_state(bad) == good
    rows = read_metrics(tmp_path / "bad" / "metrics.jsonl")[0]
    assert [r["kind"] for r in rows] == ["train", "skipped"]
    assert rows[1]["rows"] and all(r.startswith("row:") for r in rows[1]["rows"])
    assert rows[1]["what"] == ("gradient" if place == "gradient" else "loss")
    assert bool(rows[1]["terms"]) == (place != "gradient")
    assert (bad.state.counters.step, bad.state.counters.updates, bad.state.counters.bad_steps) == (2, 1, 1)


def test_r05_one_bad_log_prob_of_a_method_with_state(tmp_path, arm_fault):
    """R-05: parameters, moments, schedule and the controller of a coupled loss stay."""
    check_bad_step(tmp_path, arm_fault, "coupled", "logprobs", "nan")


@pytest.mark.slow
@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize("place", ["loss", "outputs", "gradient"])
@pytest.mark.parametrize("name", PLACES)
def test_r05_nan_and_inf_at_every_place_of_every_stage(tmp_path, arm_fault, name, place, number):
    """R-05: loss, log-probs or scores, gradient × sft, reward, dpo, coupled × NaN, Inf: nothing changes."""
    check_bad_step(tmp_path, arm_fault, name, PLACES[name] if place == "outputs" else place, number)


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("name", PLACES)
def test_r05_so_many_bad_steps_in_a_row_stop(tmp_path, monkeypatch, name, limit):
    """R-05: n in a row: exit 4, a remedy, the last good state saved; good steps between reset the count."""
    good = compute_state(train(tmp_path / "good", name, 2))
    job = make_job(tmp_path / "bad", name, held_out=0, **(OPTIONS | {"max_bad_steps": limit}))
    trainer = Trainer(job)
    finish = trainer.parallel.finish

    def spoil(parameters, scale) -> torch.Tensor:
        norm = finish(parameters, scale)
        if trainer.state.counters.step < 2:
            return norm
        next(p.grad for p in trainer.parameters if p.grad is not None).view(-1)[0] = float("inf")
        return norm * float("inf")

    monkeypatch.setattr(trainer.parallel, "finish", spoil)
    with pytest.raises(NumericStop) as caught:
        trainer.run()
    assert caught.value.exit_code == 4 and caught.value.remedy
    assert trainer.state.counters.bad_steps == limit
    assert compute_state(trainer) == good
    assert [c.step for c in list_checkpoints(tmp_path / "bad")] == [2 + limit]


@pytest.mark.slow
@pytest.mark.dist
def test_r05_all_processes_decide_alike(inputs, tmp_path):
    """R-05: NaN on rank 1 only: both skip the step, and the run ends with nine updates of ten."""
    command = build_command(inputs, "dpo", False, tmp_path)
    env = os.environ | {"BURNISH_TESTING": "1", "OMP_NUM_THREADS": "1", "BURNISH_FAULT": "step.nan_loss:3:nan@1"}
    command = [sys.executable, "-m", "burnish", *command, "--num-processes", "2"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=BOUND)
    assert done.returncode == 0, done.stderr[-3000:]
    stage = tmp_path / "run" / "01-dpo"
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows if r["kind"] == "skipped"] == [3]
    assert json.loads((stage / "stage.json").read_text())["figures"]["updates"] == 9


# ---------------------------------------------------------------------------------------------------------------


def check_twice(server, inputs: Path, folder: Path, kind: str, lora: bool) -> None:
    """Two folders; other intervals of logging, evaluating, saving; another name: the same weights, the same rows."""
    plain, other = folder / "plain", folder / "an other"
    run_until_done(server, build_command(inputs, kind, lora, plain), plain, [{}])
    again = folder / "again"
    run_until_done(server, build_command(inputs, kind, lora, again), again, [{}])
    assert compute_digest(plain / "run") == compute_digest(again / "run")
    command = build_command(inputs, kind, lora, other)
    for flag, value in (("--save-steps", "1"), ("--eval-steps", "1"), ("--run-name", "run")):
        command[command.index(flag) + 1] = value
    run_until_done(
        server, [*command, "--logging-steps", "3", "--eval-on-start", "--save-total-limit", "1"], other, [{}]
    )
    found, expected = compute_digest(other / "run"), compute_digest(plain / "run")
    weights = [name for name in expected if name.endswith(".safetensors")]
    assert len(weights) >= 3 and [found[n] for n in weights] == [expected[n] for n in weights]


def test_r12_the_same_recipe_twice_gives_the_same_bits(server, inputs, tmp_path):
    """R-12: dpo with an adapter."""
    check_twice(server, inputs, tmp_path, "dpo", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora"), [("sft", False), ("sft", True), ("reward", False), ("reward", True), ("dpo", False)]
)
def test_r12_every_stage_twice(server, inputs, tmp_path, kind, lora):
    """R-12: every kind of stage, full and with an adapter."""
    check_twice(server, inputs, tmp_path, kind, lora)


def test_r12_evaluating_between_moves_nothing(tmp_path):
    """R-12: with dropout, whose draws would show it: an evaluation at every step leaves the weights as they are."""
    digests = []
    for name, options in (("plain", {}), ("busy", {"eval_steps": 1, "eval_on_start": True, "logging_steps": 2})):
        job = make_job(tmp_path / name, "sft", max_steps=5, save_steps=2 if options else 1000, **options)
        for module in job.models["policy"].modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.2
        trainer = Trainer(job)
        trainer.run()
        digests.append(compute_state(trainer))
        torch.rand(3)
    assert digests[0] == digests[1]


def test_r12_threads_are_recorded_and_another_number_warns(tmp_path, caplog, monkeypatch):
    """R-12: a resume under another number of threads says that bit-equality is off."""
    job = make_job(tmp_path / "a", max_steps=2, save_steps=1)
    Trainer(job).run()
    ref = list_checkpoints(tmp_path / "a")[-1]
    assert ref.manifest.meta["threads"] == torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    again = make_job(tmp_path / "a", max_steps=3, save_steps=1)
    again.resume = True
    Trainer(again).run()
    assert any("64 threads" in r.message and "not be bit-equal" in r.message for r in caplog.records)


def test_r12_kernels_are_recorded_and_others_warn(tmp_path, caplog, monkeypatch):
    """R-12: a resume with other C kernels, or without them, says that bit-equality is off."""
    job = make_job(tmp_path / "a", max_steps=2, save_steps=1)
    Trainer(job).run()
    now = list_checkpoints(tmp_path / "a")[-1].manifest.meta["kernels"]
    assert now == load_kernels().identity
    monkeypatch.setattr("burnish.engine.saves.load_kernels", lambda: Kernels(None, "none: no compiler", "other"))
    again = make_job(tmp_path / "a", max_steps=3, save_steps=1)
    again.resume = True
    Trainer(again).run()
    text = f"resuming with C kernels other, not {now}: results will not be bit-equal"
    assert text in [r.message for r in caplog.records]

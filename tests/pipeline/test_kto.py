"""KTO as a stage (S3-22): labels and pairs, partners of every epoch in the reference's cache, kill and resume."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from burnish.cli.main import main
from burnish.core.group import Group
from burnish.engine.job import TrainJob
from burnish.pipeline import train_stage
from tests.forkserver import ForkServer
from tests.pipeline.test_kill import compute_digest, run_until_done


def build_command(inputs: Path, out: Path, *more: str, data: Path | None = None) -> list[str]:
    command = [
        "kto",
        "--model",
        str(inputs / "model"),
        "--data",
        str(data or inputs / "pairs.jsonl"),
        "--output-dir",
        str(out),
    ]
    command += ["--run-name", "run", "--batch-size", "8", "--num-train-epochs", "2", "--learning-rate", "1e-3"]
    return [*command, "--precision", "fp32", "--seed", "3", "--save-steps", "3", *more]


def read_rows(out: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (out / "run" / "01-kto" / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("kind") == kind]


def test_the_reference_is_the_same_cached_and_live(inputs: Path, tmp_path: Path) -> None:
    """Partners change from epoch to epoch: 36 rows, 5 steps an epoch, 2 epochs, and held-out rows in one order."""
    for mode in ("cached", "copy"):
        command = build_command(inputs, tmp_path / mode, "--reference-mode", mode, "--validation-split", "0.25")
        command += ["--undesirable-weight", "0"]  # all answers become likelier, so the baseline leaves 0
        assert main([*command, "--eval-steps", "0"]) == 0
    cached, live = (
        load_file(next((tmp_path / m / "run" / "01-kto" / "final").glob("*.safetensors"))) for m in ("cached", "copy")
    )
    for name, weight in cached.items():
        torch.testing.assert_close(weight, live[name], rtol=0, atol=1e-5)
    for kind in ("train", "eval"):
        one, other = read_rows(tmp_path / "cached", kind), read_rows(tmp_path / "copy", kind)
        assert len(one) == len(other) > 0
        for a, b in zip(one, other, strict=True):
            assert {n: a[n] for n in a} == pytest.approx({n: b[n] for n in a}, abs=1e-4)
    assert any(row["kl"] > 0 for row in read_rows(tmp_path / "cached"))
    folders = list((tmp_path / "cached" / "run" / "01-kto" / "reference").glob("reference-*"))
    assert len(folders) == 3, "one for each epoch and one for the held-out rows"


def test_t11_a_nan_row_stops_the_stage_before_anything_moves(
    inputs: Path, tmp_path: Path, arm_fault: Callable[[str], None], capfd: pytest.CaptureFixture[str]
) -> None:
    """In the third step a row's log-prob becomes NaN: exit 4 with its name; the state is that of the second step."""
    more = (
        "--per-device-train-batch-size",
        "1",
        "--max-bad-steps",
        "1",
        "--save-steps",
        "1",
        "--save-total-limit",
        "0",
    )
    arm_fault("step.nan_logprobs:33:nan")  # 2 steps of 8 rows, each forwarded for its coefficient and for its gradient
    assert main(build_command(inputs, tmp_path, *more)) == 4
    error = capfd.readouterr().err
    stage = tmp_path / "run" / "01-kto"
    (row,) = read_rows(tmp_path, "skipped")
    assert (row["step"], row["what"], row["terms"], len(row["rows"])) == (3, "loss", ["kto"], 1)
    assert row["rows"][0].startswith("pairs.jsonl:") and row["rows"][0] in error
    assert [r["step"] for r in read_rows(tmp_path)] == [1, 2]
    good, stopped = (load_file(stage / f"checkpoint-{n}" / "model.safetensors") for n in (2, 3))
    moments = [load_file(stage / f"checkpoint-{n}" / "optimizer.safetensors") for n in (2, 3)]
    assert all(torch.equal(good[n], stopped[n]) for n in good)
    assert moments[0] and all(torch.equal(moments[0][n], moments[1][n]) for n in moments[0])
    states = [json.loads((stage / f"checkpoint-{n}" / "state.json").read_text()) for n in (2, 3)]
    assert [s["counters"]["updates"] for s in states] == [2, 2] and states[0]["method"] == states[1]["method"]
    assert not (stage / "final").exists()


def test_t12_partners_and_labels_of_a_stage(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """24 pairs taken apart: 36 rows to train on, 12 held out, two epochs, in batches of 8 and of 5.

    Every row is read once an epoch beside an answer to another prompt, anew in each epoch; labels are mixed; held-out rows
    have the same partners whatever the batch size of the training is.
    """
    jobs = {}
    whole = train_stage.run_training
    for size in ("8", "5"):

        def run(job: TrainJob, size: str = size) -> Any:
            jobs[size] = job
            return whole(job)

        monkeypatch.setattr(train_stage, "run_training", run)
        command = build_command(inputs, tmp_path / size, "--validation-split", "0.25", "--reference-mode", "copy")
        assert main([*command, "--batch-size", size]) == 0
    held_out = [[[c.ids.tolist() for c in g.completions] for g in jobs[size].held_out] for size in ("8", "5")]
    assert held_out[0] == held_out[1] and len(held_out[0]) == 12
    for size, job in jobs.items():
        check_partners(job.held_out)
        source = job.source
        lent = []
        for epoch in range(2):
            steps = [source.step(epoch * source.steps_per_epoch + n).groups for n in range(source.steps_per_epoch)]
            groups = [group for step in steps for group in step]
            assert sorted(g.id for g in groups) == sorted(g.id for g in source.groups) and len(groups) == 36
            check_partners(groups)
            assert all(0 < np.mean([g.columns["label"] for g in step]) < 1 for step in steps if len(step) == int(size))
            lent.append({g.id: g.completions[1].ids.tobytes() for g in groups})
        assert lent[0] != lent[1]


def check_partners(groups: Sequence[Group]) -> None:
    """No row stands beside an answer to its own prompt."""
    answers: dict[bytes, set[bytes]] = {}
    for group in groups:
        answers.setdefault(group.prompt.tobytes(), set()).add(group.completions[0].ids.tobytes())
    for group in groups:
        _, lent = group.completions
        assert not any(own.startswith(lent.ids.tobytes()) for own in answers[group.prompt.tobytes()]), group.id


def test_labelled_rows_train_and_an_unbalanced_set_is_said(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prompt": f"Question {i}?", "completion": f" {'Yes' if i % 4 else 'No'}.", "label": bool(i % 4)}
        for i in range(16)
    ]
    data = tmp_path / "labels.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(build_command(inputs, tmp_path / "out", "--max-steps", "3", data=data)) == 0
    assert "12 desirable and 4 undesirable rows" in (tmp_path / "out" / "run" / "log.txt").read_text()
    assert len(read_rows(tmp_path / "out")) == 3


def test_data_of_one_prompt_are_refused(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    data = tmp_path / "one.jsonl"
    rows = [{"prompt": "Why?", "completion": f" Because {i}.", "label": i % 2} for i in range(6)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(build_command(inputs, tmp_path / "out", data=data)) == 2
    assert "all 6 rows have the same prompt" in capfd.readouterr().err
    command = build_command(
        inputs, tmp_path / "other", "--loss-type", "apo_zero_unpaired", "--max-steps", "2", data=data
    )
    assert main(command) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "point", ["update.after_optimizer:8", "burnish.pipeline.reference:compute_reference_table:2:after"]
)
def test_a_kill_in_the_second_epoch_changes_no_bit(
    server: ForkServer, inputs: Path, tmp_path: Path, point: str
) -> None:
    """Partners are a function of the order, so nothing of them is saved."""
    fault = {"call": point} if point.count(":") == 3 else {"fault": f"{point}:kill"}
    for name, faults in (("calm", [{}]), ("killed", [fault])):
        out = tmp_path / name
        statuses = run_until_done(server, build_command(inputs, out), out, faults)
        assert statuses[:-1] == ([-9] if name == "killed" else [])
    assert compute_digest(tmp_path / "killed" / "run") == compute_digest(tmp_path / "calm" / "run")

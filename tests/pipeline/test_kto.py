"""KTO as a stage (S3-22): labels and pairs, partners of every epoch in the reference's cache, kill and resume."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from burnish.cli.main import main
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

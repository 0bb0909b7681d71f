"""Stages with a second model at work in each step: how the reference is kept, teachers, kill and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from burnish.cli.main import main
from tests.forkserver import ForkServer
from tests.pipeline.test_kill import compute_digest, run_until_done

LIVE = ["tdpo2", "radpo1", "epsilon"]


def build_command(inputs: Path, out: Path, loss_type: str, *more: str) -> list[str]:
    command = ["dpo", "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--output-dir", str(out)]
    command += ["--run-name", "run", "--batch-size", "6", "--max-steps", "6", "--learning-rate", "1e-3"]
    return [*command, "--precision", "fp32", "--seed", "3", "--save-steps", "2", "--loss-type", loss_type, *more]


def read_rows(stage: Path, kind: str = "train") -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    return [row for row in rows if row.get("kind") == kind]


def load_weights(stage: Path) -> dict[str, torch.Tensor]:
    return load_file(next((stage / "final").glob("*.safetensors")))


@pytest.mark.parametrize("loss_type", LIVE)
def test_a_copy_and_a_fresh_adapter_give_the_same_result(inputs: Path, tmp_path: Path, loss_type: str) -> None:
    found = []
    for mode in ("auto", "copy"):
        command = build_command(inputs, tmp_path / mode, loss_type, "--lora.r", "4", "--reference-mode", mode)
        assert main(command) == 0
        log = (tmp_path / mode / "run" / "log.txt").read_text()
        assert ("the base under the fresh adapter" in log) == (mode == "auto")
        found.append(load_weights(tmp_path / mode / "run" / "01-dpo"))
        first = read_rows(tmp_path / mode / "run" / "01-dpo")[0]
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5) and first["rewards/margins"] == 0.0
    for name, weight in found[0].items():
        torch.testing.assert_close(weight, found[1][name], rtol=0, atol=1e-5)


def test_a_cached_reference_contradicts_a_loss_that_reads_distributions(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(build_command(inputs, tmp_path, "tdpo1", "--reference-mode", "cached")) == 2
    error = capfd.readouterr().err
    assert "reference_mode" in error and "set reference_mode: auto, copy or adapter" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("setting", "value", "loss_type"),
    [("--tdpo-alpha", "0.3", "tdpo1"), ("--radpo-confidence", "0.9", "tdpo2"), ("--epsilon", "0.1", "sigmoid")],
)
def test_a_setting_that_the_loss_does_not_read_is_refused(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], setting: str, value: str, loss_type: str
) -> None:
    assert main(build_command(inputs, tmp_path, loss_type, setting, value)) == 2
    assert f"loss_type {loss_type} does not use it" in capfd.readouterr().err


@pytest.mark.slow
def test_a_kill_keeps_the_running_beta(server: ForkServer, inputs: Path, tmp_path: Path) -> None:
    """Epsilon-DPO's β is state: killed after step 5 and resumed from step 4, every bit and every β is the same."""
    for name, faults in (("calm", [{}]), ("killed", [{"fault": "update.after_optimizer:5:kill"}])):
        out = tmp_path / name
        run_until_done(server, build_command(inputs, out, "epsilon"), out, faults)
    assert compute_digest(tmp_path / "killed" / "run") == compute_digest(tmp_path / "calm" / "run")
    betas = [row["beta"] for row in read_rows(tmp_path / "calm" / "run" / "01-dpo")]
    assert len(set(betas)) > 1
    state = json.loads((tmp_path / "calm" / "run" / "01-dpo" / "checkpoint-6" / "state.json").read_text())
    assert state["method"]["losses"]["epsilon"]["factor"] != 1.0


# -- teachers -----------------------------------------------------------------------------------------------------------


def write_recipe(folder: Path, inputs: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(inputs / "model"),
        "seed": 3,
        "batch_size": 6,
        "learning_rate": 1e-2,
        "output_dir": str(folder / "runs"),
        "data": str(inputs / "chat.jsonl"),
        "precision": "fp32",
        "stages": [
            {"kind": "sft", "name": "large", "max_steps": 6},
            {"kind": "distill", "max_steps": 24, "num_train_epochs": 9.0, "teacher": "large"} | changes,
        ],
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def test_a_stage_teaches_another(inputs: Path, tmp_path: Path) -> None:
    """A mix with the cross-entropy; the teacher's weights are part of the stage's key, and a second command skips it."""
    recipe = write_recipe(tmp_path, inputs, alpha=0.9, temperature=2.0)
    assert main(["run", str(recipe)]) == 0
    run = tmp_path / "runs" / "small"
    rows = read_rows(run / "02-distill")
    assert rows[0]["loss"] == pytest.approx(0.9 * rows[0]["loss/distill"] + 0.1 * rows[0]["loss/ce"], rel=1e-6)
    assert rows[0]["cross_entropy"] == pytest.approx(rows[0]["loss/ce"], rel=1e-6)
    record = json.loads((run / "02-distill" / "stage.json").read_text())
    assert "reference" in record["inputs"], "the teacher's weights are part of the stage's key"
    stamp = (run / "02-distill" / "stage.json").stat().st_mtime_ns
    assert main(["run", str(recipe)]) == 0
    assert (run / "02-distill" / "stage.json").stat().st_mtime_ns == stamp
    assert main(["run", str(recipe), "--dry-run"]) == 0


def test_the_student_comes_nearer_to_its_teacher(inputs: Path, tmp_path: Path) -> None:
    """It begins where the teacher began, and learns what it became."""
    assert main(["run", str(write_recipe(tmp_path, inputs, learning_rate=2e-3))]) == 0
    found = [row["loss"] for row in read_rows(tmp_path / "runs" / "small" / "02-distill")]
    assert np.mean(found[-4:]) < 0.5 * np.mean(found[:4])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"teacher": None}, "is missing: a stage of kind distill"),
        ({"teacher": "distill"}, "the stage itself"),
        ({"teacher": "large", "jsd_beta": 0.2}, "but loss_type is forward_kl"),
        ({"teacher": "large", "alpha": 0.0}, "alpha"),
    ],
)
def test_teachers_that_cannot_be(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], changes: dict[str, Any], message: str
) -> None:
    assert main(["run", str(write_recipe(tmp_path, inputs, **changes))]) == 2
    assert message in capfd.readouterr().err


def test_a_reward_model_teaches_nothing(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, inputs)
    text = recipe.read_text().replace("kind: sft", f"kind: reward\n  data: {inputs / 'pairs.jsonl'}")
    recipe.write_text(text)
    assert main(["run", str(recipe)]) == 2
    assert "a reward model: it gives scores, and no distribution" in capfd.readouterr().err


def test_a_teacher_of_another_vocabulary_is_refused(
    inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(inputs / "model", other)
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert main(["run", str(write_recipe(tmp_path, inputs, teacher=str(other)))]) == 2
    error = capfd.readouterr().err
    assert (
        "the teacher has another vocabulary" in error and "use a teacher model with the policy's own tokenizer" in error
    )

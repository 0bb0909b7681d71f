"""The preference family from one command line: every kind without a reference, coupled and weighted losses, one's own file."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from burnish.cli.main import main

OWN = """
from burnish.losses.pairs import PairLoss

def my_loss(pairs, *, beta):
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss((chosen - rejected - {aim}) ** 2, chosen, rejected)
"""


def train(verb: str, inputs: Path, out: Path, *more: str) -> int:
    words = [verb, "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--output-dir", str(out)]
    words += ["--run-name", "run", "--max-steps", "3", "--batch-size", "4", "--learning-rate", "1e-3"]
    return main([*words, "--validation-split", "0.25", "--precision", "fp32", *more])


def read(out: Path, verb: str) -> dict[str, Any]:
    return json.loads((out / "run" / f"01-{verb}" / "stage.json").read_text())


@pytest.mark.parametrize(
    ("verb", "more", "terms"),
    [
        ("orpo", (), {"loss/orpo/orpo", "loss/orpo/nll"}),
        ("cpo", ("--loss_type", "hinge"), {"loss/cpo/hinge", "loss/cpo/nll"}),
        ("simpo", (), set()),
        ("rpo", ("--use_weighting", "--loss_weights", "1,0.5"), {"loss/dpo/sigmoid", "loss/dpo/sft", "wpo_weights"}),
        ("bco", ("--micro_batch_tokens", "200"), set()),
        ("aot", ("--micro_batch_tokens", "200", "--ld_alpha", "0.5"), set()),
    ],
)
def test_s3_22_methods_are_verbs_of_one_command_line(
    verb: str, more: tuple[str, ...], terms: set[str], inputs: Path, tmp_path: Path
) -> None:
    assert train(verb, inputs, tmp_path, *more) == 0
    figures = read(tmp_path, verb)["figures"]
    expected = {"loss", "rewards/margins", *terms}
    assert expected <= set(figures["train"]) and {f"eval_{name}" for name in expected} <= set(figures["eval"])
    assert figures["updates"] == 3
    has_reference = (tmp_path / "run" / f"01-{verb}" / "reference").exists()
    assert has_reference == (verb not in ("orpo", "cpo", "simpo"))


def test_s1_04_each_kind_trains_its_own_loss(inputs: Path, tmp_path: Path) -> None:
    """The held-out loss of a policy that is its own reference tells which loss it is: with lr → 0 it does not move."""
    found = {}
    for verb in ("ipo", "hinge", "sppo", "nca", "orpo"):
        assert train(verb, inputs, tmp_path / verb, "--learning-rate", "1e-12") == 0
        found[verb] = read(tmp_path / verb, verb)["figures"]["eval"]["eval_loss"]
    start = {"ipo": 25.0, "hinge": 1.0, "sppo": 500_000.0, "nca": 1.3862943611198906}
    assert {verb: found[verb] for verb in start} == pytest.approx(start, rel=1e-4)
    assert found["orpo"] > 2.0, "a fine-tuning loss, of no reference"


def test_a_loss_of_one_s_own_file_trains_and_its_source_is_part_of_the_key(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(OWN.format(aim=1))
    own = ("--loss_type", "my_module:my_loss", "--beta", "0.5")
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    assert train("dpo", inputs, tmp_path, *own) == 0
    first = read(tmp_path, "dpo")
    assert "my_module:my_loss" in first["inputs"]
    assert first["figures"]["train"]["loss"] == pytest.approx(1.0, abs=0.5)

    assert train("dpo", inputs, tmp_path, *own) == 0
    assert read(tmp_path, "dpo") == first, "nothing changed: nothing is done"

    (tmp_path / "my_module.py").write_text(OWN.format(aim=3))
    monkeypatch.delitem(sys.modules, "my_module", raising=False)
    assert train("dpo", inputs, tmp_path, *own) == 0
    second = read(tmp_path, "dpo")
    assert second["key"] != first["key"] and second["inputs"] != first["inputs"]
    assert second["figures"]["train"]["loss"] == pytest.approx(9.0, abs=2.0)
    assert "my_module:my_loss" in capfd.readouterr().err


def test_a_setting_that_one_s_own_loss_does_not_read_is_refused(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """What it declares is known before the model is loaded."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_module.py").write_text(OWN.format(aim=1))
    assert train("dpo", inputs, tmp_path, "--loss_type", "my_module:my_loss", "--label_smoothing", "0.1") == 2
    assert "my_module:my_loss does not use it" in capfd.readouterr().err


def test_flipped_pairs_train_the_other_way_and_are_part_of_the_key(inputs: Path, tmp_path: Path) -> None:
    """From a = z = 0 a step on swapped pairs is the opposite one."""
    from safetensors.torch import load_file

    start = load_file(inputs / "model" / "model.safetensors")
    moves, keys = [], []
    for share in ("0", "1"):
        assert train("dpo", inputs, tmp_path, "--max-steps", "1", "--weight-decay", "0", "--flip-share", share) == 0
        made = load_file(tmp_path / "run" / "01-dpo" / "final" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        moves.append((made[name].float() - start[name].float()).flatten())
        keys.append(read(tmp_path, "dpo"))
    assert moves[0].norm() > 0
    assert float(moves[0] @ moves[1] / (moves[0].norm() * moves[1].norm())) == pytest.approx(-1.0, abs=1e-3)
    assert keys[0]["inputs"]["data"] != keys[1]["inputs"]["data"], "a finished stage that changed is made again"
    held = [record["figures"]["eval"]["eval_rewards/margins"] for record in keys]
    assert held[0] * held[1] < 0, "both are measured on the same held-out pairs, as they are written"

"""Dynamic β through the command line: one recipe, two kinds of data, and kills."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.cli.main import main
from burnish.report.html import render_report
from burnish.track.metrics import read_metrics
from tests.forkserver import ForkServer
from tests.pipeline.test_kill import build_command, compute_digest, run_until_done

ROOT = Path(__file__).resolve().parents[2]
HH = "\n\nHuman: {}\n\nAssistant: {}"


def write_hh(file: Path) -> Path:
    """Rows as the HH set has them: whole dialogues, no prompt column."""
    questions = ["Why is the sky blue?", "How long do I boil an egg?", "May I paint a rented wall?", "What is a haiku?"]
    rows = [{"chosen": HH.format(q, "Let me explain it."), "rejected": HH.format(q, "No idea.")} for q in questions]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_s0_02_dynamic_beta_from_one_recipe_on_hh_rows_or_judged_rollouts(inputs: Path, tmp_path: Path):
    """S0-02: fine-tuning and dynamic-β DPO in one YAML; one word on the command line changes the pairs."""
    recipe: dict[str, Any] = {
        "name": "dynamic",
        "model": str(inputs / "model"),
        "max_steps": 4,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "output_dir": str(tmp_path / "runs"),
        "stages": [
            {"kind": "sft", "data": str(inputs / "chat.jsonl")},
            {
                "kind": "dpo",
                "init_from": "sft",
                "data": str(write_hh(tmp_path / "hh.jsonl")),
                "num_train_epochs": 2.0,
                "dynamic_beta": {"type": "risk", "beta_warmup": 1, "estimator": "ema", "lambda": 0.5, "alpha": 0.5},
            },
        ],
    }
    file = tmp_path / "dynamic.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    betas = {}
    for name, words in {"hh": [], "judged": [f"dpo.data={ROOT / 'docs' / 'rollout_judged.jsonl'}"]}.items():
        assert main(["run", str(file), "--run-name", name, *words]) == 0
        stage = tmp_path / "runs" / name / "02-dpo"
        rows = read_metrics(stage / "margins.jsonl")[0]
        assert [r["step"] for r in rows] == [1, 2, 3, 4]
        betas[name] = [r["beta_used"] for r in rows]
        assert betas[name][:2] == [0.1, 0.1] and betas[name][3] != 0.1, "β_0 for one unit, and in the first after it"
        page = render_report(tmp_path / "runs" / name).read_text()
        assert "Distribution of margins" in page and "Share of margins above τ" in page
    assert betas["hh"] != betas["judged"]


UNITS = ["--batch-size", "6"]  # 18 rows: three steps an epoch, each of two units
CONTROLLERS: dict[str, list[str]] = {
    "linear": ["dynamic_beta={type: linear, beta_end: 0.5, steps: 8}"],
    "cosine": ["dynamic_beta={type: cosine, beta_end: 0.5, steps: 8}"],
    "risk window": ["dynamic_beta={type: risk, warmup: 2, window: 8, alpha: 0.3}"],
    "risk ema": ["dynamic_beta={type: risk, warmup: 2, estimator: ema, alpha: 0.3}"],
    "risk robbins_monro": ["dynamic_beta={type: risk, warmup: 2, estimator: robbins_monro, alpha: 0.3}"],
    "risk, units of pairs": ["dynamic_beta={type: risk, warmup: 2, window: 8, alpha: 0.3, unit: {pairs: 4}}", *UNITS],
    "beta_dpo batch": ["dynamic_beta={type: beta_dpo, alpha: 0.1}"],
    "beta_dpo instance": ["dynamic_beta={type: beta_dpo, alpha: 0.1, level: instance}"],
    "beta_dpo, units of pairs": ["dynamic_beta={type: beta_dpo, alpha: 0.1, unit: {pairs: 4}}", *UNITS],
    "epsilon": ["--loss-type", "epsilon"],
    "bco_pair": ["--loss-type", "bco_pair"],
    "bco_pair, risk": ["--loss-type", "bco_pair", "dynamic_beta={type: risk, warmup: 2, window: 8, alpha: 0.3}"],
}
# One kill each in the default suite; all of them, killed in an update and in a save, with the tests that kill.
IN_THE_DEFAULT_SUITE = ("risk window", "beta_dpo instance", "epsilon")


@pytest.mark.parametrize(
    ("name", "faults"),
    [
        *[(name, ["update.after_optimizer:5:kill"]) for name in IN_THE_DEFAULT_SUITE],
        *[
            pytest.param(name, ["update.after_optimizer:5:kill", "folder.write:4:kill"], marks=pytest.mark.kill)
            for name in CONTROLLERS
        ],
    ],
)
def test_s0_15_sigkill_and_the_same_command(
    server: ForkServer, inputs: Path, tmp_path: Path, name: str, faults: list[str]
):
    """S0-15: killed in an update and in a save: the same bits of weights, moments, state, metrics and margins.

    With each controller, with units of pairs, and with the losses that have a running state of their own.
    """
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder, points in ((calm, []), (killed, faults)):
        command = [*build_command(inputs, "dpo", False, folder), *CONTROLLERS[name], "margin_records={vectors: true}"]
        command += ["--eval-steps", "-1", "--save-total-limit", "0"]
        statuses = run_until_done(server, command, folder, [{"fault": point} for point in points] or [{}])
        assert statuses == [*[-9] * len(points), 0]
    assert compute_digest(killed / "run") == compute_digest(calm / "run")
    found = [_digest_margins(folder / "run" / "01-dpo") for folder in (calm, killed)]
    assert found[0] == found[1] and len(found[0]) == 11
    states = [
        json.loads((calm / "run" / "01-dpo" / f"checkpoint-{n}" / "state.json").read_text())["method"] for n in (3, 10)
    ]
    assert states[0] and states[0] != states[1], "the state that is restored is one that moves"


def _digest_margins(stage: Path) -> dict[str, str]:
    files = [stage / "margins.jsonl", *sorted((stage / "margins").iterdir())]
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}

"""A kind that burnish does not know: two models, a sampling source, a coupled loss; added by registration alone."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file

from burnish.artifacts.folder import verify_folder
from burnish.cli.main import main
from burnish.config.load import load_recipe
from burnish.config.train import TrainSettings
from burnish.pipeline.naming import find_starts
from tests.forkserver import ROOT, ForkServer

STEPS = 6


@pytest.fixture
def workplace(inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the kind's module and a recipe."""
    shutil.copy(ROOT / "tests" / "pipeline" / "own_kind.py", tmp_path / "own_kind.py")
    stage = {
        "kind": "own_kind:SPEC",
        "data": str(inputs / "chat.jsonl"),
        "validation_split": 0.25,
        "batch_size": 4,
        "max_steps": STEPS,
        "save_steps": 1,
        "learning_rate": 3e-3,
        "value_learning_rate": 1e-2,
        "precision": "fp32",
        "micro_batch_tokens": 200,
        "eval_steps": 3,
    }
    recipe = {"name": "own", "model": str(inputs / "model"), "stages": [stage]}
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(recipe))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def digest(run: Path) -> dict[str, str]:
    """SHA-256 of the files of the result."""
    manifest = verify_folder(run / "01-even" / "final")
    return {name: entry.sha256 for name, entry in manifest.files.items() if name.endswith(".safetensors")}


def read_stage(run: Path) -> dict:
    return json.loads((run / "01-even" / "stage.json").read_text())


def test_it_trains_evaluates_and_exports_both_models(workplace: Path, server: ForkServer) -> None:
    assert server.run(["run", "own.yaml", "--output-dir", "a"], log=workplace / "log", cwd=workplace) == 0, (
        workplace / "log"
    ).read_text()[-3000:]
    run = workplace / "a" / "own"
    rows = [json.loads(line) for line in (run / "01-even" / "metrics.jsonl").read_text().splitlines()]
    train = [row for row in rows if row["kind"] == "train"]
    assert len(train) == STEPS and all(0 <= row["reward"] <= 1 for row in train)
    assert [row["step"] for row in rows if row["kind"] == "eval"] == [3, 6]
    assert {"loss/policy", "loss/value"} <= set(train[0])
    final = run / "01-even" / "final"
    policy, value = load_file(final / "model.safetensors"), load_file(final / "value" / "model.safetensors")
    assert "score.weight" in value and "score.weight" not in policy
    shared = set(policy) & set(value)
    assert any(not policy[name].equal(value[name]) for name in shared), "each model learnt for itself"
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    AutoModelForCausalLM.from_pretrained(final)
    AutoModelForSequenceClassification.from_pretrained(final / "value")
    record = read_stage(run)
    assert record["state"] == "done" and "own_kind:SPEC" in record["inputs"]


@pytest.mark.parametrize(
    "fault", ["window.committed:2:kill", "loop.after_step:4:kill", "folder.rename:5:kill", "step.backward:5:kill"]
)
def test_killed_in_and_between_windows_it_ends_with_the_same_bits(
    workplace: Path, server: ForkServer, fault: str
) -> None:
    """Samples come from the committed window, though the models have moved since; nothing is sampled twice."""
    log = workplace / "log"
    assert server.run(["run", "own.yaml", "--output-dir", "a"], log=log, cwd=workplace) == 0
    assert server.run(["run", "own.yaml", "--output-dir", "b"], log=log, cwd=workplace, fault=fault) == -9
    assert server.run(["run", "own.yaml", "--output-dir", "b"], log=log, cwd=workplace) == 0, log.read_text()[-3000:]
    whole, resumed = workplace / "a" / "own", workplace / "b" / "own"
    assert digest(whole) == digest(resumed) and len(digest(whole)) == 2
    assert read_stage(whole)["ledger"] == read_stage(resumed)["ledger"]
    rows = (resumed / "01-even" / "metrics.jsonl").read_text()
    assert rows == (whole / "01-even" / "metrics.jsonl").read_text()


def test_a_model_may_start_from_an_earlier_stage(workplace: Path) -> None:
    (stage,) = load_recipe(
        {"model": "m", "stages": [{"kind": "own_kind:SPEC", "data": "d", "value_model": "first"}]}, check_machine=False
    ).recipe.stages
    assert isinstance(stage, TrainSettings)
    assert find_starts(stage, {"first": Path("runs/first/final")}) == {"value": "runs/first/final"}
    assert find_starts(stage, {}) == {"value": "first"}
    assert find_starts(stage.model_copy(update={"value_model": None}), {}) == {}


def test_its_source_is_part_of_the_key(workplace: Path, server: ForkServer) -> None:
    log = workplace / "log"
    command = ["run", "own.yaml", "--output-dir", "a", "stages.0.max_steps=1"]
    assert server.run(command, log=log, cwd=workplace) == 0
    assert server.run(command, log=log, cwd=workplace) == 0 and "finished and unchanged" in log.read_text()
    with (workplace / "own_kind.py").open("a") as file:
        file.write("# changed\n")
    assert server.run(command, log=log, cwd=workplace) == 0
    assert "own_kind:SPEC" in log.read_text()


def test_the_example_and_the_data_check_know_it(
    workplace: Path, inputs: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "example", "own_kind:SPEC"]) == 0
    text = capsys.readouterr().out
    assert "kind: own_kind:SPEC" in text and "answer_tokens" in text and "prefers even tokens" in text.lower()
    check = ["data", "check", str(inputs / "chat.jsonl"), "--for", "own_kind:SPEC", "--model", str(inputs / "model")]
    assert main(check) == 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("no_such_module_xyz:SPEC", "cannot be loaded"),
        ("own_kind:NOTHING", "cannot be loaded"),
        ("own_kind:Even", "not a MethodSpec"),
        ("sfft", "there is no kind"),
    ],
)
def test_a_wrong_kind_is_one_message_with_its_line(
    workplace: Path, capsys: pytest.CaptureFixture[str], kind: str, message: str
) -> None:
    (workplace / "own.yaml").write_text(f"model: pocket\ndata: pocket/chat\nstages:\n  - kind: {kind}\n")
    assert main(["run", "own.yaml", "--dry-run"]) == 2
    err = capsys.readouterr().err
    assert message in err and "own.yaml:4" in err and "→" in err


@pytest.mark.dist
@pytest.mark.parametrize("strategy", ["replicated", "fsdp2"])
def test_two_processes_train_the_same(workplace: Path, server: ForkServer, strategy: str) -> None:
    log, plain = workplace / "log", "stages.0.optim=sgd"  # AdamW turns rounding of small gradients into whole updates
    assert server.run(["run", "own.yaml", "--output-dir", "a", plain], log=log, cwd=workplace) == 0
    env = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "burnish", "run", "own.yaml", "--output-dir", "b", plain, "--num-processes", "2"]
    command.append(f"stages.0.distributed.strategy={strategy}")
    done = subprocess.run(command, cwd=workplace, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    for name in ("model.safetensors", "value/model.safetensors"):
        one, two = (load_file(workplace / r / "own" / "01-even" / "final" / name) for r in "ab")
        assert all(one[n].allclose(two[n], atol=1e-6) for n in one)

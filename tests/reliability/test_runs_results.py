"""R-10, R-33: nothing goes to the network; results load elsewhere, bit for bit, whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.artifacts.folder import verify_folder
from tests.pipeline.test_offline import PATHS, QUIET
from tests.pipeline.test_run import write_recipe

LORA = {"r": 4}


def write_stages(folder: Path, inputs: Path, lora: bool) -> Path:
    """sft → reward → dpo → evaluate with three tasks and all sinks that need no service."""
    extra = {"lora": LORA} if lora else {}
    pairs = str(inputs / "pairs.jsonl")
    stages = [
        {"kind": "sft", "data": str(inputs / "chat.jsonl"), "report_to": ["tensorboard"], **extra},
        {"kind": "reward", "init_from": "sft", "data": pairs, **extra},
        {"kind": "dpo", "init_from": "sft", "data": pairs, **extra},
        {"kind": "evaluate", "tasks": ["loss", "preferences", "win_rate"], "max_items": 6, "max_new_tokens": 4},
    ]
    return write_recipe(folder, inputs, stages=stages, precision="fp32")


def run_offline(recipe: Path, wrap: list[str]) -> Path:
    """Every command with sockets recorded and refused and no offline switch set; returns the record."""
    folder = recipe.parent
    record = folder / "attempts"
    env = {k: v for k, v in os.environ.items() if k not in QUIET}
    env |= {"PYTHONPATH": PATHS, "BURNISH_NETWORK_RECORD": str(record), "OMP_NUM_THREADS": "1"}
    for words in (
        ["run", str(recipe)],
        ["run", str(recipe), "--dry-run"],
        ["report", "small"],
        ["runs", "show", "small"],
    ):
        command = [*wrap, sys.executable, "-m", "burnish", *words]
        done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:]
    return record


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("isolated", [False, True])
def test_r10_every_stage_and_command_without_a_network(tmp_path, inputs, lora, isolated):
    """R-10: full and LoRA; and, where the system allows it, in a network namespace that has nothing at all."""
    wrap = ["unshare", "-rn"] if isolated else []
    if isolated and (
        shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True).returncode
    ):
        pytest.skip("needs unshare -rn")
    record = run_offline(write_stages(tmp_path, inputs, lora), wrap)
    assert not record.exists(), record.read_text()


def test_r10_a_model_that_is_not_here_fails_soon_and_clearly(server, inputs, tmp_path):
    """R-10: a hub id offline: one message, exit 6, no retries without end."""
    recipe = write_recipe(tmp_path, inputs, model="some-org/some-model")
    log = tmp_path / "log"
    assert server.run(["run", str(recipe)], log=log, cwd=tmp_path, env={"HF_HUB_OFFLINE": "1"}) == 6
    assert "some-org/some-model" in log.read_text() and "Traceback" not in log.read_text()


# ---------------------------------------------------------------------------------------------------------------

# What a user writes; burnish cannot be imported there, nor any network reached.
SCRIPT = """
import json, socket, sys
import torch
sys.modules["burnish"] = None
socket.socket.connect = socket.getaddrinfo = lambda *a, **k: (_ for _ in ()).throw(RuntimeError("network"))
torch.set_num_threads(1)
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig
root, out = sys.argv[1], {}
for name, cls in (("01-sft", AutoModelForCausalLM), ("02-reward", AutoModelForSequenceClassification),
                  ("03-dpo", AutoModelForCausalLM)):
    folder = f"{root}/{name}/final"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}],
                                        return_tensors="pt", return_dict=True)["input_ids"]
    extra = {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id} if cls is not AutoModelForCausalLM else {}
    model = cls.from_pretrained(folder, **extra).eval()
    with torch.no_grad():
        out[name] = (ids, model(input_ids=ids).logits)
    if not extra:
        assert GenerationConfig.from_pretrained(folder).eos_token_id is not None
        model.generate(ids, max_new_tokens=2, pad_token_id=0)
torch.save(out, sys.argv[2])
"""


def compute_logits(folder: Path, head: str, ids: torch.Tensor) -> torch.Tensor:
    """What burnish itself computes with a result: the library's module under burnish's loading."""
    from burnish.models.load import load_model

    model, _ = load_model(str(folder), head=head, dtype=torch.float32)  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True])
def test_r33_every_stage_loads_bit_equal_in_a_process_without_burnish(server, inputs, tmp_path, lora):
    """R-33: sft, reward, dpo: the same logits as in burnish; generation settings, template and tokenizer are there."""
    recipe = write_stages(tmp_path, inputs, lora)
    assert server.run(["run", str(recipe)], log=tmp_path / "log", cwd=tmp_path) == 0, (tmp_path / "log").read_text()[
        -3000:
    ]
    root = tmp_path / "runs" / "small"
    command = [sys.executable, "-c", SCRIPT, str(root), str(tmp_path / "out.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd="/", env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    for name, (ids, logits) in found.items():
        ours = compute_logits(root / name / "final", "score" if "reward" in name else "lm", ids)
        if lora:  # burnish adds the adapter to the weights, PEFT keeps it beside them
            assert torch.allclose(ours, logits, rtol=1e-4, atol=1e-5), name
        else:
            assert torch.equal(ours, logits), name


EXPORT_POINTS = ["export.written:1", "folder.manifest:5", "folder.rename:5"]


def check_killed_export(server, inputs: Path, folder: Path, point: str) -> None:
    """Killed while the result is written: no folder of the final name; the same command makes it whole."""
    data = str(inputs / "chat.jsonl")
    command = [
        "sft",
        "--model",
        str(inputs / "model"),
        "--data",
        data,
        "--output-dir",
        str(folder),
        "--run-name",
        "run",
    ]
    command += ["--max-steps", "4", "--batch-size", "2", "--save-steps", "1"]
    assert server.run(command, log=folder / "log", cwd=folder, fault=f"{point}:kill") == -9
    stage = folder / "run" / "01-sft"
    assert json.loads((stage / "stage.json").read_text())["state"] == "running"
    assert not (stage / "final").exists()
    assert server.run(command, log=folder / "log", cwd=folder) == 0
    verify_folder(stage / "final")
    assert not list(stage.glob(".tmp*"))


def test_r33_a_killed_export_leaves_no_result(server, inputs, tmp_path):
    """R-33: killed after the weights are written and before the folder is sealed."""
    check_killed_export(server, inputs, tmp_path, EXPORT_POINTS[0])


@pytest.mark.slow
@pytest.mark.parametrize("point", EXPORT_POINTS[1:])
def test_r33_killed_at_every_step_of_the_export(server, inputs, tmp_path, point):
    """R-33: before the manifest, before the rename (the fifth folder of the run after four checkpoints)."""
    check_killed_export(server, inputs, tmp_path, point)

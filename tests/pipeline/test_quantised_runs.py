"""Recipes over quantised bases, and `burnish merge`, as a user sees them. S2-13."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from burnish.artifacts.folder import load_manifest, verify_folder
from burnish.cli.main import main

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'burnish[quant]'")


def write_recipe(folder: Path, inputs: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(inputs / "model"),
        "seed": 3,
        "max_steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-2,
        "validation_split": 0.25,
        "output_dir": str(folder / "runs"),
        "lora": {"r": 4},
        "quantize": "nf4",
        "stages": [
            {"kind": "sft", "data": str(inputs / "chat.jsonl")},
            {"kind": "reward", "init_from": "sft", "data": str(inputs / "pairs.jsonl"), "quantize": "int8"},
            {"kind": "dpo", "init_from": "sft", "data": str(inputs / "pairs.jsonl"), "reference_mode": "adapter"},
            {"kind": "evaluate", "tasks": ["loss", "preferences", "win_rate"], "max_items": 6, "max_new_tokens": 4},
        ],
    } | changes
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    folder = tmp_path_factory.mktemp("quantised")
    assert main(["run", str(write_recipe(folder, inputs))]) == 0
    return folder / "runs"


@pytest.fixture
def runs(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished runs, seen from an empty folder."""
    shutil.copytree(finished, tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs"


def hash_tree(folder: Path) -> str:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "run.json")
    return hashlib.sha256(b"".join(str(p).encode() + p.read_bytes() for p in files)).hexdigest()


def test_s2_13_a_pipeline_over_quantised_bases(finished: Path) -> None:
    """Each stage says how its base lay in memory; each result says it too, and is evaluated over the same base."""
    run = finished / "small"
    log = (run / "log.txt").read_text()
    for folder, stored, low, high in (("01-sft", "nf4", 4, 5), ("02-reward", "int8", 8, 9.1), ("03-dpo", "nf4", 4, 5)):
        weights = json.loads((run / folder / "stage.json").read_text())["weights"]
        assert weights["stored"].startswith(stored) and low < weights["bits"] < high
        assert weights["bytes"] < weights["bytes_in_fp32"]
        assert (run / folder / "final" / "quantization_config.json").is_file()
        assert (run / folder / "final" / "adapter_config.json").is_file()
    assert "base: nf4, double quantisation, " in log and " bits; all weights take " in log
    assert log.count(", base in nf4, double quantisation") >= 3  # sft, dpo, and the base as dpo's and sft's reference
    assert ", base in int8" in log


def test_the_evaluation_is_that_of_the_model_in_training(inputs: Path, tmp_path: Path) -> None:
    """Held-out loss while training = held-out loss of the exported adapter over the base in the same bits."""
    from burnish.config.stages import EvaluateSettings, SftSettings
    from burnish.data.prepare import prepare_data
    from burnish.data.tokenizer import TextTokenizer
    from burnish.evals.measure import measure_logprobs
    from burnish.evals.subjects import build_loader

    settings = {"validation_split": 0.25, "data": str(inputs / "chat.jsonl"), "seed": 3}
    recipe = write_recipe(tmp_path, inputs, precision="fp32", stages=[{"kind": "sft", **settings}])
    assert main(["run", str(recipe)]) == 0
    stage = tmp_path / "runs" / "small" / "01-sft"
    trained = json.loads((stage / "stage.json").read_text())["figures"]["eval"]["eval_loss"]
    load = build_loader(EvaluateSettings(precision="fp32"), torch.device("cpu"))
    found = load(stage / "final", "lm")
    held_out = prepare_data(SftSettings(**settings), TextTokenizer.load(str(stage / "final")), context=512).held_out
    measured = measure_logprobs(found, held_out)
    assert -measured.values.sum() / measured.tokens.sum() == pytest.approx(trained, abs=1e-5)
    plain = shutil.copytree(stage / "final", tmp_path / "plain")
    (plain / "quantization_config.json").unlink()
    other = measure_logprobs(load(plain, "lm"), held_out)
    assert not np.allclose(other.values, measured.values, atol=1e-4)


def test_a_resumed_stage_ends_with_the_same_bits(inputs: Path, tmp_path: Path) -> None:
    """The base is not in the checkpoint; stored again, it is the same."""
    results = []
    for name, cut in (("whole", False), ("cut", True)):
        folder = tmp_path / name
        folder.mkdir()
        stages = [{"kind": "sft", "data": str(inputs / "chat.jsonl"), "save_steps": 2, "save_total_limit": 0}]
        recipe = write_recipe(folder, inputs, max_steps=4, stages=stages)
        assert main(["run", str(recipe)]) == 0
        stage = folder / "runs" / "small" / "01-sft"
        assert not list(stage.glob("checkpoint-*/*base*"))
        size = sum(p.stat().st_size for p in (stage / "checkpoint-2").rglob("*"))
        assert size < 200_000
        if cut:  # as a kill after step 2 leaves it
            shutil.rmtree(stage / "checkpoint-4")
            shutil.rmtree(stage / "final")
            record = json.loads((stage / "stage.json").read_text()) | {"state": "interrupted"}
            (stage / "stage.json").write_text(json.dumps(record))
            assert main(["run", str(recipe)]) == 0
            assert json.loads((stage / "stage.json").read_text())["resumed_from"] == 2
        results.append((stage / "final" / "adapter_model.safetensors").read_bytes())
    assert results[0] == results[1]


def test_another_storage_is_another_stage(finished: Path, inputs: Path, tmp_path: Path) -> None:
    """quantize is part of a stage's key: changing it does not hand out the old result."""
    shutil.copytree(finished, tmp_path / "runs")
    before = json.loads((tmp_path / "runs" / "small" / "01-sft" / "stage.json").read_text())["key"]
    assert main(["run", str(write_recipe(tmp_path, inputs)), "sft.quantize=fp4"]) == 0
    after = json.loads((tmp_path / "runs" / "small" / "01-sft" / "stage.json").read_text())
    assert after["key"] != before and after["weights"]["stored"].startswith("fp4")


def test_merge_writes_a_plain_model(runs: Path, capsys: pytest.CaptureFixture[str], inputs: Path) -> None:
    """R-33: RUN/STAGE by name; the figures are printed; the result is sealed, and loads in a fresh process that can import
    neither burnish nor PEFT; nothing else changes."""
    before = hash_tree(runs)
    assert main(["merge", "small/sft"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("merged = base + adapter: largest difference of a logit") and "held-out rows" in lines[0]
    assert "nf4, double quantisation; KL(merged ‖ that base + adapter)" in lines[1] and "nats a token" in lines[1]
    folder = Path("small-sft-merged").resolve()
    assert lines[2] == f"written: {folder}"
    meta = verify_folder(folder).meta
    assert load_manifest(folder).kind == "merged" and meta["difference"] <= 1e-4 and meta["kl"] > 0
    assert hash_tree(runs) == before
    final = runs / "small" / "01-sft" / "final"
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (folder / name).read_bytes() == (final / name).read_bytes()
    code = (
        "import sys; sys.modules['burnish'] = None; sys.modules['peft'] = None\n"
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T\n"
        f"m, t = M.from_pretrained({str(folder)!r}), T.from_pretrained({str(folder)!r})\n"
        "ids = t('2 + 2 is', return_tensors='pt').input_ids\nprint(m.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True", done.stderr
    assert main(["evaluate", "--model", str(folder), "--data", str(inputs / "chat.jsonl"), "--tasks", "[loss]"]) == 0


def test_merge_of_the_other_kinds(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A joined adapter of two stages; a reward model; a folder of its own; another type; JSON."""
    assert main(["merge", str(runs / "small" / "03-dpo"), "--output", "deep/dpo", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["kl"] > 0 and Path(found["output"]) == Path("deep/dpo").resolve()
    assert main(["merge", "small/02-reward", "--output", "rm", "--save-dtype", "bf16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["score_gap"] > 0 and json.loads(Path("rm/config.json").read_text())["dtype"] == "bfloat16"
    shutil.copytree(runs / "small" / "01-sft" / "final", "mine")
    assert main(["merge", "mine"]) == 0
    out = capsys.readouterr().out
    assert "rows of pocket/chat (it is of no run)" in out and "name rows with --data" in out
    assert main(["merge", "mine", "--force", "--data", "pocket/chat"]) == 0
    assert "nats a token" in capsys.readouterr().out


def test_merge_refuses_clearly(runs: Path, capsys: pytest.CaptureFixture[str], inputs: Path) -> None:
    """One message each, exit 2, nothing written."""
    adapter = runs / "small" / "01-sft" / "final"

    def refuse(*words: str) -> str:
        before = sorted(Path.cwd().rglob("*"))
        assert main(["merge", *words]) == 2
        assert sorted(Path.cwd().rglob("*")) == before
        return capsys.readouterr().err

    assert "there is no adapter and no stage 'nothing'" in refuse("nothing")
    assert "the run has no stage 'sftt'" in refuse("small/sftt")
    assert "has 3 stages with an adapter; name one" in refuse("small")
    assert "this is a full model" in refuse(str(inputs / "model"))
    assert "has no result yet" in refuse("small/evaluate") or "trained no adapter" in refuse("small/evaluate")
    assert "over them" in refuse(str(adapter), "--output", str(adapter))
    assert "over them" in refuse(str(adapter), "--output", str(adapter / "inside"))
    assert "over them" in refuse(str(adapter), "--output", str(adapter.parent))
    assert "over them" in refuse(str(adapter), "--output", str(inputs / "model" / "x"))
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    assert "is there already" in refuse(str(adapter), "--output", "taken")
    assert "was not written by `burnish merge`" in refuse(str(adapter), "--output", "taken", "--force")
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8] + b"damaged!")
    assert main(["merge", "small/sft"]) == 5
    assert "the adapter is damaged" in capsys.readouterr().err and not Path("small-sft-merged").exists()
    shutil.copytree(adapter, "lost")
    config = json.loads(Path("lost/adapter_config.json").read_text())
    Path("lost/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "/no/such/model"}))
    assert "there is no model '/no/such/model'" in refuse("lost")


def test_qlora_lowers_the_loss_of_pocket(tmp_path: Path) -> None:
    """Acceptance 8: 40 steps over the 4-bit base; the loss on 64 fixed rows falls by more than 2 standard errors of the
    paired difference."""
    import burnish
    from burnish.config.stages import SftSettings
    from burnish.core.batch import build_packed_batch
    from burnish.data.bundled import resolve_model
    from burnish.data.prepare import prepare_data
    from burnish.data.tokenizer import TextTokenizer
    from burnish.models.load import load_model
    from burnish.models.policy import Policy
    from burnish.models.quantise import Quantization, read_quantization

    stage = burnish.train(
        "sft",
        model="pocket",
        data="pocket/chat",
        max_steps=40,
        batch_size=8,
        max_samples=400,
        lora={"r": 8},
        learning_rate=5e-3,
        quantize="nf4",
        output_dir=tmp_path,
        run_name="q",
    )
    assert stage.final is not None
    base = str(resolve_model("pocket"))
    rows = prepare_data(SftSettings(data="pocket/chat"), TextTokenizer.load(base), context=512).held_out[:64]
    batch = build_packed_batch(rows)
    losses = []
    for folder in (base, str(stage.final)):
        stored = Quantization("nf4", True)
        assert folder == base or read_quantization(Path(folder)) == stored
        model, _ = load_model(folder, head="lm", dtype=torch.float32, quantization=stored, attach=True)
        with torch.no_grad():
            flat = Policy(model, head="lm").eval()(batch, frozenset({"logprobs"})).logprobs
        assert flat is not None
        parts = flat.split([sum(c.scored for c in g.completions) for g in rows])
        losses.append(torch.stack([-p.mean() for p in parts]))
    gain = losses[0] - losses[1]
    assert gain.mean() > 2 * gain.std() / len(gain) ** 0.5 and gain.mean() > 0.5

"""Runs as a user sees them: what is skipped, continued, made again, refused; what is left on disk."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from burnish.cli.main import main
from burnish.pipeline.api import load_record


def write_recipe(folder: Path, inputs: Path, **changes: Any) -> Path:
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(inputs / "model"),
        "seed": 3,
        "max_steps": 3,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "validation_split": 0.25,
        "output_dir": str(folder / "runs"),
        "stages": [
            {"kind": "sft", "data": str(inputs / "chat.jsonl")},
            {"kind": "reward", "init_from": "sft", "data": str(inputs / "pairs.jsonl")},
            {"kind": "dpo", "init_from": "sft", "data": str(inputs / "pairs.jsonl")},
            {"kind": "evaluate", "tasks": ["loss", "preferences", "win_rate"], "max_items": 6, "max_new_tokens": 4},
        ],
    } | changes
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def states(folder: Path) -> dict[str, float]:
    """stage → time stamp of its record; a stage that is skipped keeps it."""
    return {p.parent.name: p.stat().st_mtime_ns for p in sorted((folder / "runs" / "small").glob("*/stage.json"))}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:
    folder = tmp_path_factory.mktemp("finished")
    assert main(["run", str(write_recipe(folder, inputs))]) == 0
    return folder


@pytest.fixture
def run(finished: Path, inputs: Path, tmp_path: Path) -> Path:
    """A copy of the finished run, with its recipe pointing to the copy."""
    shutil.copytree(finished, tmp_path / "copy")
    write_recipe(tmp_path / "copy", inputs)
    return tmp_path / "copy"


def test_s1_08_a_run_folder_holds_what_happened(finished):
    """S0-01, S1-08, S1-12, S2-10, S2-12: the tree, loadable results, an evaluation for each stage, a report.

    T-28: the effective precision is printed and recorded, never a silent default.
    """
    log = (finished / "runs" / "small" / "log.txt").read_text()
    assert log.count("precision: fp32") == 3
    for folder in ("01-sft", "02-reward", "03-dpo"):
        assert json.loads((finished / "runs" / "small" / folder / "stage.json").read_text())["precision"] == "fp32"
    record = load_record(finished / "runs" / "small")
    assert (record.state, record.exit_code) == ("done", 0)
    assert list(record.stages) == ["sft", "reward", "dpo", "evaluate"]
    for name in ("sft", "reward", "dpo"):
        stage = record.stages[name]
        assert stage.final is not None
        assert stage.figures["eval"]["eval_loss"] > 0
        info = torch.load(stage.final / "training_info.pt", weights_only=True)
        assert info["training_steps"] == 3
    assert record.stages["evaluate"].figures["table"]
    for name in ("recipe.yaml", "resolved.yaml", "environment.json", "run.json", "log.txt", "report.html"):
        assert (record.path / name).stat().st_size > 0


def test_r33_results_load_in_plain_transformers(finished):
    """R-33: a fresh offline process without burnish loads every result."""
    code = """
import sys
from transformers import AutoModelForCausalLM as Lm, AutoModelForSequenceClassification as Rm, AutoTokenizer
root = sys.argv[1]
for name, cls in (("01-sft", Lm), ("02-reward", Rm), ("03-dpo", Lm)):
    model = cls.from_pretrained(f"{root}/{name}/final")
    tok = AutoTokenizer.from_pretrained(f"{root}/{name}/final")
    chat = [{"role": "user", "content": "Hello"}]
    ids = tok.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    out = model(**ids)
    assert out.logits.isfinite().all()
assert out is not None and "burnish" not in sys.modules
"""
    root = finished / "runs" / "small"
    done = subprocess.run([sys.executable, "-c", code, str(root)], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr[-2000:]


def test_the_same_command_again_skips_everything(run):
    before = states(run)
    assert main(["run", str(run / "small.yaml")]) == 0
    assert states(run) == before


def test_r18_a_changed_stage_runs_again_with_all_behind_it(run, inputs):
    """R-18, R-30: what is replaced goes to superseded/; what does not depend on it stays."""
    before = states(run)
    assert main(["run", str(run / "small.yaml"), "dpo.beta=0.3"]) == 0
    after = states(run)
    changed = {name for name in after if after[name] != before[name]}
    assert changed == {"03-dpo", "04-evaluate"}
    assert (run / "runs" / "small" / "superseded" / "03-dpo.1" / "final").is_dir()


def test_harmless_settings_change_nothing(run):
    before = states(run)
    assert main(["run", str(run / "small.yaml"), "dpo.logging_steps=2"]) == 0
    assert states(run) == before


def _interrupt(run: Path, name: str) -> Path:
    stage = run / "runs" / "small" / name
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"state": "interrupted"}))
    return stage


def test_r18_an_interrupted_stage_with_changed_settings_is_refused(run, capfd):
    """R-18: exit 2 and the difference; --allow-change lets it through; --fresh starts over."""
    _interrupt(run, "03-dpo")
    recipe = str(run / "small.yaml")
    assert main(["run", recipe, "dpo.beta=0.3"]) == 2
    text = capfd.readouterr().err
    assert "beta" in text
    assert "0.1" in text
    assert "0.3" in text
    assert "--allow-change" in text
    assert main(["run", recipe, "dpo.beta=0.3", "--allow-change", "beta"]) == 0
    _interrupt(run, "03-dpo")
    assert main(["run", recipe, "dpo.beta=0.4", "--fresh"]) == 0


def test_resume_insists(run, capfd):
    recipe = str(run / "small.yaml")
    assert main(["run", recipe, "--resume"]) == 2
    assert "nothing to resume" in capfd.readouterr().err
    _interrupt(run, "03-dpo")
    assert main(["run", recipe, "--resume"]) == 0
    assert "continues from step 3" in capfd.readouterr().err


def test_a_damaged_result_is_made_again(run):
    weights = run / "runs" / "small" / "01-sft" / "final" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert main(["run", str(run / "small.yaml")]) == 0
    assert (run / "runs" / "small" / "superseded" / "01-sft.1").is_dir()


def test_another_recipe_in_the_folder_is_refused(run, inputs, capfd):
    other = write_recipe(run, inputs, name="other", run_name="small")
    assert main(["run", str(other)]) == 2
    assert "another recipe" in capfd.readouterr().err


def test_s1_01_a_dry_run_touches_nothing(tmp_path, inputs, capsys):
    """S1-01, S1-18: the plan in numbers; no output folder."""
    recipe = write_recipe(tmp_path, inputs)
    assert main(["run", str(recipe), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "effective batch 4 examples" in text
    assert "steps      3" in text
    assert "trains     100 %" in text
    assert not (tmp_path / "runs").exists()


def test_s1_02_one_failing_model_does_not_stop_the_rest(tmp_path, inputs, capfd):
    """S1-02: several models in sequence; the exit status is the first failure's."""
    broken = tmp_path / "broken"
    shutil.copytree(inputs / "model", broken)
    (broken / "model.safetensors").write_bytes(b"not weights")
    stages = [{"kind": "sft", "data": str(inputs / "chat.jsonl")}]
    recipe = write_recipe(tmp_path, inputs, models=[str(broken), str(inputs / "model")], stages=stages)
    data = yaml.safe_load(recipe.read_text())
    del data["model"]
    recipe.write_text(yaml.safe_dump(data))
    status = main(["run", str(recipe)])
    assert status not in (0, 130)
    finals = list((tmp_path / "runs" / "small").glob("*/01-sft/final"))
    assert len(finals) == 1
    assert main(["run", str(recipe), "--model-index", "1"]) == 0
    assert main(["run", str(recipe), "--model-index", "5"]) == 2


def test_s2_06_a_missing_stage_is_named_before_anything_is_loaded(tmp_path, inputs, capfd):
    """S2-06: init_from of a stage that nobody makes: exit 2 with the names there are."""
    stages = [{"kind": "dpo", "init_from": "sfd", "data": str(inputs / "pairs.jsonl")}]
    assert main(["run", str(write_recipe(tmp_path, inputs, stages=stages))]) == 2
    assert "sfd" in capfd.readouterr().err


def test_s0_27_the_same_seed_gives_the_same_bits(tmp_path, inputs):
    """S0-27, R-12: two folders, one seed: equal weights; another seed: other weights."""
    digests = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        (tmp_path / name).mkdir()
        stages = [{"kind": "sft", "data": str(inputs / "chat.jsonl")}]
        assert main(["run", str(write_recipe(tmp_path / name, inputs, stages=stages, seed=seed))]) == 0
        final = tmp_path / name / "runs" / "small" / "01-sft" / "final" / "model.safetensors"
        digests.append(final.read_bytes())
    assert digests[0] == digests[1] != digests[2]


def test_s2_05_stages_take_disjoint_slices(tmp_path, inputs):
    """S2-05: an SFT slice and a reward slice of one source share no prompt."""
    from burnish.config.stages import RewardSettings, SftSettings
    from burnish.data.prepare import prepare_data
    from burnish.data.tokenizer import TextTokenizer

    tokenizer = TextTokenizer.load(str(inputs / "model"))
    data = str(inputs / "pairs.jsonl")
    first = prepare_data(SftSettings(data=data, slice_share=0.5), tokenizer)
    second = prepare_data(RewardSettings(data=data, slice_share=0.5, slice_offset=0.5), tokenizer)
    rows = [{g.prompt.tobytes() for g in p.train} for p in (first, second)]
    assert rows[0] and rows[1] and not rows[0] & rows[1]


@pytest.mark.dist
def test_two_processes_give_the_same_stage(tmp_path, inputs):
    """R-23: --num-processes 2 ends with the parameters of one process up to rounding, and one ledger."""
    finals = []
    for name, extra in (("one", []), ("two", ["--num-processes", "2"])):
        (tmp_path / name).mkdir()
        stages = [{"kind": "dpo", "data": str(inputs / "pairs.jsonl")}]
        recipe = write_recipe(tmp_path / name, inputs, stages=stages)
        command = [sys.executable, "-m", "burnish", "run", str(recipe), *extra]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-3000:]
        stage = tmp_path / name / "runs" / "small" / "01-dpo"
        from safetensors.torch import load_file

        finals.append(
            (load_file(stage / "final" / "model.safetensors"), json.loads((stage / "stage.json").read_text()))
        )
    (a, first), (b, second) = finals
    assert first["ledger"] == second["ledger"]
    assert max(float((a[n] - b[n]).abs().max()) for n in a) < 1e-4

"""Pairs weighed by a reward model of an earlier stage: scored once, part of the key, the same bits after a kill."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from burnish.cli.main import main
from burnish.config.load import load_recipe
from burnish.core.batch import build_packed_batch
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.runtime import Runtime
from burnish.errors import BurnishError, ConfigError, NumericStop
from burnish.methods.dpo import Dpo
from burnish.models.load import load_reward_model
from burnish.models.policy import Policy
from burnish.models.scores import compute_score_table
from burnish.pipeline import reward_margins
from burnish.pipeline.reward_margins import attach_margins, attach_reward_margins
from burnish.pipeline.train_stage import StageInputs, load_inputs
from tests.forkserver import ForkServer
from tests.pipeline.test_kill import compute_digest, run_until_done
from tests.pipeline.test_live_reference import load_weights, read_rows
from tests.reliability.test_runs_processes import start

FAST: dict[str, Any] = {"batch_size": 6, "learning_rate": 1e-2, "precision": "fp32", "seed": 3}


def write_recipe(folder: Path, inputs: Path, *, reward: dict[str, Any] | None = None, **changes: Any) -> Path:
    """A reward stage of some steps, and one that it weighs."""
    recipe: dict[str, Any] = {
        "name": "small",
        "model": str(inputs / "model"),
        "output_dir": str(folder / "runs"),
        **FAST,
        "data": str(inputs / "pairs.jsonl"),
        "validation_split": 0.25,
        "stages": [
            {"kind": "reward", "max_steps": 6, "num_train_epochs": 9.0, "head_init_std": 1.0} | (reward or {}),
            {
                "kind": "madpo",
                "reward_model": "reward",
                "max_steps": 4,
                "num_train_epochs": 9.0,
                "madpo_tau": 0.5,
                "madpo_c_max": 4.0,
            }
            | changes,
        ],
    }
    file = folder / "small.yaml"
    file.write_text(yaml.safe_dump(recipe, sort_keys=False))
    return file


def stage_of(folder: Path) -> Path:
    return folder / "runs" / "small" / "02-madpo"


@pytest.fixture(scope="module")
def weighed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("weighed")
    assert main(["run", str(write_recipe(folder, inputs))]) == 0
    return folder


@pytest.fixture(scope="module")
def scorer(weighed: Path) -> Path:
    """The reward model of that run."""
    return weighed / "runs" / "small" / "01-reward" / "final"


def test_an_earlier_reward_stage_weighs_the_pairs(weighed: Path, scorer: Path, inputs: Path, tmp_path: Path) -> None:
    stage = stage_of(weighed)
    rows = read_rows(stage)
    assert len(rows) == 4 and all("madpo_weights" in row and "madpo_margins" in row for row in rows)
    record = json.loads((stage / "stage.json").read_text())
    assert "reward_model" in record["inputs"]
    assert {"eval_madpo_weights", "eval_madpo_margins"} <= set(record["figures"]["eval"])
    assert abs(record["figures"]["eval"]["eval_madpo_weights"] - 1) > 1e-3
    assert rows[0]["loss"] == pytest.approx(rows[0]["madpo_weights"] * np.log(2), rel=1e-5), (
        "policy and reference agree"
    )

    plain = write_recipe(tmp_path, inputs, kind="dpo", reward_model=None, name="madpo")
    text = "".join(line for line in plain.read_text().splitlines(True) if "madpo_" not in line)
    plain.write_text(text)
    assert main(["run", str(plain)]) == 0
    assert "madpo_weights" not in read_rows(stage_of(tmp_path))[0]
    found, other = load_weights(stage), load_weights(stage_of(tmp_path))
    assert any(not torch.equal(found[name], other[name]) for name in found)


def test_the_margins_are_those_of_the_saved_reward_model(weighed: Path, scorer: Path, inputs: Path) -> None:
    """Read from the cache, against each pair alone through the model as plain transformers loads it."""
    loaded = load_recipe(str(weighed / "small.yaml"), env={}, check_machine=False)
    settings: Any = loaded.recipe.stage("madpo")
    prepared = load_inputs(settings, str(inputs / "model"), lambda folder: "", None, str(scorer))
    model: Any = load_reward_model(str(scorer), dtype=torch.float32, need_trained_head=True).eval()
    (folder,) = (stage_of(weighed) / "reference").glob("scores-*")
    scores = np.load(folder / "scores.npy")
    groups = [*prepared.data.train, *prepared.data.held_out]
    assert len(scores) == 2 * len(groups) == 48
    plain = []
    with torch.no_grad():
        for group in groups:
            for c in group.completions:
                ids = torch.tensor([[*group.prompt.tolist(), *c.ids.tolist()]])
                plain.append(float(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]))
    np.testing.assert_allclose(scores, plain, atol=1e-5)
    assert np.std(scores[::2] - scores[1::2]) > 1e-3


def test_a_second_command_does_nothing_and_knows_it(weighed: Path) -> None:
    file = stage_of(weighed) / "stage.json"
    stamp = file.stat().st_mtime_ns
    assert main(["run", str(weighed / "small.yaml")]) == 0
    assert file.stat().st_mtime_ns == stamp


def test_a_dry_run_foresees_it(weighed: Path, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def foresee(recipe: Path, *words: str) -> list[str]:
        assert main(["run", str(recipe), "--dry-run", "--json", *words]) == 0
        return [row["action"] for row in json.loads(capsys.readouterr().out)["stages"]]

    assert foresee(weighed / "small.yaml") == ["skip", "skip"]
    assert foresee(weighed / "small.yaml", "madpo.madpo_tau=2.0") == ["skip", "rerun"]
    assert foresee(weighed / "small.yaml", "reward.max_steps=5") == ["rerun", "rerun"]
    assert foresee(write_recipe(tmp_path, inputs)) == ["run", "run"]


def test_a_dry_run_names_what_a_stage_reads(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", str(write_recipe(tmp_path, inputs)), "--dry-run"]) == 0
    reward, weighed_stage = capsys.readouterr().out.split("\nmadpo (dpo)")
    assert "  weighed by reward\n" in weighed_stage and "weighed by" not in reward and "reference" not in weighed_stage


def test_another_reward_model_trains_the_stage_anew_and_a_moved_one_does_not(
    scorer: Path, inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    moved, other = (shutil.copytree(scorer, tmp_path / name) for name in ("moved", "other"))
    words = ["madpo", "--model", str(inputs / "model"), "--data", str(inputs / "pairs.jsonl"), "--run-name", "run"]
    words += [
        "--output-dir",
        str(tmp_path),
        "--max-steps",
        "2",
        *(w for k, v in FAST.items() for w in (f"--{k}", str(v))),
    ]
    record = tmp_path / "run" / "01-madpo" / "stage.json"
    assert main([*words, "--reward-model", str(scorer)]) == 0
    first = json.loads(record.read_text())
    assert main([*words, "--reward-model", str(moved)]) == 0
    assert json.loads(record.read_text()) == first
    from safetensors.torch import load_file, save_file

    weights = load_file(other / "model.safetensors")
    save_file({k: v * (2 if k == "score.weight" else 1) for k, v in weights.items()}, other / "model.safetensors")
    assert main([*words, "--reward-model", str(other)]) == 0
    second = json.loads(record.read_text())
    assert second["inputs"]["reward_model"] != first["inputs"]["reward_model"] and second["key"] != first["key"]
    one, two = (r["figures"]["train"]["madpo_margins"] for r in (first, second))
    assert two == pytest.approx(2 * one, rel=1e-4)
    record.write_text(json.dumps({**second, "state": "interrupted"}))
    capfd.readouterr()
    assert main([*words, "--reward-model", str(scorer)]) == 2
    error = capfd.readouterr().err
    assert "was interrupted and has changed since" in error and "reward_model" in error


@pytest.mark.parametrize("mode", ["copy", "adapter"])
def test_each_way_to_keep_the_reference(scorer: Path, inputs: Path, tmp_path: Path, mode: str) -> None:
    lora = {"lora": {"r": 4}} if mode == "adapter" else {}
    recipe = write_recipe(
        tmp_path,
        inputs,
        reward_model=str(scorer),
        reference_mode=mode,
        loss_type=["bco_pair", "sft"],
        use_weighting=True,
        dynamic_beta={"type": "risk", "warmup": 0, "alpha": 0.3},
        micro_batch_tokens=200,
        **lora,
    )
    assert main(["run", str(recipe)]) == 0
    row = read_rows(stage_of(tmp_path))[-1]
    assert {"madpo_weights", "wpo_weights", "dpo/beta", "loss/dpo/sft"} <= set(row)


def test_a_kill_keeps_every_bit(server: ForkServer, inputs: Path, tmp_path: Path) -> None:
    """Killed while scoring, and after a step: the scores are read or made again, and nothing differs."""
    words = ["madpo.save_steps=1"]
    for name, faults in (
        ("calm", [{}]),
        ("killed", [{"fault": "scores.forward:1:kill"}, {"fault": "update.after_optimizer:3:kill"}]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        recipe = write_recipe(folder, inputs, reward={"max_steps": 1})
        command = ["run", str(recipe), "--run-name", "run", "--output-dir", str(folder), *words]
        statuses = run_until_done(server, command, folder, faults)
        assert statuses == [-9] * (len(faults) - 1 if name == "calm" else 2) + [0]
    assert compute_digest(tmp_path / "killed" / "run") == compute_digest(tmp_path / "calm" / "run")


@pytest.mark.dist
def test_two_processes_score_and_train_as_one(weighed: Path, tmp_path: Path) -> None:
    """Each scores a share; margins, weights and losses of every step are those of one process, held-out pairs too."""
    status, text = start(["run", str(weighed / "small.yaml"), "--output-dir", str(tmp_path / "runs")], tmp_path)
    assert status == 0, text[-3000:]
    names = ("loss", "madpo_weights", "madpo_margins", "rewards/margins")
    for kind, prefix in (("train", ""), ("eval", "eval_")):
        one, two = (read_rows(stage_of(folder), kind) for folder in (weighed, tmp_path))
        assert len(one) == len(two) > 0
        for a, b in zip(one, two, strict=True):
            assert [b[prefix + n] for n in names] == pytest.approx([a[prefix + n] for n in names], rel=1e-4, abs=1e-5)


def test_cells_of_a_grid_share_the_reward_stage_and_its_scores(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    whole = reward_margins.compute_score_table

    def watch(policy: Any, groups: Any, **options: Any) -> Any:
        calls.append(len(groups))
        return whole(policy, groups, **options)

    monkeypatch.setattr(reward_margins, "compute_score_table", watch)
    recipe = yaml.safe_load(write_recipe(tmp_path, inputs).read_text())
    (tmp_path / "grid.yaml").write_text(yaml.safe_dump(recipe | {"grid": {"madpo.madpo_tau": [0.5, 2.0]}}))
    assert main(["run", str(tmp_path / "grid.yaml"), "--run-name", "grid"]) == 0
    grid = tmp_path / "runs" / "grid"
    assert sorted(p.name for p in (grid / "shared").iterdir()) == ["01-reward", "reference"]
    weights = [load_weights(p / "02-madpo") for p in sorted((grid / "cells").iterdir())]
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert calls == [24], "scored once, for both cells"


# -- the parts ----------------------------------------------------------------------------------------------------------


def prepare(scorer: Path, inputs: Path, **changes: Any) -> tuple[Any, StageInputs]:
    stage = {"kind": "madpo", "data": str(inputs / "pairs.jsonl"), "reward_model": str(scorer), **FAST, **changes}
    recipe = {"model": str(inputs / "model"), "stages": [{"validation_split": 0.25, **stage}]}
    settings: Any = load_recipe(recipe, env={}, check_machine=False).recipe.stages[0]
    return settings, load_inputs(settings, str(inputs / "model"), lambda folder: str(folder), None, str(scorer))


def test_scores_do_not_depend_on_the_batches_and_the_cache_is_used(
    scorer: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for budget in ("auto", 60):
        settings, prepared = prepare(scorer, inputs, micro_batch_tokens=budget)
        runtime = build_parallel(Runtime(torch.device("cpu")))
        parts = attach_reward_margins(settings, Dpo(settings), prepared, tmp_path / str(budget), runtime)
        found.append([g.columns["reward_margin"] for part in parts for g in part])
        assert [len(part) for part in parts] == [18, 6]
    np.testing.assert_allclose(found[0], found[1], atol=1e-5)

    def refuse(*args: Any, **options: Any) -> Any:
        raise AssertionError("the reward model was loaded though its scores are on disk")

    monkeypatch.setattr(reward_margins, "load_frozen", refuse)
    again = attach_reward_margins(settings, Dpo(settings), prepared, tmp_path / "60", runtime)
    assert [g.columns["reward_margin"] for part in again for g in part] == found[1]
    for changed in ({"precision": "bf16"}, {"attention": "padded"}, {"max_length": 300}):
        other, prepared = prepare(scorer, inputs, **changed)
        with pytest.raises(AssertionError, match="was loaded"):
            attach_reward_margins(other, Dpo(other), prepared, tmp_path / "auto", runtime)


def test_only_what_is_read_is_scored_and_the_model_is_gone_before_the_policy_comes(
    scorer: Path, inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, prepared = prepare(scorer, inputs, max_steps=1, validation_split=0.0)
    seen: list[Any] = []
    load = reward_margins.load_frozen
    monkeypatch.setattr(
        reward_margins, "load_frozen", lambda *a, **k: [m := load(*a, **k), seen.append(weakref.ref(m))][0]
    )
    train, held_out = attach_reward_margins(
        settings, Dpo(settings), prepared, tmp_path, build_parallel(Runtime(torch.device("cpu")))
    )
    assert sum("reward_margin" in g.columns for g in train) == 6 and len(train) == 24 and held_out == []
    gc.collect()
    assert len(seen) == 1 and seen[0]() is None


def test_a_rank_scores_its_share(scorer: Path, inputs: Path, tmp_path: Path) -> None:
    """What two ranks gather is put back in order: here both shares are computed in one process, one after the other."""
    settings, prepared = prepare(scorer, inputs)
    alone = attach_reward_margins(
        settings, Dpo(settings), prepared, tmp_path / "one", build_parallel(Runtime(torch.device("cpu")))
    )
    model = Policy(load_reward_model(str(scorer), dtype=torch.float32), head="score").eval()
    groups = [*prepared.data.train, *prepared.data.held_out]

    class Pair(Runtime):
        def gather(self, value: Any) -> list[Any]:
            if not isinstance(value, list):
                return [value, None]
            assert len(value) == 12
            return [value, compute_score_table(model, groups[1::2])]

    pair = build_parallel(Pair(torch.device("cpu"), 0, 2))
    both = attach_reward_margins(settings, Dpo(settings), prepared, tmp_path / "two", pair)
    one, two = ([g.columns["reward_margin"] for part in parts for g in part] for parts in (alone, both))
    np.testing.assert_allclose(one, two, atol=1e-5)


def test_a_score_that_is_not_finite_stops_the_stage_and_names_the_pair(scorer: Path, inputs: Path) -> None:
    groups = prepare(scorer, inputs)[1].data.train[:3]
    table = [np.array([1.0, 0.5], np.float32) for _ in groups]
    assert build_packed_batch(attach_margins(groups, table)).table.group_columns["reward_margin"].tolist() == [0.5] * 3
    table[1][0] = np.nan
    with pytest.raises(NumericStop, match=r"on 1 pairs: .*") as caught:
        attach_margins(groups, table)
    assert groups[1].id in str(caught.value)


def test_models_that_cannot_weigh(scorer: Path, inputs: Path, tmp_path: Path) -> None:
    def refused(folder: Path) -> BurnishError:
        with pytest.raises(ConfigError) as caught:
            prepare(folder, inputs)
        assert caught.value.where == "reward_model" and caught.value.found == str(folder) and caught.value.remedy
        return caught.value

    assert "without a trained score head" in refused((inputs / "model").resolve()).message
    strange, short = (shutil.copytree(scorer, tmp_path / name) for name in ("strange", "short"))
    tokenizer = json.loads((strange / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = sorted(vocabulary, key=vocabulary.get)[-2:]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (strange / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "the reward model has another tokenizer: token" in refused(strange).message
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 16}))
    assert "takes 16 tokens at most, but" in refused(short).message


def test_a_dry_run_refuses_them_too(inputs: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    recipe = write_recipe(tmp_path, inputs, reward_model=str(inputs / "model"))
    assert main(["run", str(recipe), "--dry-run"]) == 2
    assert "without a trained score head" in capfd.readouterr().err

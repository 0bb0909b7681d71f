"""Settings that contradict each other are refused before anything is loaded (R-07, S1-03, S2-06)."""

from __future__ import annotations

from pathlib import Path

import pytest

from burnish.config.batch import compute_batch
from burnish.config.load import load_recipe
from burnish.errors import ConfigError
from tests.config.recipes import PAIRS, load, one, problems_of

LORA = {"r": 4}
CONTRADICTIONS: list[tuple[str, dict, str]] = [
    ("sft", {"batch_size": 8, "per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}, "batch_size"),
    ("sft", {"batch_size": 8, "gradient_accumulation_steps": 3}, "batch_size"),
    ("sft", {"eval_data": "x", "validation_split": 0.1}, "validation_split"),
    ("sft", {"slice_offset": 0.5}, "slice_offset"),
    ("sft", {"slice_share": 0.6, "slice_offset": 0.5}, "slice_share"),
    ("sft", {"max_length": 64, "max_prompt_length": 64}, "max_prompt_length"),
    ("sft", {"max_length": 64, "max_completion_length": 70}, "max_completion_length"),
    ("sft", {"max_steps": 0}, "max_steps"),
    ("sft", {"warmup_steps": 5, "warmup_ratio": 0.1}, "warmup_ratio"),
    ("sft", {"max_steps": 10, "warmup_steps": 10}, "warmup_steps"),
    ("sft", {"lr_scheduler_type": "wsd", "warmup_ratio": 0.5, "decay_ratio": 0.6}, "decay_ratio"),
    ("sft", {"decay_ratio": 0.6}, "decay_ratio"),
    ("sft", {"lr_scheduler_type": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio"),
    ("sft", {"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1"),
    ("sft", {"head_learning_rate": 1e-3}, "head_learning_rate"),
    ("dpo", {"lora": {"dropout": 0.1}}, "lora.dropout"),
    ("sft", {"lora": {"dropout": 0.1}, "disable_dropout": True}, "lora.dropout"),
    ("sft", {"lora": LORA, "top_k": 2}, "top_k"),
    ("sft", {"untie_embeddings": True}, "untie_embeddings"),
    ("sft", {"lora": {"use_dora": True, "bias": "all"}}, "lora.bias"),
    ("sft", {"devices": [0, 0]}, "devices"),
    ("sft", {"load_best_model_at_end": True}, "load_best_model_at_end"),
    ("sft", {"early_stopping_patience": 3}, "early_stopping_patience"),
    ("sft", {"greater_is_better": True}, "greater_is_better"),
    ("sft", {"drop_identical": True}, "drop_identical"),
    ("sft", {"flip_share": 0.1}, "flip_share"),
    ("distill", {"teacher": "x", "flip_share": 0.1}, "flip_share"),
    ("dpo", {"train_on": "last"}, "train_on"),
    ("dpo", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1.0]}, "loss_weights"),
    ("dpo", {"loss_weights": [1.0]}, "loss_weights"),
    ("dpo", {"loss_type": ["sigmoid", "ipo"], "loss_weights": [0.0, 0.0]}, "loss_weights"),
    ("dpo", {"loss_type": ["ipo", "ipo"]}, "loss_type"),
    ("dpo", {"loss_type": []}, "loss_type"),
    ("dpo", {"loss_type": "sigmiod"}, "loss_type"),
    ("dpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ("ipo", {"label_smoothing": 0.1}, "label_smoothing"),
    ("ipo", {"loss_type": "sigmoid"}, "loss_type"),
    ("rpo", {"loss_type": "sigmoid"}, "loss_type"),
    ("rpo", {"loss_weights": [1.0]}, "loss_weights"),
    ("orpo", {"loss_type": "sigmoid"}, "loss_type"),
    ("simpo", {"cpo_gamma": 0.1}, "cpo_gamma"),
    ("dpo", {"loss_type": "orpo"}, "loss_type"),
    ("dpo", {"loss_type": "sft"}, "loss_type"),
    ("cpo", {"loss_type": "simpo"}, "loss_type"),
    ("cpo", {"loss_type": "hinge", "label_smoothing": 0.1}, "label_smoothing"),
    ("robust", {"label_smoothing": 0.0}, "label_smoothing"),
    ("exo", {"label_smoothing": 0.0}, "label_smoothing"),
    ("bco", {"f_divergence_type": "js_divergence"}, "f_divergence_type"),
    ("dpo", {"f_alpha_divergence_coef": 0.3}, "f_alpha_divergence_coef"),
    ("dpo", {"discopop_tau": 0.3}, "discopop_tau"),
    ("aot", {"use_weighting": True}, "use_weighting"),
    ("aot", {"reward_model": "./rm"}, "reward_model"),
    ("dpo", {"loss_type": ["sigmoid", "aot_unpaired"], "reward_model": "./rm"}, "reward_model"),
    ("dpo", {"madpo_c_max": 3.0}, "madpo_c_max"),
    ("dpo", {"madpo_c_min": 0.5}, "madpo_c_min"),
    ("dpo", {"madpo_lambda": 2.0}, "madpo_lambda"),
    ("dpo", {"madpo_tau": 3.0}, "madpo_tau"),
    ("dpo", {"reward_model": "./rm", "madpo_c_max": 1.0}, "madpo_c_max"),
    ("dpo", {"reward_model": "./rm", "madpo_c_min": 1.0}, "madpo_c_min"),
    ("dpo", {"reward_model": "./rm", "madpo_c_min": 0.0}, "madpo_c_min"),
    ("dpo", {"reward_model": "./rm", "madpo_lambda": 0.0}, "madpo_lambda"),
    ("dpo", {"reward_model": "./rm", "madpo_tau": 0.0}, "madpo_tau"),
    ("dpo", {"reward_model": "rm"}, "reward_model"),
    ("madpo", {}, "reward_model"),
    ("cpo", {"reward_model": "./rm"}, "reward_model"),
    ("dpo", {"reference_mode": "adapter"}, "reference_mode"),
    ("dpo", {"reference_mode": "adapter", "lora": LORA, "reference": "gpt2"}, "reference_mode"),
    ("dpo", {"dynamic_beta": {"delta": 0.1}}, "dynamic_beta.delta"),
    ("epsilon-dpo", {"dynamic_beta": {"type": "risk"}}, "dynamic_beta"),
    ("aot", {"dynamic_beta": {"type": "beta_dpo"}}, "dynamic_beta"),
    ("simpo", {"dynamic_beta": {"type": "risk", "keep": 0.5}}, "dynamic_beta.keep"),
    ("dpo", {"dynamic_beta": {"type": "beta_dpo", "gamma": 2.0}}, "dynamic_beta.gamma"),
    ("dpo", {"dynamic_beta": {"type": "risk", "keep": 0.5}}, "dynamic_beta.keep"),
    ("dpo", {"dynamic_beta": {"type": "risk", "ema_rate": 0.1}}, "dynamic_beta.ema_rate"),
    ("dpo", {"dynamic_beta": {"type": "risk", "estimator": "ema", "window": 64}}, "dynamic_beta.window"),
    ("dpo", {"dynamic_beta": {"type": "risk", "beta_max": 0.05}}, "dynamic_beta.beta_max"),
    ("dpo", {"dynamic_beta": {"type": "cosine", "steps": 5}}, "dynamic_beta.beta_end"),
    ("dpo", {"dynamic_beta": {"type": "linear", "beta_end": 0.1, "steps": 5, "unit": "step"}}, "dynamic_beta.unit"),
    ("dpo", {"dynamic_beta": {"type": "beta_dpo", "unit": {"pairs": 1}}}, "dynamic_beta.unit"),
    ("dpo", {"dynamic_beta": {"type": "beta_dpo"}, "beta": 0.0001}, "dynamic_beta.type"),
    ("evaluate", {"tasks": []}, "tasks"),
    ("evaluate", {"tasks": ["los"]}, "tasks"),
    ("evaluate", {"tasks": ["loss", "loss"]}, "tasks"),
]


@pytest.mark.parametrize(("kind", "settings", "key"), CONTRADICTIONS)
def test_within_a_stage(kind: str, settings: dict, key: str):
    text = problems_of({**PAIRS, "stages": [{"kind": kind, **settings}]})
    assert f"stages.{kind}.{key}: " in text
    assert "→" in text
    assert "problems" not in text.splitlines()[0], f"one contradiction, one problem: {text}"


def test_there_are_at_least_twelve():
    assert len(CONTRADICTIONS) >= 12


@pytest.mark.parametrize(
    "settings",
    [
        {"batch_size": 8, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        {"batch_size": 8, "per_device_train_batch_size": 3},
        {"lora": {"dropout": 0.1}, "disable_dropout": False},
        {"lora": LORA, "top_k": 0},
        {"top_k": 2, "untie_embeddings": True},
        {"load_best_model_at_end": True, "eval_steps": 0},
        {"loss_type": ["sigmoid", "ipo"], "loss_weights": [1, 2], "label_smoothing": 0.1},
        {"loss_type": "my_module:my_loss", "label_smoothing": 0.1},
        {"reference_mode": "adapter", "lora": LORA},
        {"loss_type": "exo_pair"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1, 0.2], "ld_alpha": 0.5},
        {"loss_type": "ipo", "use_weighting": True},
        {"reward_model": "owner/name", "madpo_c_max": 4.0, "madpo_c_min": 0.2, "madpo_lambda": 0.5, "madpo_tau": 3.0},
        {"reward_model": "./rm", "use_weighting": True, "loss_type": ["bco_pair", "sft"]},
        {"f_divergence_type": "alpha_divergence", "f_alpha_divergence_coef": 0.3},
        {"dynamic_beta": {"type": "risk", "unit": {"pairs": 4}, "lambda": 0.1, "estimator": "ema", "beta_warmup": 0}},
        {"dynamic_beta": {"type": "beta_dpo", "rho": 1.0}, "margin_records": False},
        {"warmup_ratio": 0.1, "warmup_steps": 0},
        {"max_steps": 10, "num_train_epochs": 3},
    ],
)
def test_what_is_no_contradiction(settings: dict):
    one("dpo", **settings)


def test_the_batch_with_several_processes():
    settings = {"batch_size": 16, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    source = {**PAIRS, "stages": [{"kind": "sft", **settings}]}
    load(source, processes=2)
    text = problems_of(source, processes=4)
    assert "2 × gradient_accumulation_steps 4 × 4 processes = 32" in text and "set batch_size: 32" in text
    text = problems_of(
        {**PAIRS, "stages": [{"kind": "sft", "batch_size": 9, "gradient_accumulation_steps": 2}]}, processes=2
    )
    assert "the nearest valid values are 8 or 12" in text
    load({**PAIRS, "batch_size": 7, "stages": [{"kind": "sft"}]}, processes=2)  # a step may be shared unevenly


@pytest.mark.parametrize(
    ("settings", "processes", "expected"),
    [
        ({}, 1, (8, None, None)),
        ({"batch_size": 12}, 2, (12, None, None)),
        ({"per_device_train_batch_size": 2}, 3, (6, 2, 1)),
        ({"gradient_accumulation_steps": 4}, 1, (32, 8, 4)),
        ({"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}, 2, (16, 2, 4)),
        ({"batch_size": 12, "per_device_train_batch_size": 3}, 2, (12, 3, 2)),
        ({"batch_size": 12, "per_device_train_batch_size": 5}, 1, (12, 5, None)),
        ({"batch_size": 12, "gradient_accumulation_steps": 3}, 2, (12, 2, 3)),
    ],
)
def test_the_effective_batch(settings: dict, processes: int, expected: tuple):
    batch = compute_batch(one("sft", **settings), processes)
    assert (batch.batch_size, batch.per_device, batch.accumulation) == expected
    assert str(batch).startswith(f"effective batch {expected[0]} examples")


def stages(*items: dict) -> dict:
    return {**PAIRS, "stages": list(items)}


SFT, REWARD, DPO = {"kind": "sft"}, {"kind": "reward"}, {"kind": "dpo"}


@pytest.mark.parametrize(
    ("source", "parts"),
    [
        (stages(SFT, {**DPO, "init_from": "stf"}), ["dpo.init_from: there is no stage 'stf'", "did you mean sft?"]),
        (stages({**DPO, "init_from": "sft"}, SFT), ["is 'sft', which comes later", "move sft before dpo"]),
        (stages({**DPO, "init_from": "dpo"}), ["is 'dpo', the stage itself"]),
        (stages({**DPO, "init_from": "base"}), ["leave init_from out"]),
        (stages({**DPO, "init_from": "sft"}), ["there is no stage 'sft'", "no training stage comes before it"]),
        (stages({"kind": "evaluate"}, {**DPO, "init_from": "evaluate"}), ["which trains nothing"]),
        (stages(SFT, REWARD, {**DPO, "init_from": "reward"}), ["a reward model", "start from sft"]),
        (stages(REWARD, {**SFT, "init_from": "reward"}), ["a reward model"]),
        (stages(SFT, {**DPO, "init_from": "sft", "model": "x"}), ["stages.dpo.model", "from one only"]),
        (stages(SFT, {"kind": "evaluate", "of": ["stf"]}), ["there is no stage 'stf'", "did you mean sft?"]),
        (stages(SFT, {"kind": "evaluate", "name": "e"}, {"kind": "evaluate", "of": ["e"]}), ["which trains nothing"]),
        (stages(SFT, {"kind": "evaluate", "tasks": ["win_rate"]}), ["win_rate needs a judge"]),
        (stages({"kind": "evaluate", "tasks": ["win_rate"]}, REWARD), ["no reward stage comes before"]),
        (
            stages(SFT, REWARD, {"kind": "evaluate", "tasks": ["win_rate"], "judge": "sft"}),
            ["is 'sft', which is no reward stage", "judge with reward"],
        ),
        (stages(REWARD, {"kind": "evaluate", "judge": "reward"}), ["no task needs a judge"]),
        (
            stages(SFT, REWARD, {**DPO, "reward_model": "sft"}),
            ["dpo.reward_model: is 'sft', which is no reward stage", "weigh by reward"],
        ),
        (stages(SFT, {**DPO, "reward_model": "sft"}), ["which is no reward stage", "add a stage {kind: reward"]),
        (
            stages({**DPO, "reward_model": "reward"}, REWARD),
            ["is 'reward', which comes later", "move reward before dpo"],
        ),
        (stages({**DPO, "reward_model": "dpo"}), ["is 'dpo', the stage itself"]),
        (
            stages(REWARD, {**DPO, "reward_model": "rewrad"}),
            ["there is no stage 'rewrad'", "did you mean reward?", "a folder is written ./rewrad"],
        ),
        (stages({**DPO, "reward_model": "rm"}), ["no reward stage comes before it", "a hub id owner/name"]),
        (stages(REWARD, {"kind": "madpo"}), ["madpo.reward_model: is missing: kind madpo is kind dpo with it"]),
        ({"model": "m", "stages": [SFT]}, ["stages.sft.data: the stage has no data"]),
        ({"data": "d", "stages": [SFT]}, ["the stage has no model to start from"]),
        ({"model": "m", "data": "d", "stages": []}, ["stages: is empty"]),
        ({"model": "m", "data": "d"}, ["the recipe has no stages"]),
        ({"model": "m", "data": "d", "stages": {"kind": "sft"}}, ["stages: is not a list"]),
        (stages({"kind": "sfft"}), ["there is no kind 'sfft'", "did you mean sft?"]),
        (stages({"kind": "ppo"}), ["there is no kind 'ppo'", "did you mean", "the kinds are sft"]),
        (stages({"data": "x"}), ["the stage has no kind"]),
        ({**PAIRS, "of": ["x"], "stages": [SFT]}, ["belongs to a stage, not to the recipe"]),
        ({**PAIRS, "run_name": "{stag}", "stages": [SFT]}, ["no field {stag}", "did you mean stage"]),
    ],
)
def test_between_stages(source: dict, parts: list[str]):
    text = problems_of(source)
    for part in parts:
        assert part in text, text


def test_good_references_between_stages():
    reward = {**REWARD, "init_from": "sft"}
    evaluation = {
        "kind": "evaluate",
        "of": ["base", "sft", "dpo"],
        "judge": "reward",
        "tasks": ["win_rate", "pocket/maths"],
    }
    weighted = load({**stages(REWARD, {"kind": "madpo"}), "reward_model": "reward"}).recipe.stage("madpo")
    assert (weighted.kind, weighted.reward_model, weighted.loss_type) == ("dpo", "reward", "sigmoid")
    recipe = load(
        stages(SFT, reward, {**REWARD, "init_from": "reward"}, {**DPO, "init_from": "sft"}, evaluation)
    ).recipe
    assert recipe.stage_names() == ["sft", "reward", "reward-2", "dpo", "evaluate"]


# What the machine lacks


def machine_problems(**settings: object) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe({**PAIRS, "stages": [{"kind": "dpo", **settings}]}, env={})
    return str(caught.value)


def test_missing_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pairs.jsonl").write_text("{}\n")
    assert "did you mean pairs.jsonl?" in machine_problems(data="pair.jsonl")
    assert "stages.dpo.data" in machine_problems(data=["pairs.jsonl", {"source": "./x/*.jsonl"}])
    assert "stages.dpo.model" in machine_problems(model="./nothing")
    assert "stages.dpo.reference" in machine_problems(reference="/nothing/at/all")
    assert "stages.dpo.reward_model" in machine_problems(reward_model="/nothing/at/all")
    assert "stages.dpo.chat_template" in machine_problems(chat_template="t.jinja")
    assert "init_from" in machine_problems(model="./runs/a/01-sft/final")
    load_recipe({**PAIRS, "stages": [{"kind": "dpo", "data": "*.jsonl", "model": "some/hub-id"}]}, env={})


def test_a_file_beside_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "d.jsonl").write_text("{}\n")
    (folder / "r.yaml").write_text("model: m\nstages:\n- {kind: sft, data: d.jsonl}\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"r\.yaml:3.*\n.*relative to the current folder; it lies at recipes/d\.jsonl"
    ):
        load_recipe("recipes/r.yaml", env={})


def test_missing_extras(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("burnish.config.machine.find_spec", lambda name: None)
    assert "pip install 'burnish[track]'" in machine_problems(report_to=["wandb"])
    text = machine_problems(optim="adamw_8bit")
    assert "pip install 'burnish[quant]'" in text


def test_a_missing_device(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("burnish.config.machine.find_spec", lambda name: object())
    monkeypatch.setattr("burnish.config.machine.has_cuda_device", lambda: False)
    assert "needs a CUDA device" in machine_problems(optim="adamw_8bit")


def test_quantize_needs_an_adapter_and_what_it_stores():
    """R-07, acceptance 8: 4 bits with full training is refused before anything is loaded."""
    assert "stages.sft.quantize" in (text := problems_of({**PAIRS, "stages": [{"kind": "sft", "quantize": "nf4"}]}))
    assert "is nf4, which freezes the base" in text and "add lora: {}" in text
    for quantize in ("none", "int8"):
        settings = {"kind": "sft", "lora": {}, "quantize": quantize, "bnb_4bit_use_double_quant": False}
        assert f"has no effect with quantize {quantize}" in problems_of({**PAIRS, "stages": [settings]})
    assert one("sft", lora={}, quantize="nf4", bnb_4bit_use_double_quant=False).quantize == "nf4"


def test_load_in_bits_is_another_name():
    """TRL's and transformers' names: load_in_4bit, load_in_8bit, bnb_4bit_quant_type, use_bnb_nested_quant."""
    assert one("sft", lora={}, load_in_4bit=True).quantize == "nf4"
    assert one("sft", lora={}, load_in_8bit=True).quantize == "int8"
    assert one("sft", lora={}, load_in_4bit=True, bnb_4bit_quant_type="fp4").quantize == "fp4"
    assert one("sft", load_in_4bit=False, load_in_8bit=False).quantize == "none"
    assert one("sft", lora={}, load_in_4bit=True, use_bnb_nested_quant=False).bnb_4bit_use_double_quant is False
    assert one("sft", "lora={}", "sft.load_in_4bit=true").quantize == "nf4"
    assert one("sft", lora={}, quantize="4bit").quantize == "nf4"
    for settings in (
        {"load_in_4bit": True, "load_in_8bit": True},
        {"load_in_8bit": True, "quantize": "nf4"},
        {"load_in_4bit": True, "quantize": "none"},
        {"load_in_4bit": False, "quantize": "nf4"},
    ):
        text = problems_of({**PAIRS, "stages": [{"kind": "sft", "lora": {}, **settings}]})
        assert "both choose how the base is stored" in text

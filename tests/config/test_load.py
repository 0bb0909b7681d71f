"""Reading recipes: files, names, dictionaries; names of stages; defaults at the top; several models."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from burnish.config.load import load_recipe
from burnish.config.stages import DpoSettings, EvaluateSettings, SftSettings
from burnish.errors import ConfigError
from tests.config.recipes import MINIMAL, PAIRS, load, one, problems_of, write


def test_minimal():
    loaded = load(MINIMAL)
    stage = loaded.recipe.stages[0]
    assert isinstance(stage, SftSettings)
    assert (stage.name, stage.kind, stage.model, stage.data) == ("sft", "sft", "pocket", "pocket/chat")
    assert stage.seed == 42
    assert loaded.recipe.output_dir == "runs"
    assert loaded.run_name() == "recipe"


def test_top_level_settings_are_defaults_of_every_stage_that_has_them():
    recipe = load(
        {
            **PAIRS,
            "seed": 7,
            "beta": 0.3,
            "learning_rate": 1e-4,
            "report_to": ["tensorboard"],
            "stages": [
                {"kind": "sft", "learning_rate": 1e-3},
                {"kind": "dpo", "init_from": "sft"},
                {"kind": "evaluate"},
            ],
        }
    ).recipe
    sft, dpo, evaluation = recipe.stages
    assert isinstance(sft, SftSettings) and isinstance(dpo, DpoSettings) and isinstance(evaluation, EvaluateSettings)
    assert (sft.learning_rate, dpo.learning_rate, dpo.beta) == (1e-3, 1e-4, 0.3)
    assert sft.report_to == dpo.report_to == ["tensorboard"]
    assert sft.seed == dpo.seed == evaluation.seed == recipe.seed == 7
    assert evaluation.data is None, "training data is not what evaluation measures on by default"
    assert dpo.model is None and evaluation.model == "pocket"


def test_adapters_are_merged_setting_by_setting():
    stages = [{"kind": "sft", "lora": {"alpha": 4}}, {"kind": "dpo", "lora": None}, {"kind": "reward", "lora": True}]
    recipe = load({**PAIRS, "lora": {"r": 8}, "stages": stages}, "reward.lora.dropout=0").recipe
    sft, dpo, reward = recipe.stages
    assert (sft.lora.r, sft.lora.alpha) == (8, 4.0)
    assert dpo.lora is None
    assert reward.lora is not None


def test_names_are_made_where_they_lack():
    stages = [{"kind": "dpo"}, {"kind": "ipo"}, {"kind": "dpo"}, {"kind": "dpo", "name": "dpo-2"}, {"kind": "dpo"}]
    assert load({**PAIRS, "stages": stages}).recipe.stage_names() == ["dpo", "ipo", "dpo-3", "dpo-2", "dpo-4"]


@pytest.mark.parametrize("name", ["base", "seed", "7", "../x", "a b", "", "x" * 61, ".hidden", "stages"])
def test_names_that_cannot_be(name: str):
    assert "stages.0.name: is" in problems_of({**PAIRS, "stages": [{"kind": "sft", "name": name}]})


def test_a_name_given_twice():
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", "name": "a"}, {"kind": "sft", "name": "a"}]})
    assert "stage 0 has this name" in text


def test_aliases_of_kinds():
    assert one("ipo").loss_type == "ipo"
    assert one("hinge").loss_type == "hinge"
    assert one("ipo", loss_type="ipo").kind == "dpo"
    stage = load({**PAIRS, "stages": [{"method": "ipo"}]}).recipe.stages[0]
    assert stage.loss_type == "ipo"
    text = problems_of({**PAIRS, "stages": [{"kind": "ipo", "loss_type": "sigmoid"}]})
    assert "kind: ipo means loss_type: ipo" in text and "'sigmoid'" in text
    # a default for all stages is not a contradiction, what is said of the stage is
    assert load({**PAIRS, "loss_type": "sigmoid", "stages": [{"kind": "ipo"}]}).recipe.stages[0].loss_type == "ipo"
    assert "kind: ipo means" in problems_of({**PAIRS, "stages": [{"kind": "ipo"}]}, "ipo.loss_type=hinge")


def test_a_loss_type_brings_the_defaults_of_its_paper():
    """By name or by alias alike; what is given stays, and of a list the first one's hold."""
    assert one("dpo", loss_type="sppo_hard").beta == one("sppo").beta == 1e-3
    assert (one("robust").beta, one("robust").label_smoothing) == (0.01, 0.1)
    assert one("exo").label_smoothing == 1e-3 and one("dpo").label_smoothing == 0.0
    assert one("sppo", beta=0.1).beta == 0.1 and one("sppo", "beta=0.1").beta == 0.1
    assert one("dpo", loss_type=["sigmoid", "sppo_hard"]).beta == 0.1
    resolved = load({**PAIRS, "stages": [{"kind": "sppo"}]}).recipe.resolved()
    assert resolved["stages"][0]["beta"] == 1e-3, "a resolved recipe says it"


@pytest.mark.parametrize(
    ("word", "remedy"),
    [
        ("orpo", "write kind: orpo"),
        ("simpo", "write kind: simpo"),
        ("exo", "loss_type: exo_pair"),
        ("aot_pair", "aot"),
        ("kto_pair", "the types are sigmoid"),
    ],
)
def test_a_loss_that_is_elsewhere_is_said_to_be(word: str, remedy: str):
    assert remedy in problems_of({**PAIRS, "stages": [{"kind": "dpo", "loss_type": word}]})


@pytest.mark.parametrize(
    ("written", "name", "value"),
    [
        ({"model_name_or_path": "gpt2"}, "model", "gpt2"),
        ({"dataset_name": "x/y"}, "data", "x/y"),
        ({"num_epochs": 3}, "num_train_epochs", 3.0),
        ({"epochs": 3}, "num_train_epochs", 3.0),
        ({"max_seq_length": 64}, "max_length", 64),
        ({"lr": 1e-5}, "learning_rate", 1e-5),
        ({"bf16": True}, "precision", "bf16"),
        ({"fp16": True, "bf16": False}, "precision", "fp16"),
        ({"bf16": False}, "precision", "fp32"),
        ({"fp16": False}, "precision", "auto"),
        ({"torch_dtype": "bfloat16"}, "precision", "bf16"),
        ({"optim": "adamw_torch"}, "optim", "adamw"),
        ({"lr_scheduler_type": "constant_with_warmup"}, "lr_scheduler_type", "constant"),
    ],
)
def test_other_names(written: dict, name: str, value: object):
    stage = {"kind": "sft", **written}
    source = {"stages": [stage], **{k: v for k, v in PAIRS.items() if k != name}}
    loaded = load(source)
    assert getattr(loaded.recipe.stages[0], name) == value
    key = next(iter(written))
    if key not in (name, "fp16") or key == "bf16":
        assert any(f"the setting {name}" in note for note in loaded.notes), loaded.notes


def test_other_names_of_adapters():
    stage = one("sft", lora_r=4, lora_alpha=8, lora_target_modules="all-linear")
    assert (stage.lora.r, stage.lora.alpha, stage.lora.target_modules) == (4, 8.0, "all-linear")
    assert one("sft", use_peft=True).lora.r == 16
    assert one("sft", lora={"rank": 2}).lora.r == 2


def test_a_setting_under_two_names():
    assert "is given twice" in problems_of({**PAIRS, "stages": [{"kind": "sft", "lr": 1e-3, "learning_rate": 1e-3}]})
    assert "contradicts" in problems_of({**PAIRS, "stages": [{"kind": "sft", "bf16": True, "precision": "fp32"}]})
    assert "contradicts" in problems_of({**PAIRS, "stages": [{"kind": "sft", "bf16": True, "fp16": True}]})


def test_several_models():
    source = {
        "models": ["pocket", "gpt2"],
        "data": "x",
        "stages": [{"kind": "sft"}, {"kind": "dpo", "init_from": "sft"}],
    }
    recipe = load(source).recipe
    assert recipe.model_list() == ["pocket", "gpt2"]
    assert recipe.stages[0].model is None
    second = recipe.for_model("gpt2")
    assert (second.model, second.stages[0].model, second.stages[1].model) == ("gpt2", "gpt2", None)
    assert load(source, "model=other").recipe.model_list() == ["other"], "the command line replaces models by a model"
    assert "both model and models" in problems_of({**source, "model": "x"})
    assert "write models:" in problems_of({"model": ["a", "b"], "data": "x", "stages": [{"kind": "sft"}]})


def test_one_stage_without_a_list():
    recipe = load({"model": "pocket", "method": "ipo", "data": "d", "beta": 0.2, "seed": 3}).recipe
    assert recipe.stage_names() == ["ipo"]
    assert (recipe.stages[0].beta, recipe.stages[0].data, recipe.stages[0].seed) == (0.2, "d", 3)
    evaluation = load({"model": "pocket", "kind": "evaluate", "data": "d", "of": ["base"]}).recipe.stages[0]
    assert (evaluation.data, evaluation.of) == ("d", ["base"])
    assert "belongs to a stage" in problems_of({**MINIMAL, "kind": "sft"})


def test_a_mixture_of_data():
    mixture = ["pocket/chat", {"source": "b.jsonl", "weight": 2, "columns": {"prompt": "q"}}]
    data = one("sft", data=mixture).data
    assert data[0] == "pocket/chat"
    assert (data[1].source, data[1].weight, data[1].columns) == ("b.jsonl", 2.0, {"prompt": "q"})
    assert one("sft", data={"path": "x", "config": "y"}).data.subset == "y"
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", "data": [{"weight": 2}]}]})
    assert "has no 'source'" in text
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", "data": {"source": "x", "wieght": 2}}]})
    assert "stages.sft.data.wieght" in text and "did you mean weight?" in text


def test_json(tmp_path: Path):
    text = json.dumps({**MINIMAL, "name": "grün 😀"}, indent="\t")
    loaded = load(write(tmp_path, text, "recipe.json"))
    assert loaded.recipe.name == "grün 😀"
    assert loaded.source_of("model").endswith("recipe.json:2")


def test_the_resolved_recipe_means_the_same(tmp_path: Path):
    import yaml

    for source in (
        "quickstart",
        "hh-dpo",
        {"models": ["a", "b"], "data": "d", "stages": [{"kind": "ipo", "lora_r": 4}]},
    ):
        first = load(source, "logging_steps=3")
        path = write(tmp_path, yaml.safe_dump(first.recipe.resolved(), sort_keys=False))
        assert load(path).recipe == first.recipe


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "the recipe is empty"),
        ("# only a comment\n", "the recipe is empty"),
        ("- a\n- b\n", "the recipe is a list"),
        ("hello", "the recipe is plain text"),
        ("model: x\nmodel: y\nstages: []\n", "recipe.yaml:2: the key 'model' is given twice (first in line 1)"),
        ("model: x\nstages:\n\t- kind: sft\n", "recipe.yaml:3: this is not valid YAML"),
        ("model: [x\nstages: 3", "this is not valid YAML"),
        ("a: &a [*a]\n", "endless or enormous"),
        ("model: !!python/object:os.system x\n", "the tag"),
        ("model: x\n---\nmodel: y\n", "this is not valid YAML"),
        ("? [a, b]\n: c\n", "a key must be a word"),
        ("[" * 3000, "this is not valid YAML"),
        ("a: " + "[" * 60 + "]" * 60, "endless or enormous"),
        ("model: a\x00b\n", "this is not valid YAML"),
        ("model: 'a\n", "this is not valid YAML"),
    ],
)
def test_texts_that_are_no_recipes(tmp_path: Path, text: str, expected: str):
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    assert expected in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_kind_that_the_command_line_mends():
    assert load({**PAIRS, "stages": [{"kind": "foo", "name": "a"}]}, "a.kind=sft").recipe.stages[0].kind == "sft"


def test_a_stage_that_may_have_forgotten_where_to_start():
    first, second = {"kind": "sft"}, {"kind": "dpo"}
    assert "set init_from: sft" in load({**PAIRS, "stages": [first, second]}).notes[0]
    assert load({**PAIRS, "stages": [first, {**second, "init_from": "sft"}]}).notes == ()
    assert load({**PAIRS, "stages": [first, {**second, "model": "pocket"}]}).notes == ()
    assert load({**PAIRS, "stages": [{"kind": "reward"}, second]}).notes == ()


def test_an_explosion_of_anchors(tmp_path: Path):
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="enormous"):
        load(write(tmp_path, "\n".join(lines)))


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "x", "recipes.yaml")
    with pytest.raises(ConfigError, match=r"did you mean recipes\.yaml\?"):
        load("recipe.yaml")
    with pytest.raises(ConfigError, match="did you mean quickstart"):
        load("quikstart")
    with pytest.raises(ConfigError, match="is a folder"):
        load(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"model: gr\xfcn\n")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load("latin.yaml")


def test_a_file_comes_before_a_bundled_recipe_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "quickstart").mkdir()
    assert load("quickstart").recipe.name == "quickstart"
    (tmp_path / "quickstart").rmdir()
    write(tmp_path, json.dumps(MINIMAL), "quickstart")
    assert len(load("quickstart").recipe.stages) == 1


def test_merge_keys_and_anchors(tmp_path: Path):
    text = "model: m\ndata: d\nstages:\n  - &a {kind: dpo, beta: 0.2}\n  - {<<: *a, name: second, beta: 0.3}\n"
    first, second = load(write(tmp_path, text)).recipe.stages
    assert (first.beta, second.beta, second.kind) == (0.2, 0.3, "dpo")


def test_home_is_expanded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", "/home/someone")
    stage = one("sft", model="~/m", data=["~/a.jsonl", {"source": "~/b.jsonl"}])
    assert stage.model == "/home/someone/m"
    assert stage.data[0] == "/home/someone/a.jsonl"
    assert stage.data[1].source == "/home/someone/b.jsonl"


def test_everything_is_checked_without_torch_or_files(tmp_path: Path):
    path = write(tmp_path, json.dumps({"model": "./nowhere", "stages": [{"kind": "sft", "data": "gone.jsonl"}]}))
    with pytest.raises(ConfigError) as caught:
        load_recipe(path, env={})
    text = str(caught.value)
    assert "there is no file or folder './nowhere'" in text and "there is no file or folder 'gone.jsonl'" in text

"""Defaults < .env < environment < checkpoint < file < command line (S4-04, S2-04)."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest

from burnish.config.load import load_recipe
from burnish.errors import ConfigError
from tests.config.recipes import PAIRS, load, problems_of, write

LAYERS = ("dotenv", "environment", "checkpoint", "file", "command")
VALUES = dict(zip(LAYERS, (0.1, 0.2, 0.3, 0.4, 0.49)))


@pytest.mark.parametrize("given", [c for n in range(6) for c in itertools.combinations(LAYERS, n)])
def test_the_strongest_layer_wins(given: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.upper().startswith("BURNISH_")]:
        monkeypatch.delenv(name)
    if "dotenv" in given:
        (tmp_path / ".env").write_text(f"BURNISH_DPO__LABEL_SMOOTHING={VALUES['dotenv']}\n")
    if "environment" in given:
        monkeypatch.setenv("BURNISH_DPO__LABEL_SMOOTHING", str(VALUES["environment"]))
    setting = f", label_smoothing: {VALUES['file']}" if "file" in given else ""
    path = write(tmp_path, f"model: m\ndata: d\nstages:\n  - {{kind: dpo{setting}}}\n")
    loaded = load_recipe(
        path,
        overrides=[f"dpo.label_smoothing={VALUES['command']}"] if "command" in given else [],
        checkpoint={"label_smoothing": VALUES["checkpoint"]} if "checkpoint" in given else None,
    )
    stage = loaded.recipe.stage("dpo")
    assert stage.label_smoothing == (VALUES[given[-1]] if given else 0.0)  # pyright: ignore[reportAttributeAccessIssue]
    words = {
        "dotenv": ".env (BURNISH_DPO__LABEL_SMOOTHING)",
        "environment": "environment (BURNISH_DPO__LABEL_SMOOTHING)",
        "checkpoint": "checkpoint",
        "file": f"{path}:4",
        "command": "command line",
    }
    assert loaded.source_of("stages.dpo.label_smoothing") == (words[given[-1]] if given else "default")


def test_within_a_layer_the_stage_is_stronger():
    env = {"BURNISH__BETA": "0.2", "BURNISH_DPO__BETA": "0.3"}
    assert load({**PAIRS, "stages": [{"kind": "dpo"}]}, env=env).recipe.stages[0].beta == 0.3
    source = {**PAIRS, "beta": 0.4, "stages": [{"kind": "dpo", "beta": 0.5}]}
    assert load(source).recipe.stages[0].beta == 0.5
    assert load(source, "beta=0.6", "dpo.beta=0.7").recipe.stages[0].beta == 0.7
    assert load(source, "dpo.beta=0.7", "beta=0.6").recipe.stages[0].beta == 0.7
    assert load(source, "beta=0.6").recipe.stages[0].beta == 0.6, "the command line is stronger than the file"
    assert load({**PAIRS, "beta": 0.4, "stages": [{"kind": "dpo"}]}, env=env).recipe.stages[0].beta == 0.4


def test_paths_of_overrides():
    source = {**PAIRS, "stages": [{"kind": "sft"}, {"kind": "dpo"}, {"kind": "ipo"}]}
    for word in ("stages.dpo.beta=0.05", "stages.1.beta=0.05", "dpo.beta=0.05", "--dpo.beta=0.05", "dpo.beta = 0.05"):
        assert [s.beta for s in load(source, word).recipe.stages[1:]] == [0.05, 0.1]
    assert load(source, "ipo.lora.r=3").recipe.stages[2].lora.r == 3
    assert load(source, "dpo.learning-rate=1e-4").recipe.stages[1].learning_rate == 1e-4
    assert load(source, "seed=3").recipe.seed == 3
    assert load(source, "output_dir=out", "run_name={stage}").run_name() == "ipo"
    named = {**PAIRS, "stages": [{"kind": "sft"}, {"kind": "dpo", "name": "polish"}]}
    assert load(named, "dpo.beta=0.05").recipe.stages[1].beta == 0.05
    assert load(named, "polish.beta=0.05").recipe.stages[1].beta == 0.05


def test_overrides_may_change_kind_and_name():
    source = {**PAIRS, "stages": [{"kind": "dpo"}]}
    assert load(source, "stages.0.kind=ipo").recipe.stages[0].loss_type == "ipo"
    assert load(source, "stages.0.name=x").recipe.stage_names() == ["x"]
    assert load(source, "kind=ipo").recipe.stages[0].loss_type == "ipo"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("learning_rate", "is not of the form key=value"),
        ("=3", "is not of the form key=value"),
        ("dpo..beta=3", "is not of the form key=value"),
        ("dop.beta=3", "did you mean dpo"),
        ("lerning_rate=3", "did you mean learning_rate"),
        ("reward.beta=3", "this recipe has no stage of kind reward"),
        ("stages.7.beta=3", "positions are 0 to 2"),
        ("stages.sft=3", "names no setting of a stage"),
        ("stages=3", "names no setting of a stage"),
        ("dpo.bta=3", "did you mean beta?"),
        ("stages.sft.beta=3", "beta is a setting of dpo"),
        ("win_rate=3", "there is no setting or stage 'win_rate'"),
        ("init_from=sft", "belongs to a stage"),
        ("judge=x", "belongs to a stage"),
        ("head_init_std=1", "no stage of this recipe has the setting head_init_std"),
    ],
)
def test_overrides_that_reach_nothing(word: str, expected: str):
    source = {**PAIRS, "stages": [{"kind": "sft"}, {"kind": "dpo"}, {"kind": "dpo"}]}
    text = problems_of(source, word)
    assert expected in text and "command line" in text


def test_an_ambiguous_kind():
    source = {**PAIRS, "stages": [{"kind": "dpo", "name": "a"}, {"kind": "dpo", "name": "b"}]}
    assert "use one of the names a, b" in problems_of(source, "dpo.beta=3")


def test_environment_of_stages():
    source = {**PAIRS, "stages": [{"kind": "ipo"}, {"kind": "dpo", "name": "Low-Beta"}]}
    first, second = load(source, env={"BURNISH_LOW_BETA__BETA": ".5", "burnish_ipo__lora__r": "4"}).recipe.stages
    assert (first.beta, second.beta, first.lora.r, second.lora) == (0.1, 0.5, 4, None)
    assert [s.beta for s in load(source, env={"BURNISH_DPO__BETA": ".5"}).recipe.stages] == [0.5, 0.5]
    assert load(source, env={"BURNISH__OUTPUT_DIR": "x", "BURNISH__MODEL": "y"}).recipe.output_dir == "x"


def test_environment_of_other_recipes_is_left_alone():
    loaded = load({**PAIRS, "stages": [{"kind": "sft"}]}, env={"BURNISH_DPO__BETA": "1", "BURNISH__BETA": "2"})
    assert loaded.notes == ()
    notes = load({**PAIRS, "stages": [{"kind": "sft"}]}, env={"BURNISH_DPO_BETA": "1", "BURNISH_FOO__BETA": "2"}).notes
    assert "BURNISH_DPO_BETA is not read" in notes[0] and "BURNISH_FOO__BETA has no effect" in notes[1]
    assert load({**PAIRS, "stages": [{"kind": "sft"}]}, env={"BURNISH_CACHE": "x", "BURNISH_FAULT": "y"}).notes == ()


def test_environment_that_is_wrong():
    text = problems_of({**PAIRS, "stages": [{"kind": "dpo"}]}, env={"BURNISH_DPO__BETTA": "1", "BURNISH__SEDE": "3"})
    assert "environment (BURNISH_DPO__BETTA)" in text and "did you mean beta" in text
    assert "environment (BURNISH__SEDE)" in text and "did you mean seed" in text
    text = problems_of({**PAIRS, "stages": [{"kind": "dpo"}]}, env={"BURNISH_DPO__BETA": "-1"})
    assert "environment (BURNISH_DPO__BETA): stages.dpo.beta: is -1.0; it must be > 0" in text


def test_dotenv_exports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz\nFOO=bar\nBURNISH__SEED=5\n")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    path = write(tmp_path, "model: m\nstages:\n  - {kind: sft, data: d}\n")
    loaded = load_recipe(path)
    assert loaded.recipe.seed == 5
    assert "HF_TOKEN" not in os.environ and "FOO" not in os.environ
    assert "hf_" not in repr(loaded)


def test_a_checkpoint_may_be_a_whole_recipe():
    checkpoint = {"seed": 9, "stages": [{"kind": "sft", "name": "sft"}, {"kind": "dpo", "name": "dpo", "beta": 0.3}]}
    recipe = load({**PAIRS, "stages": [{"kind": "dpo"}]}, checkpoint=checkpoint).recipe
    assert (recipe.stages[0].beta, recipe.stages[0].seed) == (0.3, 9)
    env = {"BURNISH_DPO__BETA": "0.7"}
    assert load({**PAIRS, "stages": [{"kind": "dpo"}]}, checkpoint=checkpoint, env=env).recipe.stages[0].beta == 0.3


def test_processes_come_from_the_launcher():
    settings = {"batch_size": 6, "gradient_accumulation_steps": 3}
    source = {**PAIRS, "stages": [{"kind": "sft", **settings}]}
    assert load(source, env={"WORLD_SIZE": "2"}).processes == 2
    with pytest.raises(ConfigError, match="not divisible by gradient_accumulation_steps 3 × 4 processes"):
        load(source, env={"WORLD_SIZE": "4"})


def test_a_variable_that_burnish_itself_reads_is_no_unknown_setting() -> None:
    """Every BURNISH_NAME of the package, but for the examples of settings, which have two underscores."""
    import re
    from pathlib import Path

    import burnish
    from burnish.config.environment import NOT_SETTINGS

    sources = "".join(path.read_text("utf-8") for path in Path(burnish.__file__).parent.rglob("*.py"))
    named = set(re.findall(r"\bBURNISH_(?!_)[A-Z]+(?:_[A-Z]+)*\b(?!__)", sources))
    assert named - {"BURNISH_DPO", "BURNISH_STAGE"} <= NOT_SETTINGS

"""R-07: what an error says, how many it lists, how long it takes, and what it must not say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from burnish.config.aliases import FOREIGN_KEYS, KEY_ALIASES
from burnish.config.keys import RECIPE_KEYS, all_setting_names
from burnish.config.problems import RecipeError
from burnish.config.secrets import find_secret, redact
from burnish.errors import ConfigError
from tests.config.recipes import MINIMAL, PAIRS, load, problems_of, write


def test_all_problems_with_their_lines(tmp_path: Path):
    text = """\
model: pocket
sede: 3
stages:
  - kind: sft
    data: pocket/chat
    lerning_rate: 1e-5
    lora:
      rnk: 8
      dropuot: 0.1
  - kind: dpo
    data:
      source: x
      wieght: 1
    beta: -0.1
    init_from: stf
  - kind: evaluate
    tasks: [loss, win_rat]
"""
    path = write(tmp_path, text)
    with pytest.raises(RecipeError) as caught:
        load(path)
    error = caught.value
    assert error.exit_code == 2 and error.remedy
    assert str(error).startswith(f"{path}: 8 problems")
    expected = {
        2: ("sede", "seed"),
        6: ("stages.sft.lerning_rate", "learning_rate"),
        8: ("stages.sft.lora.rnk", "r"),
        9: ("stages.sft.lora.dropuot", "dropout"),
        13: ("stages.dpo.data.wieght", "weight"),
        14: ("stages.dpo.beta", "> 0"),
        15: ("stages.dpo.init_from", "sft"),
        17: ("stages.evaluate.tasks", "win_rate"),
    }
    found = {int(p.where.rpartition(":")[2]): p for p in error.problems}
    assert found.keys() == expected.keys()
    for line, (key, remedy) in expected.items():
        assert found[line].key == key
        assert remedy in found[line].message + found[line].remedy
    assert "1e-05" in str(error), "the value is named"


def test_one_problem_is_said_plainly(tmp_path: Path):
    path = write(tmp_path, "model: m\nstages:\n  - {kind: dpo, data: d, beta: no}\n")
    with pytest.raises(RecipeError) as caught:
        load(path)
    assert str(caught.value) == (
        f"{path}:3: stages.dpo.beta: is the text 'no'\n  → write a number > 0, such as 0.1 or 1e-5"
    )


def test_twenty_at_most():
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", **{f"nonsense{i}": i for i in range(30)}}]})
    assert text.startswith("recipe: 30 problems")
    assert text.count("there is no setting") == 20
    assert "and 10 more" in text


def test_a_setting_of_another_kind_is_said_to_be():
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", "beta": 0.1}]})
    assert "beta is a setting of dpo" in text and "not of sft" in text
    text = problems_of({**PAIRS, "beta": 0.1, "stages": [{"kind": "sft"}]})
    assert "no stage of this recipe has the setting beta" in text
    text = problems_of({**PAIRS, "stages": [{"kind": "sft", "output_dir": "x"}]})
    assert "output_dir belongs to the recipe" in text


@pytest.mark.parametrize("key", sorted(FOREIGN_KEYS))
def test_keys_of_other_libraries_are_explained(key: str):
    if key == "use_peft":
        return  # read as an alias where it is a switch
    assert FOREIGN_KEYS[key] in problems_of({**PAIRS, "stages": [{"kind": "sft", key: 1}]})


def test_the_tables_of_names_agree_with_the_settings():
    known = {*RECIPE_KEYS, *all_setting_names()}
    assert not known & KEY_ALIASES.keys(), "an alias may not hide a setting"
    assert not known & FOREIGN_KEYS.keys()
    assert not KEY_ALIASES.keys() & FOREIGN_KEYS.keys()
    assert {target.partition(".")[0] for target in KEY_ALIASES.values()} <= known


SECRETS = [
    "hf_abcdefghijklmnopqrstuvwxyzABCDEF",
    "sk-proj-abcdefghijklmnop1234",
    "ghp_abcdefghijklmnopqrstuvwxyz0123456789",
    "AKIAABCDEFGHIJKLMNOP",
    "https://user:secretword@example.org/data.jsonl",
]


@pytest.mark.parametrize("secret", SECRETS)
def test_secrets_are_refused_and_not_repeated(secret: str, tmp_path: Path):
    path = write(tmp_path, f"model: pocket\nstages:\n  - kind: sft\n    data: '{secret}'\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    for text in (
        str(caught.value),
        problems_of(MINIMAL, f"data={secret}"),
        problems_of(MINIMAL, env={"BURNISH__DATA": secret}),
    ):
        assert "looks like" in text and ".env" in text
        assert secret not in text and "secretword" not in text
    assert f"{path}:4" in str(caught.value)
    assert secret not in redact(f"a {secret} b")


def test_secrets_in_comments_and_keys(tmp_path: Path):
    path = write(tmp_path, f"# my token: {SECRETS[0]}\nmodel: pocket\nstages: [{{kind: sft, data: d}}]\n")
    with pytest.raises(ConfigError, match="looks like"):
        load(path)
    path = write(tmp_path, "model: pocket\nwandb_api_key: 0123456789abcdef0123456789abcdef01234567\n")
    with pytest.raises(ConfigError) as caught:
        load(path)
    assert "0123456789abcdef" not in str(caught.value)


def test_what_is_no_secret():
    revision = "0123456789abcdef0123456789abcdef01234567"
    for text in (f"revision: {revision}", "hf_model: x", "task-sk-learn", "token: false", "https://example.org/a:b@c"):
        assert find_secret(text) is None, text


@pytest.mark.parametrize("text", ["model: m\nstages: [{kind: sft, data: d, lr_: 3}]\n", "model: [", "", "- x\n"])
def test_exit_2_before_torch_is_loaded_and_without_a_traceback(tmp_path: Path, text: str):
    path = write(tmp_path, text)
    code = "import sys; from burnish.cli.main import main; status = main(['run', sys.argv[1]]); "
    code += "sys.exit(99 if 'torch' in sys.modules else status)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    assert str(path) in done.stderr and "→" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(p.name for p in tmp_path.iterdir()) == ["recipe.yaml"], "nothing is written"

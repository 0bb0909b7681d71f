"""R-29: secrets from the environment, the recipe, the data and exceptions are in no byte that a run leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from tests.pipeline.test_run import write_recipe

ENVIRONMENT = {
    "HF_TOKEN": "hf_CANARYcanaryCANARY0123456789",
    "WANDB_API_KEY": "0123456789abcdef0123456789abcdef0canary1",
    "OPENAI_API_KEY": "sk-canary0123456789ABCDEFcanary",
    "DATABASE_PASSWORD": 'odd "pass\\word" ü canary2',
}
DATA = ["hf_INDATAcanary0123456789abcdef", "sk-indata0123456789canary", "https://user:urlpassCanary3@host/x"]
CANARIES = [*ENVIRONMENT.values(), *DATA[:2], "urlpassCanary3"]
LOSS = """
def leaky(pairs, *, beta):
    raise RuntimeError("401 Unauthorized: token {token}, https://me:{url}@host/?token=canaryquery4")
"""


def forms(canary: str) -> set[bytes]:
    """How a text may stand in a file."""
    texts = {canary, json.dumps(canary)[1:-1], json.dumps(canary, ensure_ascii=False)[1:-1], repr(canary)[1:-1]}
    texts |= {yaml.safe_dump(canary, allow_unicode=True).strip("'\"\n."), canary.replace('"', "&quot;")}
    return {text.encode(encoding) for text in texts for encoding in ("utf-8", "utf-16-le")}


def check_clean(folder: Path, canaries: list[str]) -> int:
    """No canary in any byte, name or log of a folder; returns how many files were searched."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    for file in files:
        raw = file.read_bytes()
        for canary in canaries:
            assert not any(form in raw for form in forms(canary)), f"{canary} in {file}"
            assert canary not in file.name
    return len(files)


def spoil_data(inputs: Path, folder: Path) -> Path:
    """The rows of the inputs, with secrets in every prompt and answer."""
    (folder / "inputs").mkdir()
    (folder / "inputs" / "model").symlink_to(inputs / "model")
    text = " ".join([*DATA, ENVIRONMENT["HF_TOKEN"]])
    for name in ("chat.jsonl", "pairs.jsonl"):
        rows = [json.loads(line) for line in (inputs / name).read_text().splitlines()]
        for row in rows:
            for key, value in row.items():
                if isinstance(value, str) and key in ("prompt", "chosen", "rejected", "completion", "text"):
                    row[key] = f"{value} {text}"
                elif isinstance(value, list):
                    for turn in value:
                        if isinstance(turn, dict) and "content" in turn:
                            turn["content"] += f" {text}"
        (folder / "inputs" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "inputs"


def run(server, folder: Path, words: list[str], name: str) -> tuple[int, str]:
    log = folder / "outside" / name
    log.parent.mkdir(exist_ok=True)
    status = server.run(words, log=log, cwd=folder, env=ENVIRONMENT)
    return status, log.read_text()


def test_r29_nothing_secret_is_left_by_a_run(server, inputs, tmp_path):
    """R-29: sft → reward → dpo → evaluate with secrets in env and data; then a crash whose text holds them."""
    own = spoil_data(inputs, tmp_path)
    recipe = write_recipe(tmp_path, own, name="of " + ENVIRONMENT["DATABASE_PASSWORD"], run_name="small")
    status, text = run(server, tmp_path, ["run", str(recipe)], "log")
    assert status == 0, text[-3000:]
    assert "canary" not in text.lower()
    assert check_clean(tmp_path / "runs", CANARIES) > 40
    samples = (tmp_path / "runs/small/04-evaluate/samples.jsonl").read_text()
    assert "***" in samples, "the samples show the prompts, with the secrets masked"
    (tmp_path / "leaky.py").write_text(LOSS.format(token=ENVIRONMENT["HF_TOKEN"], url="urlpassCanary3"))
    words = ["run", str(recipe), "stages.dpo.loss_type=leaky:leaky", "--verbose"]
    log = tmp_path / "outside" / "crash"
    assert server.run(words, log=log, cwd=tmp_path, env=ENVIRONMENT) == 1
    text = log.read_text()
    assert "401 Unauthorized" in text, text[-2000:]
    assert "canary" not in text.lower(), text
    check_clean(tmp_path / "runs", [*CANARIES, "canaryquery4"])
    assert json.loads((tmp_path / "runs/small/03-dpo/stage.json").read_text())["state"] == "failed"


@pytest.mark.parametrize(
    "secret", [ENVIRONMENT["HF_TOKEN"], ENVIRONMENT["OPENAI_API_KEY"], "https://u:urlpassCanary3@h/x"]
)
@pytest.mark.parametrize("place", ["file", "command line"])
def test_r29_a_recipe_with_a_secret_is_refused_without_repeating_it(server, inputs, tmp_path, secret, place):
    """R-29: exit 2, nothing written, the secret not said."""
    changes = {"wandb_project": secret} if place == "file" else {}
    words = ["run", str(write_recipe(tmp_path, inputs, **changes))]
    words += [f"sft.wandb_project={secret}"] if place == "command line" else []
    status, text = run(server, tmp_path, words, "log")
    assert status == 2, text
    assert secret not in text and "urlpassCanary3" not in text
    assert not (tmp_path / "runs").exists()


def test_r29_a_secret_that_no_pattern_knows_is_masked(server, inputs, tmp_path):
    """R-29: the value of a secret variable in a recipe looks like any hash; it is masked wherever it would go."""
    recipe = write_recipe(tmp_path, inputs, wandb_project=ENVIRONMENT["WANDB_API_KEY"], max_steps=1)
    status, text = run(server, tmp_path, ["run", str(recipe)], "log")
    assert status == 0, text[-2000:]
    assert ENVIRONMENT["WANDB_API_KEY"] not in text
    check_clean(tmp_path / "runs", CANARIES)

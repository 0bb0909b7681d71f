"""Launchers other than burnish's own (S3-19, R-23): torchrun and accelerate launch start the same run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pipeline.tiny_folder import build_model_folder, write_rows

SCRIPTS = Path(sys.executable).parent
LAUNCHERS = {
    "torchrun": [str(SCRIPTS / "torchrun"), "--nproc-per-node=2", "--standalone", "-m", "burnish"],
    "accelerate": [
        *(str(SCRIPTS / "accelerate"), "launch", "--multi_gpu", "--num_processes=2", "--mixed_precision=no"),
        *("--num_machines=1", "--dynamo_backend=no", "-m", "burnish"),
    ],
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("launchers")
    stage = {
        "kind": "dpo",
        "model": str(build_model_folder(folder / "model")),
        "data": str(write_rows(folder / "pairs.jsonl", "pocket/preferences", 16)),
        "max_steps": 2,
        "batch_size": 4,
    }
    path = folder / "recipe.json"
    path.write_text(json.dumps({"stages": [stage]}), encoding="utf-8")
    return path


def run(command: list[str], recipe: Path, out: Path, *more: str) -> tuple[str, list[dict]]:
    """The digest of the rows that were used, and the metrics."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "BURNISH_DEVICE": "cpu"}
    words = [*command, "run", str(recipe), f"output_dir={out}", "run_name=r", *more]
    done = subprocess.run(words, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    stage = out / "r" / "01-dpo"
    metrics = [json.loads(line) for line in (stage / "metrics.jsonl").read_text("utf-8").splitlines()]
    return json.loads((stage / "stage.json").read_text("utf-8"))["ledger"], metrics


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("name", list(LAUNCHERS))
def test_a_launcher_gives_the_same_run_as_num_processes(name: str, recipe: Path, tmp_path: Path):
    launched = run(LAUNCHERS[name], recipe, tmp_path / name)
    assert launched == run([sys.executable, "-m", "burnish"], recipe, tmp_path / "own", "--num-processes=2")

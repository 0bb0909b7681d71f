"""Nothing goes to the network in the default run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.pipeline.test_run import write_recipe

OFFLINE = Path(__file__).resolve().parent.parent / "offline"
PATHS = os.pathsep.join((str(OFFLINE), str(OFFLINE.parent.parent / "src")))
QUIET = (
    "HF_HUB_OFFLINE",
    "TRANSFORMERS_OFFLINE",
    "HF_DATASETS_OFFLINE",
    "HF_HUB_DISABLE_TELEMETRY",
    "DO_NOT_TRACK",
    "CI",
)


def test_r10_no_connection_and_no_look_up(tmp_path, inputs):
    """R-10, T-37: sft → reward → dpo → evaluate with sockets refused and no offline switch set: zero attempts."""
    record = tmp_path / "attempts"
    env = {k: v for k, v in os.environ.items() if k not in QUIET}
    env |= {"PYTHONPATH": PATHS, "BURNISH_NETWORK_RECORD": str(record), "OMP_NUM_THREADS": "1"}
    recipe = write_recipe(tmp_path, inputs)
    command = [sys.executable, "-m", "burnish", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert not record.exists(), record.read_text()


def test_the_recorder_works(tmp_path):
    record = tmp_path / "attempts"
    env = os.environ | {"PYTHONPATH": PATHS, "BURNISH_NETWORK_RECORD": str(record)}
    code = "import urllib.request; urllib.request.urlopen('http://example.org')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, env=env, cwd=tmp_path)
    assert done.returncode != 0
    assert "example.org" in record.read_text()

"""The soak in small: two disturbances, the same bits; and it fails when the program forgets something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.slow
def test_soak_in_small(tmp_path: Path) -> None:
    log = tmp_path / "soak.log"
    words = [
        "--kind",
        "sft",
        "--model",
        "pocket-small",
        "--steps",
        "60",
        "--events",
        "kill",
        "full",
        "--after",
        "20",
        "--seed",
        "2",
    ]
    run = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "soak.py"), *words, "--log", str(log)],
        capture_output=True,
        text=True,
        env=os.environ | {"BURNISH_FAULT": ""},
    )
    text = log.read_text()
    assert run.returncode == 0, text + run.stderr
    assert "seed 2" in text and "PASSED" in text
    assert "signal 9" in text and "no error" in text
    assert text.count("  equal ") == 5

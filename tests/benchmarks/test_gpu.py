"""The benchmark for CUDA devices: it plans, says where there is no device, and its script runs on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import gpu  # noqa: E402
import peer_trl  # noqa: E402


def test_the_plan_names_both_sides_and_trl_at_its_best(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peer_trl, "find_spec", lambda name: object())
    assert gpu.main(["--plan"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert plan["sides"] == ["burnish", "trl"] and [p["method"] for p in plan["plans"]] == ["sft", "dpo", "reward"]
    assert all(p["shape"]["layers"] == 28 and p["precision"] == "bf16" and p["device"] == "cuda" for p in plan["plans"])
    for method, arguments in plan["trl"].items():
        assert arguments["bf16"] and not arguments["use_cpu"] and not arguments["gradient_checkpointing"]
        assert arguments["model_init_kwargs"] == {"attn_implementation": "flash_attention_2"}
        assert arguments.get("padding_free", False) == (method != "reward")


def test_without_a_device_it_says_so(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 0
    assert "no CUDA device here" in capsys.readouterr().out


@pytest.mark.slow
def test_the_script_runs_on_a_tiny_model() -> None:
    pytest.importorskip("trl", reason="needs the peer: pip install 'burnish[dev]'")
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--device", "cpu", "--tiny", "--steps", "2"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    rows = json.loads(found.stdout.strip().splitlines()[-1])["rows"]
    assert [row["method"] for row in rows] == ["sft", "dpo", "reward"]
    for row in rows:
        for side in ("burnish", "trl"):
            assert row[side]["tokens_per_second"] > 0 and len(row[side]["losses"]) == 3, row
        assert row["loss_max_abs_diff"] < 5e-3, row

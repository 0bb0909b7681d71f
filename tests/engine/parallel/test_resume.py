"""Resume on several ranks: to the bit with as many, and with the same state on another number or under another strategy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.parallel.stages import train_alone
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
TRAIN = "tests.engine.parallel.stages:train"


def run(folder: Path, **given: Any) -> dict[str, str]:
    """The state of a stage on two ranks, which both hold."""
    first, second = run_ranks(TRAIN, 2, {"folder": str(folder), "strategy": "fsdp2", "method": "sft", **given})
    assert first == second
    return first


CASES = [
    {"method": "sft", "checkpointing": True, "evaluate": True},
    {"method": "beta_dpo", "lora": True},
    {"method": "dpo bco_pair", "reshard": False},
    {"method": "kto kto", "optim": "adafactor"},
]


@pytest.mark.parametrize(
    "given", [CASES[0], *(pytest.param(c, marks=pytest.mark.slow) for c in CASES[1:])], ids=lambda c: c["method"]
)
def test_r23_r24_a_killed_rank_and_a_resume_end_with_the_same_bits(tmp_path: Path, given: dict[str, Any]) -> None:
    """R-24: SIGKILL of one rank; the other ends by itself; the same command goes on from the last checkpoint."""
    whole = run(tmp_path / "a", **given)
    with pytest.raises(AssertionError, match=r"gone or did not answer"):
        run(tmp_path / "b", **given, kill=[1, 5])
    assert run(tmp_path / "b", **given, resume=True) == whole


@pytest.mark.parametrize("optim", ["adamw", pytest.param("adafactor", marks=pytest.mark.slow)])
def test_r31_the_state_is_the_same_after_resharding_2_1_2(tmp_path: Path, optim: str) -> None:
    """Parameters, moments and counters to the bit: two ranks, one process, two ranks again, two equal copies."""
    given = {"steps": 4, "optim": optim}
    sharded = run(tmp_path / "two", **given)
    alone = {"strategy": "auto", "method": "sft", "folder": str(tmp_path / "one"), "save": True, **given}
    assert train_alone(alone | {"resume_from": str(tmp_path / "two" / "checkpoint-4")}) == sharded
    again = str(tmp_path / "one" / "checkpoint-4")
    assert run(tmp_path / "again", **given, resume_from=again) == sharded
    assert run(tmp_path / "copies", **given, resume_from=again, strategy="replicated") == sharded

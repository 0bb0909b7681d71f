"""The gradient on two ranks is that of one process, under every strategy, for every kind and loss; G-12."""

from __future__ import annotations

from typing import Any

import pytest

from tests.engine.test_step import EVERY
from tests.ranks import run_ranks

pytestmark = pytest.mark.dist
COUPLED = ["sft", "reward", "kto kto", "dpo aot", "dpo bco_pair", "beta_dpo", "risk", "distill jsd"]


def check(rows: list[dict[str, Any]], limit: float) -> None:
    for row in rows:
        assert row["error"] < limit and row["norm"] < limit, row
        assert row["alike"], "the ranks hold other gradients"
        assert all(c == row["counts"][0] for c in row["counts"]), f"G-12: ranks ran other numbers of passes: {row}"
        assert row["counts"][0]["policy backward"] >= 1


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("replicated", marks=pytest.mark.slow)])
def test_g12_r23_every_kind_in_fp64(strategy):
    """With 5 examples, and with one, so that a rank has no data."""
    rows = run_ranks(
        "tests.engine.parallel.cases:check_gradients",
        2,
        {"methods": EVERY, "strategy": strategy, "model": "gpt2", "n": [5, 1]},
    )[0]
    assert len(rows) == 2 * len(EVERY)
    check(rows, 1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"lora": True, "checkpointing": True},
        *(pytest.param(o, marks=pytest.mark.slow) for o in ({}, {"checkpointing": True}, {"lora": True})),
    ],
    ids=str,
)
def test_fused_blocks_and_a_tied_head_in_fp32(options):
    given = {"methods": COUPLED, "strategy": "fsdp2", "model": "qwen", "n": [5, 1], "options": options}
    check(run_ranks("tests.engine.parallel.cases:check_gradients", 2, given)[0], 1e-6)


def test_a_whole_reference_beside_a_sharded_policy():
    given = {"methods": ["distill jsd", "kto kto"], "strategy": "fsdp2", "model": "gpt2", "n": [5, 1]}
    rows = run_ranks("tests.engine.parallel.cases:check_gradients", 2, given | {"shard_reference": False})[0]
    check(rows, 1e-12)

"""Laws of the methods: exact sums under any split, nothing at all, evaluation independent of the batch size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.stages import CpoSettings, DpoSettings, RewardSettings, SftSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.engine.evaluation import run_evaluation
from burnish.engine.runtime import Runtime
from burnish.engine.step import StepContext
from burnish.methods.cpo import Cpo
from burnish.methods.dpo import Dpo
from burnish.methods.reward import Reward
from burnish.methods.sft import Sft
from burnish.models.policy import Policy
from tests.losses.drawn import REGISTERED, build_method
from tests.losses.tiny import build_model

METHODS: dict[str, Any] = {
    "sft": Sft(SftSettings()),
    "reward": Reward(RewardSettings(center_rewards_coefficient=0.02)),
    "dpo": Dpo(DpoSettings()),
    **{str(case): build_method(case) for case in REGISTERED},
    "cdpo": Dpo(DpoSettings(label_smoothing=0.2)),
    "rpo": Dpo(DpoSettings(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])),
    "ld": Dpo(DpoSettings(ld_alpha=0.3)),
    "cpo without nll": Cpo(CpoSettings(cpo_alpha=0.0)),
    "mix": Dpo(DpoSettings(loss_type=["sigmoid", "ipo", "hinge"], loss_weights=[1.0, 0.3, 0.1])),
}
SUMS = [name for name, method in METHODS.items() if not method.coupled]
N = 10


def build_groups(k: int, seed: int = 0, n: int = N) -> list[Group]:
    """n groups of k completions of 1 to 9 tokens, some of them masked, with reference log-probs and margins."""
    rng = np.random.default_rng(seed)
    groups = []
    for i in range(n):
        completions = []
        for _ in range(k):
            size = int(rng.integers(1, 10))
            mask = rng.random(size) < 0.8
            mask[-1] = True
            ids, reference = rng.integers(3, 90, size).astype(np.int32), rng.normal(-4, 1, size).astype(np.float32)
            completions.append(Completion(ids, mask, token_columns={"ref_logprobs": reference}))
        prompt = rng.integers(3, 90, int(rng.integers(1, 6))).astype(np.int32)
        columns = {"margin": float(rng.uniform(0, 1))} if k == 2 else {}
        groups.append(Group(f"row:{i}", prompt, tuple(completions), columns=columns))
    return groups


def draw_outputs(method: Any, batch: Any, seed: int) -> Outputs:
    """Random fp64 outputs as leaves, the same for the same rows."""
    rng = np.random.default_rng(seed)
    size = len(batch.target_ids) if "logprobs" in method.want else len(batch.last_index)
    tensor = torch.from_numpy(rng.normal(-3, 1, size)).requires_grad_()
    return Outputs(logprobs=tensor) if "logprobs" in method.want else Outputs(scores=tensor)


def cut(outputs: Outputs, batch: Any, groups: Sequence[Group], start: int, stop: int) -> Outputs:
    """The outputs of groups [start, stop)."""
    inside = (batch.table.completion_group >= start) & (batch.table.completion_group < stop)
    if outputs.scores is not None:
        return Outputs(scores=outputs.scores[inside])
    assert outputs.logprobs is not None
    return Outputs(logprobs=outputs.logprobs[inside[batch.table.token_completion]])


def k_of(method: Any) -> int:
    return 1 if method.name == "sft" else 2


@pytest.mark.parametrize("name", SUMS)
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=5), seed=st.integers(0, 20))
def test_any_split_gives_the_same_sums_counts_and_gradient(name: str, cuts: list[int], seed: int) -> None:
    method = METHODS[name]
    groups = build_groups(k_of(method), seed)
    batch = build_packed_batch(groups)
    outputs = draw_outputs(method, batch, seed)
    (leaf,) = outputs.named().values()
    whole = method.compute_loss(outputs, batch.table, {})
    edges = [0, *sorted(cuts), N]
    parts = []
    for a, b in pairwise(edges):
        table = build_packed_batch(groups[a:b]).table
        parts.append(method.compute_loss(cut(outputs, batch, groups, a, b), table, {}))
    for i, term in enumerate(whole.terms):
        total = torch.stack([p.terms[i].sum for p in parts]).sum()
        assert total.item() == pytest.approx(term.sum.item(), rel=1e-12)
        assert sum(p.terms[i].count for p in parts) == term.count == method.counts(groups)[term.name]
        assert sum(method.counts(groups[a:b])[term.name] for a, b in pairwise(edges)) == term.count
        (one,), (many,) = (torch.autograd.grad(x, [leaf], retain_graph=True) for x in (term.sum, total))
        torch.testing.assert_close(one, many, rtol=1e-12, atol=1e-15)
    for i, metric in enumerate(whole.metrics):
        assert sum(p.metrics[i].sum.item() for p in parts) == pytest.approx(metric.sum.item(), rel=1e-12, abs=1e-12)
        assert sum(p.metrics[i].count for p in parts) == metric.count


@pytest.mark.parametrize("name", METHODS)
def test_zero_groups_give_zero_with_a_graph(name: str) -> None:
    method = METHODS[name]
    policy = Policy(build_model("score" if method.head == "score" else "lm", 0), head=method.head)
    batch = build_packed_batch([])
    result = method.compute_loss(policy(batch, method.want), batch.table, method.initial_state())
    for term in result.terms:
        assert (term.sum.item(), term.count) == (0.0, 0.0)
        term.sum.backward(retain_graph=True)
    assert method.counts([]) == {t.name: 0.0 for t in result.terms}
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_declared_as_the_engine_expects(name: str) -> None:
    method = METHODS[name]
    assert method.head in ("lm", "score") and isinstance(method.want, frozenset)
    state = method.initial_state()
    assert json.loads(json.dumps(state)) == state
    assert bool(state) == method.stateful and (method.coupled or not method.stateful)
    assert isinstance(method.best_metric[0], str) and isinstance(method.best_metric[1], bool)


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_a_group_that_is_no_pair_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="two completions, not 1"):
        METHODS[name].counts(build_groups(1))


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "dpo ipo", "dpo aot", "dpo bco_pair", "orpo orpo", "rpo"])
def test_t33_evaluation_is_the_same_for_every_batch_size(name: str) -> None:
    """TRL averages batch means: 6.544 / 6.661 / 6.671 for batch 1 / 2 / 4 on the same rows."""
    method = METHODS[name]
    policy: Any = Policy(build_model("score" if method.head == "score" else "lm", 0), head=method.head)
    ctx = StepContext(policy=policy, method=method, runtime=Runtime(torch.device("cpu")), parameters=[], seed=0)
    groups = build_groups(k_of(method))
    found = [
        run_evaluation(ctx, groups, method.initial_state(), budget=budget, cap=cap)
        for budget, cap in ((8, 1), (40, 2), (10**6, None))
    ]
    assert {"eval_loss"} <= set(found[0]) == set(found[1]) == set(found[2])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=2e-6, abs=1e-6)


def test_t28_losses_are_at_least_fp32_whatever_the_policy_computes_in() -> None:
    """bf16 would turn 6.27682 into 6.27620; under autocast the policy still returns fp32, and so do losses."""
    groups = build_groups(2)
    policy = Policy(build_model("lm", 0), head="lm", compute_dtype=torch.bfloat16)
    batch = build_packed_batch(groups)
    outputs = policy(batch, frozenset({"logprobs"}))
    assert outputs.logprobs is not None and outputs.logprobs.dtype == torch.float32
    result = METHODS["dpo"].compute_loss(outputs, batch.table, {})
    assert result.terms[0].sum.dtype == torch.float32
    assert all(m.sum.dtype == torch.float32 for m in result.metrics)

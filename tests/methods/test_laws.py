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
from burnish.engine.step import StepContext, call_policy
from burnish.methods.cpo import Cpo
from burnish.methods.dpo import Dpo
from burnish.methods.reward import Reward
from burnish.methods.sft import Sft
from burnish.models.policy import Policy
from burnish.models.reference import Reference
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
    further = {f.name: torch.from_numpy(rng.normal(-3, 1, size)) for f in method.functionals}
    return Outputs(logprobs=tensor, functionals=further) if "logprobs" in method.want else Outputs(scores=tensor)


def cut(outputs: Outputs, batch: Any, groups: Sequence[Group], start: int, stop: int) -> Outputs:
    """The outputs of groups [start, stop)."""
    inside = (batch.table.completion_group >= start) & (batch.table.completion_group < stop)
    if outputs.scores is not None:
        return Outputs(scores=outputs.scores[inside])
    assert outputs.logprobs is not None
    tokens = inside[batch.table.token_completion]
    further = {name: values[tokens] for name, values in outputs.functionals.items()}
    return Outputs(logprobs=outputs.logprobs[tokens], functionals=further)


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
    leaf = outputs.scores if outputs.logprobs is None else outputs.logprobs
    state = method.initial_state()
    whole = method.compute_loss(outputs, batch.table, state)
    edges = [0, *sorted(cuts), N]
    parts = []
    for a, b in pairwise(edges):
        table = build_packed_batch(groups[a:b]).table
        parts.append(method.compute_loss(cut(outputs, batch, groups, a, b), table, state))
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
    ctx = StepContext(policy=policy, method=method, runtime=Runtime(torch.device("cpu")), parameters=[], seed=0)
    ctx.reference = Reference(policy, "copy") if method.needs_reference_head else None
    result = method.compute_loss(call_policy(ctx, batch), batch.table, method.initial_state())
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
    assert bool(state) == method.stateful
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


def build_degenerate() -> tuple[list[Group], np.ndarray]:
    """Pairs of 1 and 1, 1 and 700, 700 and 1, 700 and 700 tokens, and a pair of equal answers; their log-probs."""
    rng = np.random.default_rng(6)
    groups, logprobs = [], []
    for i, lengths in enumerate([(1, 1), (1, 700), (700, 1), (700, 700), (9, 9)]):
        completions = []
        for slot, n in enumerate(lengths):
            ids = rng.integers(3, 90, n).astype(np.int32)
            reference = rng.normal(-2, 1, n).clip(max=-0.01)
            policy = (reference + rng.normal(0, 0.02, n)).clip(max=-0.01)
            if i == 4 and slot == 1:
                completions.append(completions[0])
                logprobs.append(logprobs[-1])
                continue
            completions.append(Completion(ids, np.ones(n, bool), token_columns={"ref_logprobs": reference}))
            logprobs.append(policy)
        groups.append(Group(f"row:{i}", np.array([5, 6], np.int32), tuple(completions), columns={"margin": 0.0}))
    return groups, np.concatenate(logprobs)


def build_outputs(method: Any, logprobs: torch.Tensor) -> Outputs:
    """These log-probs, with functionals that are equal where the log-probs are."""
    further = -0.1 * logprobs.detach()
    return Outputs(logprobs=logprobs, functionals={f.name: further for f in method.functionals})


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.head == "lm" and n != "sft"])
def test_degenerate_pairs_are_finite_and_keep_their_digits_in_fp32(name: str) -> None:
    """One token, many hundred tokens, equal answers, policy = reference: finite, and fp32 agrees with fp64."""
    method = METHODS[name]
    groups, policy = build_degenerate()
    found: dict[torch.dtype, list[float]] = {}
    for dtype in (torch.float64, torch.float32):
        table = build_packed_batch(groups).table
        reference = table.token_columns["ref_logprobs"].to(dtype)
        table.token_columns["ref_logprobs"] = reference
        for logprobs in (torch.from_numpy(policy).to(dtype), reference.clone()):
            leaf = logprobs.requires_grad_()
            result = method.compute_loss(build_outputs(method, leaf), table, method.initial_state())
            total = torch.stack([t.weight * t.sum / t.count for t in result.terms]).sum()
            total.backward()
            assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())
            found.setdefault(dtype, []).extend([total.item(), float(leaf.grad.norm())])
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-5)
    last = build_outputs(method, torch.from_numpy(policy[-18:]))
    equal = method.compute_loss(last, build_packed_batch(groups[4:]).table, method.initial_state())
    margins = [m for m in equal.metrics if m.name == "rewards/margins"]
    assert [m.sum.item() for m in margins] == [0.0] * (name != "dpo sft")


def test_evaluation_reads_a_running_shift_and_does_not_move_it() -> None:
    """BCO with δ = 0.7 from training: the held-out rows neither enter it nor see each other."""
    method = METHODS["dpo bco_pair"]
    policy: Any = Policy(build_model("lm", 0), head="lm")
    ctx = StepContext(policy=policy, method=method, runtime=Runtime(torch.device("cpu")), parameters=[], seed=0)
    groups = build_groups(2)
    state = {"losses": {"bco_pair": {"rewards": 10, "mean": 0.7}}}
    found = run_evaluation(ctx, groups, state, budget=10**6)
    with torch.no_grad():
        batch = build_packed_batch(groups)
        pairs = method._compute_pairs(policy.eval()(batch, method.want), batch.table)
    a, z = (0.01 * x.double().numpy() for x in (pairs.chosen_ratio, pairs.rejected_ratio))
    want = np.logaddexp(0, 0.7 - a) + np.logaddexp(0, z - 0.7)
    assert found["eval_loss"] == pytest.approx(want.mean(), rel=1e-6)
    assert state == {"losses": {"bco_pair": {"rewards": 10, "mean": 0.7}}}

"""The gradient of a step does not depend on how it is cut, nor on how many processes compute it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from burnish.core.batch import Outputs, build_packed_batch
from burnish.engine.context import StepContext, Stopped
from burnish.engine.method import arrange_groups, build_initial_state
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.step import compute_gradient
from burnish.models.reference import Reference
from tests.engine.tiny import CONTROLLED, MIXES, build_groups, build_method, build_policy, flatten, trainable
from tests.losses.drawn import REGISTRY
from tests.waiting import BOUND

# Methods that two processes are tried with too, and every loss type beside them; "dpo aot" is a kind and its loss type.
METHODS = ["sft", "reward", "sigmoid", "coupled", "dpo aot", "dpo bco_pair", "orpo orpo", "rpo", "wpo", "kto kto"]
METHODS += ["madpo", "madpo, wpo, bco + sft"]
# A live reference in each step: every loss that reads its distribution.
LIVE = [name for name in REGISTRY if "logits" in build_method(name)[0].reference]
METHODS += [*LIVE, *CONTROLLED]
EVERY = [*METHODS, *(name for name in [*REGISTRY, *MIXES] if name not in METHODS)]
WHOLE = (10_000, None)
CUTS = [(10_000, 1), (10_000, 3), (60, None), (30, None), (12, None)]


def choose_cuts() -> list:
    """(name, cuts): the smallest cut and one of the others in turn, by default; all five in the slow suite."""
    few = [pytest.param(name, (CUTS[-1], CUTS[i % 4]), id=name) for i, name in enumerate(EVERY)]
    return few + [pytest.param(name, CUTS, id=f"{name}, every cut", marks=pytest.mark.slow) for name in EVERY]


def run_step(
    name: str, budget: int, cap: int | None = None, *, n: int = 7, world: int = 1, runtime: Runtime | None = None, **kw
):
    """(figures, flat gradient, next state) of one step in fp64."""
    method, head, k, reference = build_method(name)
    policy = build_policy(head, **kw)
    policy.train(True)
    groups = arrange_groups(method, build_groups(n + (method.partners is not None), k=k, reference=reference))[:n]
    parameters = trainable(policy)
    stored = reference and "logits" not in method.reference
    needs = "logits" in method.reference or ("logprobs" in method.reference and not stored)
    live = Reference(build_policy(head, seed=1), "copy") if needs else None
    ctx = StepContext(
        {"policy": policy},
        method,
        build_parallel(runtime or Runtime(torch.device("cpu"))),
        list(parameters.values()),
        seed=0,
        reference=live,
    )
    plan = build_plan(groups, budget=budget, cap=cap, world=world, coupled=method.coupled)
    found = compute_gradient(ctx, groups, plan, build_initial_state(method), step=0)
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters.values()]
    return found, torch.cat([g.reshape(-1) for g in grads])


@pytest.mark.parametrize(("name", "cuts"), choose_cuts())
def test_r11_the_gradient_is_the_same_under_any_cut(name, cuts):
    """R-11, S4-16: one batch, capped batches, small budgets, groups cut by completion with their prompt repeated."""
    whole, expected = run_step(name, *WHOLE)
    assert whole.bad == []
    assert expected.norm() > 1e-3
    for budget, cap in cuts:
        found, gradient = run_step(name, budget, cap)
        assert (gradient - expected).norm() / expected.norm() < 1e-10, (budget, cap)
        assert found.figures == pytest.approx(whole.figures, rel=1e-10, abs=1e-12)
        assert flatten(found.state) == pytest.approx(flatten(whole.state), rel=1e-10)
        if whole.record:
            assert found.record and flatten(found.record.row) == pytest.approx(flatten(whole.record.row), rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_r11_fp32_within_its_precision(name):
    """R-11: the fp32 row."""
    _, expected = run_step(name, 10_000, dtype=torch.float32)
    _, gradient = run_step(name, 30, dtype=torch.float32)
    assert (gradient - expected).norm() / expected.norm() < 1e-5


def _two_ranks() -> dict[str, list[dict]]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    root = Path(__file__).resolve().parents[2]
    env = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    env["PYTHONPATH"] = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "tests.engine.two_ranks"]
    children = [
        subprocess.Popen(command, env=env | {"RANK": str(r), "LOCAL_RANK": str(r)}, stdout=subprocess.PIPE, cwd=root)
        for r in range(2)
    ]
    outputs = [child.communicate(timeout=BOUND)[0] for child in children]
    assert [child.returncode for child in children] == [0, 0]
    return json.loads(outputs[0].splitlines()[-1])


@pytest.fixture(scope="module")
def both_ranks() -> dict[str, list[dict]]:
    return _two_ranks()


@pytest.fixture
def on_two_ranks(both_ranks: dict[str, list[dict]]) -> list[dict]:
    """Steps of seven uneven groups, and of a single one, on two processes, compared with one."""
    return both_ranks["rows"]


@pytest.mark.dist
def test_r32_a_rank_without_memory_tells_the_others(both_ranks):
    """R-32: the second rank runs out in a forward or backward: both learn of it, and the same step can be done again."""
    assert len(both_ranks["memory"]) == 4
    for line in both_ranks["memory"]:
        assert line["met"] == ["memory", "memory"], line
        assert line["error"] < 1e-10, line


@pytest.mark.dist
def test_r23_two_processes_give_the_gradient_of_one(on_two_ranks):
    """R-23: uneven sizes, and a rank with nothing (n = 1); for each method, those with a live reference, a coupled toy loss."""
    assert {"dpo tdpo1", "dpo tdpo2", "dpo radpo1", "dpo radpo2", "dpo epsilon"} <= set(LIVE)
    assert {"distill forward_kl", "distill reverse_kl", "distill jsd"} <= set(LIVE)
    assert {(line["method"], line["n"]) for line in on_two_ranks} == {(name, n) for name in METHODS for n in (7, 1)}
    for line in on_two_ranks:
        assert line["error"] < 1e-10, line
        assert line["figures"] < 1e-10, line
        assert line["state"] < 1e-9, line
        assert line["equal_on_ranks"], line
    factors = {line["factor"] for line in on_two_ranks if line["method"] == "dpo epsilon" and line["n"] == 7}
    assert len(factors) == 1 and factors != {1.0}, "the running beta of epsilon has moved, alike under every cut"


@pytest.mark.dist
def test_s0_10_one_beta_on_two_processes(on_two_ranks):
    """S0-10, S0-23: state, β, filter and record are equal on both, every bit, and those of one process; n is the whole step's."""
    lines = [line for line in on_two_ranks if line["method"] in CONTROLLED and line["n"] == 7]
    assert len(lines) == 3 * len(CONTROLLED)
    for line in lines:
        assert line["equal_on_ranks"] and line["state"] < 1e-9, line


@pytest.mark.parametrize("name", EVERY)
def test_t03_terms_that_are_added_up_are_logged_apart(name):
    """T-03: the loss is the weighted sum of its terms, and each of several has its own figure."""
    method = build_method(name)[0]
    figures = run_step(name, 10_000)[0].figures
    batch = build_packed_batch([])
    outputs = (
        Outputs(logprobs=torch.zeros(0)) if "logprobs" in method.want["policy"] else Outputs(scores=torch.zeros(0))
    )
    outputs.functionals = {f.name: torch.zeros(0) for f in method.functionals}
    terms = {t.name: t.weight for t in method.compute_loss(outputs, batch.table, build_initial_state(method)).terms}
    apart = {n for n in figures if n.startswith("loss/")}
    assert apart == ({f"loss/{n}" for n in terms} if len(terms) > 1 else set())
    if len(terms) > 1:
        assert figures["loss"] == pytest.approx(sum(w * figures[f"loss/{n}"] for n, w in terms.items()), rel=1e-12)
        assert all(figures[n] != 0 for n in apart)


def test_r05_non_finite_rows_are_named(monkeypatch):
    """R-05, T-30: a row with a NaN is reported by its id; nothing is applied."""
    method, head, k, _ = build_method("sigmoid")
    policy = build_policy(head)
    groups = build_groups(3, k=k, reference=True)
    groups[1].completions[0].token_columns["ref_logprobs"][:] = float("nan")
    ctx = StepContext(
        {"policy": policy},
        method,
        build_parallel(Runtime(torch.device("cpu"))),
        list(trainable(policy).values()),
        seed=0,
    )
    for cap in (None, 1):
        plan = build_plan(groups, budget=10_000, cap=cap)
        found = compute_gradient(ctx, groups, plan, {}, step=0)
        assert "row:1" in found.bad
        assert found.figures == {}
        if cap == 1:
            assert found.bad == ["row:1"]


def test_a_signal_between_micro_batches_drops_the_step():
    method, head, k, _ = build_method("sft")
    policy = build_policy(head)
    groups = build_groups(3, k=k)
    ctx = StepContext(
        {"policy": policy},
        method,
        build_parallel(Runtime(torch.device("cpu"))),
        list(trainable(policy).values()),
        seed=0,
        should_stop=lambda: True,
    )
    with pytest.raises(Stopped):
        compute_gradient(ctx, groups, build_plan(groups, budget=20), {}, step=0)


@pytest.mark.parametrize("name", ["sft", "reward", "sigmoid"])
def test_s1_17_gradient_checkpointing_gives_the_same_gradient(name):
    """S1-17: activations recomputed in backward, packed: the same loss and gradient."""
    method, head, k, reference = build_method(name)
    found = []
    for checkpointing in (False, True):
        policy = build_policy(head)
        if checkpointing:
            policy.inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        policy.train(True)
        groups = build_groups(5, k=k, reference=reference)
        ctx = StepContext(
            {"policy": policy},
            method,
            build_parallel(Runtime(torch.device("cpu"))),
            list(trainable(policy).values()),
            seed=0,
        )
        result = compute_gradient(ctx, groups, build_plan(groups, budget=60), {}, step=0)
        grads = [p.grad.reshape(-1) for p in trainable(policy).values() if p.grad is not None]
        found.append((result.figures["loss"], torch.cat(grads)))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    assert (found[0][1] - found[1][1]).norm() / found[0][1].norm() < 1e-10

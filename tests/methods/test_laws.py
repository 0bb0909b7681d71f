"""Laws of the methods: exact sums under any split, nothing at all, evaluation independent of the batch size."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from burnish.config.registry import KINDS, load_object
from burnish.config.stages import CpoSettings, DistillSettings, DpoSettings, RewardSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.engine.context import StepContext
from burnish.engine.evaluation import run_evaluation
from burnish.engine.forward import call_models
from burnish.engine.method import arrange_groups, build_initial_state
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.runtime import Runtime
from burnish.methods.cpo import Cpo
from burnish.methods.distill import Distill
from burnish.methods.dpo import Dpo
from burnish.methods.reward import Reward
from burnish.models.policy import Policy
from burnish.models.reference import Reference
from tests.losses.drawn import REGISTERED, REGISTRY, Case, build_method
from tests.losses.tiny import build_model


def build_registered(name: str) -> Any:
    """The method of a kind and loss type, with the defaults of the kind."""
    kind, _, loss_type = name.partition(" ")
    if (kind, loss_type) in {(case.kind, case.name) for case in REGISTERED}:
        return build_method(Case(kind, loss_type))
    cls = load_object(KINDS[kind].settings)
    return load_object(KINDS[kind].runner)(cls(**({"loss_type": loss_type} if loss_type else {})))


METHODS: dict[str, Any] = {
    "reward, centred": Reward(RewardSettings(center_rewards_coefficient=0.02)),
    "distill, mixed": Distill(DistillSettings(alpha=0.6)),
    "dpo": Dpo(DpoSettings()),
    **{name: build_registered(name) for name in REGISTRY},
    "cdpo": Dpo(DpoSettings(label_smoothing=0.2)),
    "rpo": Dpo(DpoSettings(loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.5])),
    "ld": Dpo(DpoSettings(ld_alpha=0.3)),
    "cpo without nll": Cpo(CpoSettings(cpo_alpha=0.0)),
    "mix": Dpo(DpoSettings(loss_type=["sigmoid", "ipo", "hinge"], loss_weights=[1.0, 0.3, 0.1])),
}
COUPLED = {
    "dpo aot": "sorts the whole step",
    "dpo aot_unpaired": "sorts the whole step",
    "dpo bco_pair": "moves its shift by the whole step before it uses it",
    "kto kto": "its baseline is that of the whole step",
}  # that a cut changes nothing for them either is a law of the engine: engine/test_step.py
SUMS = [name for name in METHODS if name not in COUPLED]
WITHOUT_SIGN = {
    "dpo discopop": "at a margin of 0 it rises with the margin, as its paper says: losses/test_laws.py",
    **dict.fromkeys(
        ("distill forward_kl", "distill reverse_kl", "distill jsd"),
        "its gradient is one of logits, not of log-probs: losses/test_distill.py has the law",
    ),
}
SIGNED = [name for name in REGISTRY if name not in WITHOUT_SIGN]
WITHOUT_SWAP = {
    "sft": "has one answer",
    "dpo sft": "reads the chosen answer alone",
    "dpo epsilon": "a swapped pair has another beta; losses/test_laws.py swaps with beta at rest",
    **dict.fromkeys(
        ("distill forward_kl", "distill reverse_kl", "distill jsd"),
        "has one answer; teacher and student are exchanged in losses/test_distill.py",
    ),
}
SWAPPED = [name for name in REGISTRY if name not in WITHOUT_SWAP]
N = 10


@pytest.mark.parametrize(
    ("tested", "left_out"), [(SUMS, COUPLED), (list(METHODS), {}), (SIGNED, WITHOUT_SIGN), (SWAPPED, WITHOUT_SWAP)]
)
def test_every_registered_loss_is_in_each_law_or_left_out_with_a_reason(
    tested: list[str], left_out: dict[str, str]
) -> None:
    """Split, nothing scored, sign of the gradient, swap; a new entry is in all of them or fails."""
    assert set(REGISTRY) == (set(tested) & set(REGISTRY)) | set(left_out)
    assert not set(tested) & set(left_out) and all(left_out.values())
    assert {name for name, method in METHODS.items() if method.coupled} == set(COUPLED)


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
        columns = {"margin": float(rng.uniform(0, 1))} if k == 2 else {"label": float(i % 3 > 0)}
        groups.append(Group(f"row:{i}", prompt, tuple(completions), columns=columns))
    return groups


def draw_outputs(method: Any, batch: Any, seed: int) -> Outputs:
    """Random fp64 outputs, the same for the same rows: a leaf, and functionals that are functions of it."""
    rng = np.random.default_rng(seed)
    size = len(batch.target_ids) if "logprobs" in method.want["policy"] else len(batch.last_index)
    tensor = torch.from_numpy(rng.normal(-3, 1, size)).requires_grad_()
    further = {f.name: torch.from_numpy(rng.normal(-3, 1, size)) + 0.1 * tensor for f in method.functionals}
    return (
        Outputs(logprobs=tensor, functionals=further) if "logprobs" in method.want["policy"] else Outputs(scores=tensor)
    )


def cut(outputs: Outputs, batch: Any, groups: Sequence[Group], start: int, stop: int) -> Outputs:
    """The outputs of groups [start, stop)."""
    inside = (batch.table.completion_group >= start) & (batch.table.completion_group < stop)
    if outputs.scores is not None:
        return Outputs(scores=outputs.scores[inside])
    assert outputs.logprobs is not None
    tokens = inside[batch.table.token_completion]
    further = {name: values[tokens] for name, values in outputs.functionals.items()}
    return Outputs(logprobs=outputs.logprobs[tokens], functionals=further)


def attach(groups: Sequence[Group], number: float) -> list[Group]:
    """The groups with one reference log-prob for every token."""
    return [
        replace(
            g,
            completions=tuple(
                replace(c, token_columns={"ref_logprobs": np.full(len(c.ids), number)}) for c in g.completions
            ),
        )
        for g in groups
    ]


def find_head(method: Any) -> Literal["lm", "score"]:
    return "score" if "scores" in method.want["policy"] else "lm"


def k_of(method: Any) -> int:
    return 1 if method.name in ("sft", "kto", "distill") else 2


@pytest.mark.parametrize("name", SUMS)
@settings(max_examples=6, deadline=None)
@given(cuts=st.lists(st.integers(0, N), max_size=5), seed=st.integers(0, 20))
def test_any_split_gives_the_same_sums_counts_and_gradient(name: str, cuts: list[int], seed: int) -> None:
    method = METHODS[name]
    groups = build_groups(k_of(method), seed)
    batch = build_packed_batch(groups)
    outputs = draw_outputs(method, batch, seed)
    leaf = outputs.scores if outputs.logprobs is None else outputs.logprobs
    state = build_initial_state(method)
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
    policy = Policy(build_model(find_head(method), 0), head=find_head(method))
    batch = build_packed_batch([])
    ctx = StepContext(
        models={"policy": policy},
        method=method,
        parallel=build_parallel(Runtime(torch.device("cpu"))),
        parameters=[],
        seed=0,
    )
    ctx.reference = Reference(policy, "copy") if "logits" in method.reference else None
    result = method.compute_loss(call_models(ctx, batch), batch.table, build_initial_state(method))
    for term in result.terms:
        assert (term.sum.item(), term.count) == (0.0, 0.0)
        term.sum.backward(retain_graph=True)
    assert method.counts([]) == {t.name: 0.0 for t in result.terms}
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters())


@pytest.mark.parametrize("name", METHODS)
def test_groups_without_a_scored_token_run_backward(name: str) -> None:
    """The number of tokens is 0, that of pairs is not: nothing is divided by it, and no gradient is lost to a NaN."""
    method = METHODS[name]
    policy = Policy(build_model(find_head(method), 0), head=find_head(method))
    whole = attach(arrange_groups(method, build_groups(k_of(method), n=3)), -3.0)
    groups = [
        replace(g, completions=tuple(replace(c, mask=np.zeros_like(c.mask)) for c in g.completions)) for g in whole
    ]
    batch = build_packed_batch(groups)
    ctx = StepContext(
        models={"policy": policy},
        method=method,
        parallel=build_parallel(Runtime(torch.device("cpu"))),
        parameters=[],
        seed=0,
    )
    ctx.reference = Reference(policy, "copy") if "logits" in method.reference else None
    result = method.compute_loss(call_models(ctx, batch), batch.table, build_initial_state(method))
    assert {t.name: t.count for t in result.terms} == method.counts(groups)
    assert all(t.count == (0 if t.unit == "token" else 3) for t in result.terms)
    total = torch.stack([t.weight * t.sum for t in result.terms]).sum()
    assert bool(torch.isfinite(total))
    total.backward()
    grads = [p.grad for p in policy.parameters() if p.grad is not None]
    assert all(bool(torch.isfinite(g).all()) for g in grads)
    assert any(bool(g.any()) for g in grads) == (find_head(method) == "score"), (
        "a score is read at the end, whatever is masked"
    )


def build_level(method: Any) -> tuple[list[Group], Outputs]:
    """Answers of three tokens that are all equally likely under the policy, as they are under the reference."""
    groups = []
    for i in range(6):
        answers = tuple(
            Completion(np.full(3, 5 + i + slot, np.int32), np.ones(3, bool)) for slot in range(k_of(method))
        )
        columns = {"label": float(i % 2), "margin": 0.0}
        groups.append(Group(f"row:{i}", np.asarray([3 + i], np.int32), answers, columns=columns))
    groups = attach(arrange_groups(method, groups), -2.0)
    batch = build_packed_batch(groups)
    if find_head(method) == "score":
        return groups, Outputs(scores=torch.full(batch.last_index.shape, 0.3, dtype=torch.float64, requires_grad=True))
    flat = torch.full(batch.target_ids.shape, -2.0, dtype=torch.float64)
    further = {f.name: torch.ones_like(flat) for f in method.functionals}
    return groups, Outputs(logprobs=flat.requires_grad_(), functionals=further)


@pytest.mark.parametrize("name", SIGNED)
def test_the_first_gradient_lifts_what_is_wanted_and_lowers_what_is_not(name: str) -> None:
    """From the start, where the policy is the reference: chosen and desirable up, rejected and undesirable down."""
    method = METHODS[name]
    groups, outputs = build_level(method)
    table = build_packed_batch(groups).table
    leaf = outputs.scores if outputs.logprobs is None else outputs.logprobs
    assert leaf is not None
    result = method.compute_loss(outputs, table, build_initial_state(method))
    torch.stack([t.weight * t.sum for t in result.terms]).sum().backward()
    wanted = 1.0 - 2.0 * table.completion_slot.double()
    if method.name == "kto":
        wanted = torch.where(
            table.completion_slot == 0, 2.0 * table.group_columns["label"][table.completion_group] - 1.0, 0.0
        )
    wanted = wanted if outputs.logprobs is None else wanted[table.token_completion]
    assert leaf.grad is not None
    assert bool((leaf.grad[wanted == 0] == 0).all()), "a partner has no gradient"
    assert bool((leaf.grad * wanted <= 0).all()) and float((leaf.grad * wanted).sum()) < -1e-3


@pytest.mark.parametrize("name", SWAPPED)
def test_swapped_answers_or_labels_mirror_the_method(name: str) -> None:
    """Chosen for rejected: every margin that is logged changes its sign. Good for bad: the two losses of a row add up to 1."""
    method = METHODS[name]
    groups = attach(arrange_groups(method, build_groups(k_of(method), seed=3)), -3.0)
    if method.name == "kto":
        other = [replace(g, columns={"label": 1 - g.columns["label"]}) for g in groups]
    else:
        other = [replace(g, completions=g.completions[::-1]) for g in groups]
    one, two = (build_packed_batch(g) for g in (groups, other))
    there = draw_outputs(method, one, 5)
    order = torch.arange(len(one.last_index))
    if method.name != "kto":
        order = order.view(-1, 2).flip(1).reshape(-1)
    tokens = torch.cat([torch.nonzero(one.table.token_completion == c)[:, 0] for c in order.tolist()])
    rows = order if there.logprobs is None else tokens
    back = Outputs.from_named({n: t.detach()[rows] for n, t in there.named().items()})
    first, second = (
        method.compute_loss(outputs, batch.table, build_initial_state(method))
        for outputs, batch in ((there, one), (back, two))
    )
    if method.name == "kto":
        assert first.terms[0].sum.item() + second.terms[0].sum.item() == pytest.approx(N, rel=1e-12)
        return
    margins = [{m.name: m.sum.item() for m in r.metrics if "margin" in m.name} for r in (first, second)]
    assert margins[0] and all(value == -margins[1][n] != 0 for n, value in margins[0].items())


TERMS = {
    **{f"cpo {n}": {f"cpo/{n}": 1.0, "cpo/nll": 1.0} for n in ("sigmoid", "hinge", "ipo")},
    "orpo orpo": {"orpo/orpo": 1.0, "orpo/nll": 1.0},
}


@pytest.mark.parametrize("name", REGISTRY)
def test_t03_no_loss_brings_a_term_that_its_name_does_not_say(name: str) -> None:
    """TRL's SimPO keeps CPO's NLL; here the NLL is in CPO and ORPO, whose losses it belongs to, and nowhere else."""
    method = METHODS[name]
    groups, outputs = build_level(method)
    result = method.compute_loss(outputs, build_packed_batch(groups).table, build_initial_state(method))
    assert {t.name: t.weight for t in result.terms} == TERMS.get(name, {method.name: 1.0})


@pytest.mark.parametrize("name", METHODS)
def test_methods_are_declared_as_the_engine_expects(name: str) -> None:
    method = METHODS[name]
    assert find_head(method) in ("lm", "score") and isinstance(method.want["policy"], frozenset)
    state = build_initial_state(method)
    assert json.loads(json.dumps(state)) == state
    assert bool(state) == (method.state is not None)


@pytest.mark.parametrize("name", ["reward", "dpo"])
def test_a_group_that_is_no_pair_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="two completions, not 1"):
        METHODS[name].counts(build_groups(1))


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "dpo ipo", "dpo aot", "dpo bco_pair", "orpo orpo", "rpo"])
def test_t33_evaluation_is_the_same_for_every_batch_size(name: str) -> None:
    """TRL averages batch means: 6.544 / 6.661 / 6.671 for batch 1 / 2 / 4 on the same rows."""
    method = METHODS[name]
    policy: Any = Policy(build_model(find_head(method), 0), head=find_head(method))
    ctx = StepContext(
        models={"policy": policy},
        method=method,
        parallel=build_parallel(Runtime(torch.device("cpu"))),
        parameters=[],
        seed=0,
    )
    groups = build_groups(k_of(method))
    found = [
        run_evaluation(ctx, groups, build_initial_state(method), budget=budget, cap=cap)
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
        groups.append(
            Group(f"row:{i}", np.array([5, 6], np.int32), tuple(completions), columns={"margin": 0.0, "label": 1.0})
        )
    return groups, np.concatenate(logprobs)


def build_outputs(method: Any, logprobs: torch.Tensor) -> Outputs:
    """These log-probs, with functionals that are equal where the log-probs are."""
    further = -0.1 * logprobs
    return Outputs(logprobs=logprobs, functionals={f.name: further for f in method.functionals})


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if find_head(m) == "lm" and n != "sft"])
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
            result = method.compute_loss(build_outputs(method, leaf), table, build_initial_state(method))
            total = torch.stack([t.weight * t.sum / t.count for t in result.terms]).sum()
            total.backward()
            assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all())
            found.setdefault(dtype, []).extend([total.item(), float(leaf.grad.norm())])
    assert found[torch.float32] == pytest.approx(found[torch.float64], rel=1e-5)
    last = build_outputs(method, torch.from_numpy(policy[-18:]))
    equal = method.compute_loss(last, build_packed_batch(groups[4:]).table, build_initial_state(method))
    margins = [m for m in equal.metrics if m.name == "rewards/margins"]
    assert [m.sum.item() for m in margins] == [0.0] * (name != "dpo sft" and method.name not in ("kto", "distill"))


def test_evaluation_reads_a_running_shift_and_does_not_move_it() -> None:
    """BCO with δ = 0.7 from training: the held-out rows neither enter it nor see each other."""
    method = METHODS["dpo bco_pair"]
    policy: Any = Policy(build_model("lm", 0), head="lm")
    ctx = StepContext(
        models={"policy": policy},
        method=method,
        parallel=build_parallel(Runtime(torch.device("cpu"))),
        parameters=[],
        seed=0,
    )
    groups = build_groups(2)
    state = {"losses": {"bco_pair": {"rewards": 10, "mean": 0.7}}}
    found = run_evaluation(ctx, groups, state, budget=10**6)
    with torch.no_grad():
        batch = build_packed_batch(groups)
        pairs = method.compute_pairs(policy.eval()(batch, method.want["policy"]), batch.table)
    a, z = (0.01 * x.double().numpy() for x in (pairs.chosen_ratio, pairs.rejected_ratio))
    want = np.logaddexp(0, 0.7 - a) + np.logaddexp(0, z - 0.7)
    assert found["eval_loss"] == pytest.approx(want.mean(), rel=1e-6)
    assert state == {"losses": {"bco_pair": {"rewards": 10, "mean": 0.7}}}

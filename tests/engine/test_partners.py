"""Rows that read of one another: any cut gives one gradient, and what was only read is not forwarded again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from burnish.config.stages import KtoSettings
from burnish.core.batch import Outputs, PackedBatch, build_packed_batch
from burnish.core.group import Group
from burnish.engine.context import StepContext
from burnish.engine.evaluation import run_evaluation
from burnish.engine.method import arrange_groups
from burnish.engine.parallel.choose import build_parallel
from burnish.engine.plan import build_plan
from burnish.engine.runtime import Runtime
from burnish.engine.source import OfflineSource
from burnish.engine.step import compute_gradient
from burnish.methods.kto import Kto
from burnish.methods.partners import NextPrompts
from tests.engine.tiny import build_groups, build_policy, trainable

CUTS = [(10_000, 1), (10_000, 3), (60, None), (30, None), (12, None)]


def build_rows(n: int, seed: int = 0) -> list[Group]:
    """Arranged rows with reference log-probs near the policy's, so that the baseline is above 0."""
    groups = build_groups(n, k=1, seed=seed)
    labelled = [replace(g, columns={"label": float(i % 3 > 0)}) for i, g in enumerate(groups)]
    arranged = arrange_groups(Kto(KtoSettings()), labelled)
    rng = np.random.default_rng(seed)
    return [
        replace(
            g,
            completions=tuple(
                replace(c, token_columns={"ref_logprobs": rng.normal(-5, 1, len(c.ids))}) for c in g.completions
            ),
        )
        for g in arranged
    ]


class Counting:
    """A policy that notes what it is called with."""

    def __init__(self, policy: Any) -> None:
        self.policy = policy
        self.seen: list[tuple[int, int]] = []

    def __call__(self, batch: PackedBatch, want: frozenset[str], **more: Any) -> Outputs:
        self.seen.append((batch.layout.total, len(batch.last_index)))
        return self.policy(batch, want, **more)


def run_step(groups: Sequence[Group], budget: int, cap: int | None = None, *, policy: Any = None, **config: Any):
    policy = policy or build_policy(**config)
    policy.train(True)
    method = Kto(KtoSettings(beta=0.3))
    parameters = trainable(policy)
    counting = Counting(policy)
    ctx = StepContext(
        {"policy": counting}, method, build_parallel(Runtime(torch.device("cpu"))), list(parameters.values()), seed=0
    )
    plan = build_plan(groups, budget=budget, cap=cap, coupled=method.coupled)
    found = compute_gradient(ctx, groups, plan, {}, step=0)
    gradient = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in parameters.values()])
    return found, gradient, counting.seen, len(plan.of(0))


def test_r11_kto_has_one_gradient_under_any_cut() -> None:
    groups = build_rows(9)
    whole, expected, _, _ = run_step(groups, 10_000)
    assert whole.bad == [] and expected.norm() > 1e-3 and whole.figures["kl"] > 0.1
    for budget, cap in CUTS:
        found, gradient, _, parts = run_step(groups, budget, cap)
        assert parts > 1
        assert (gradient - expected).norm() / expected.norm() < 1e-10, (budget, cap)
        assert found.figures == pytest.approx(whole.figures, rel=1e-10)


def test_kto_does_not_depend_on_the_order_within_a_step() -> None:
    """Partners are fixed by the epoch; how a step's rows are sorted changes nothing."""
    groups = build_rows(8)
    whole, expected, _, _ = run_step(groups, 10_000)
    found, gradient, _, _ = run_step(groups[::-1], 40)
    assert (gradient - expected).norm() / expected.norm() < 1e-10
    assert found.figures == pytest.approx(whole.figures, rel=1e-10)


def test_partners_are_forwarded_once() -> None:
    groups = build_rows(8)
    _, _, seen, parts = run_step(groups, 60)
    first, second = seen[:parts], seen[parts:]
    assert len(second) == parts > 1
    assert sum(rows for _, rows in first) == 16 and sum(rows for _, rows in second) == 8
    prompts = sum(len(g.prompt) for g in groups)
    own = sum(len(g.completions[0].ids) for g in groups)
    assert sum(tokens for tokens, _ in second) == prompts + own
    _, _, seen, parts = run_step(groups, 10_000)
    assert (len(seen), parts) == (1, 1), "a single micro-batch takes a single pass"


def test_with_dropout_both_passes_run_whole() -> None:
    """A completion left out would move the others' dropout away from the one that gave the coefficients."""
    policy = build_policy()
    for module in policy.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.1
    _, gradient, seen, parts = run_step(build_rows(8), 60, policy=policy)
    assert seen[:parts] == seen[parts:] and bool(torch.isfinite(gradient).all())


def test_t11_a_non_finite_row_is_named_and_stops_the_step() -> None:
    """The partner's log-probs of one row: the baseline of all rows is NaN, and that row alone is named."""
    groups = build_rows(6)
    groups[4].completions[1].token_columns["ref_logprobs"][:] = float("nan")
    for budget in (10_000, 40):
        found, _, _, _ = run_step(groups, budget)
        assert (found.bad, found.figures, found.terms) == ([groups[4].id], {}, ["kto"])


def take_apart(pairs: int) -> list[Group]:
    """Pairs as rows: good and bad side by side, as the data come."""
    rows = []
    for i, group in enumerate(build_groups(pairs, k=2, seed=4)):
        for side, completion in enumerate(group.completions):
            columns = {"label": float(side == 0)}
            rows.append(replace(group, id=f"{i}/{side}", completions=(completion,), columns=columns))
    return rows


@pytest.mark.parametrize("shuffle", [True, False])
def test_t12_both_labels_are_in_every_step(shuffle: bool) -> None:
    """100 pairs taken apart, 16 rows a step, 8 epochs: TRL's steps have one label each, these have both.

    Unshuffled, half of each whole step is good. Shuffled, the share in a step scatters around one half as a draw does, and
    stretches of one label stay as short as chance makes them.
    """
    rows = take_apart(100)
    source = OfflineSource(
        rows, batch_size=16, epochs=8, max_steps=-1, seed=5, shuffle=shuffle, arrange=NextPrompts().arrange
    )
    shares, longest = [], 0
    for epoch in range(8):
        labels: list[float] = []
        for n in range(source.steps_per_epoch):
            step = [group.columns["label"] for group in source.step(epoch * source.steps_per_epoch + n).groups]
            shares += [float(np.mean(step))] * (len(step) == 16)
            labels += step
        assert sum(labels) == 100 and len(labels) == 200
        edges = np.flatnonzero(np.diff(labels))
        longest = max(longest, int(np.diff([-1, *edges, 199]).max()))
    assert min(shares) > 0 and max(shares) < 1
    if not shuffle:
        assert set(shares) == {0.5} and longest == 1
        return
    assert np.std(shares) == pytest.approx(0.5 / 4 * (1 - 15 / 199) ** 0.5, rel=0.2)
    assert 4 < longest < 20


def test_t12_an_odd_last_row_has_a_partner_of_its_own() -> None:
    """Nine rows in steps of four: the last step is one row, whose partner answers another prompt; TRL's is the row itself."""
    rows = [*take_apart(4), replace(build_groups(1, k=1, seed=77)[0], id="odd")]
    source = OfflineSource(
        rows, batch_size=4, epochs=1, max_steps=-1, seed=1, shuffle=True, arrange=NextPrompts().arrange
    )
    (last,) = source.step(2).groups
    own, lent = last.completions
    owners = [row for row in rows if np.array_equal(row.completions[0].ids[: len(lent.ids)], lent.ids)]
    assert last.id not in {row.id for row in owners} and not np.array_equal(own.ids, lent.ids)
    assert all(not np.array_equal(row.prompt, last.prompt) for row in owners)
    groups = [
        replace(
            last,
            completions=tuple(
                replace(c, token_columns={"ref_logprobs": np.full(len(c.ids), -5.0)}) for c in last.completions
            ),
        )
    ]
    found, _, _, _ = run_step(groups, 10_000)
    batch = build_packed_batch(groups)
    with torch.no_grad():
        logprobs = build_policy().eval()(batch, frozenset({"logprobs"})).logprobs
    assert logprobs is not None
    ratio = batch.table.sum_tokens(logprobs + 5.0)
    assert found.figures["kl"] == pytest.approx(max(float(ratio[1]), 0.0), rel=1e-9) and ratio[0] != ratio[1]


def test_t33_evaluation_is_the_same_for_every_batch_size() -> None:
    """The baseline is that of chunks in data order, whatever the micro-batches; the last one may be short."""
    groups, method = build_rows(11), Kto(KtoSettings(beta=0.3))
    policy = build_policy()
    ctx = StepContext({"policy": policy}, method, build_parallel(Runtime(torch.device("cpu"))), [], seed=0)
    found = [run_evaluation(ctx, groups, {}, budget=b, cap=c, chunk=4) for b, c in ((9, 1), (60, 2), (10**6, None))]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-12)
    parts = [run_evaluation(ctx, groups[i : i + 4], {}, budget=10**6) for i in (0, 4, 8)]
    assert found[0]["eval_loss"] == pytest.approx(np.average([p["eval_loss"] for p in parts], weights=[4, 4, 3]))
    assert found[0]["eval_loss"] != run_evaluation(ctx, groups, {}, budget=10**6, chunk=11)["eval_loss"]

"""Batches of short groups against attention written out with one mask over the whole row."""

from __future__ import annotations

import pytest
import torch

from burnish.core import group_attention
from burnish.core.batch import CompletionSpan, GroupSpan, Layout
from burnish.core.group_attention import attend_grouped, attend_grouped_backward, build_grouped, find_grouped
from burnish.core.plan import AttentionPlan, build_attention_plan
from tests.core.dense import attend_whole, draw_layout

HEADS, KV_HEADS, SIZE = 6, 2, 4


def _draw_plan(seed: int, completions: tuple[int, ...]) -> AttentionPlan:
    return build_attention_plan(draw_layout(seed, completions, (1, 20), (1, 12)))


@pytest.mark.parametrize("completions", [(1,) * 7, (2,) * 5, (3, 1, 2, 1), (1,)])
@pytest.mark.parametrize("seed", range(3))
def test_values_and_gradient_equal_the_definition(completions: tuple[int, ...], seed: int) -> None:
    plan = _draw_plan(seed, completions)
    row = build_grouped(plan, HEADS, KV_HEADS)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(plan.total * (HEADS + 2 * KV_HEADS), SIZE, generator=generator, dtype=torch.float64)
    rows.requires_grad_()
    grad = torch.randn(plan.total, HEADS, SIZE, generator=generator, dtype=torch.float64)
    by_token = rows.view(plan.total, HEADS + 2 * KV_HEADS, SIZE)
    expected = attend_whole(by_token, plan.layout, HEADS, KV_HEADS)
    (expected_gradient,) = torch.autograd.grad(expected, rows, grad)
    found, kept = attend_grouped(rows.detach(), row, HEADS, KV_HEADS, keep=True)
    assert torch.allclose(found, expected, atol=1e-12)
    gradient = attend_grouped_backward(kept, grad, row, HEADS, KV_HEADS)
    assert torch.allclose(gradient, expected_gradient, atol=1e-12)
    again = attend_grouped_backward(kept[:1], grad, row, HEADS, KV_HEADS)
    assert torch.equal(again, gradient), "kept or computed again, the bits are the same"


def test_lengths_that_differ_much_come_into_batches_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = _draw_plan(0, (1,) * 40)
    row = build_grouped(plan, HEADS, KV_HEADS)
    assert sum(b.count for b in row.batches) == 40
    lengths = [b.length for b in row.batches]
    assert lengths == sorted(lengths, reverse=True) and len(set(lengths)) > 2
    monkeypatch.setattr(group_attention, "_AREA", 2000)
    small = build_grouped(plan, HEADS, KV_HEADS)
    assert len(small.batches) > len(row.batches)
    assert all(b.count == 1 or b.count * HEADS * b.length**2 <= 2000 for b in small.batches)


def test_long_groups_and_many_completions_are_left_to_the_segments() -> None:
    assert find_grouped(_draw_plan(0, (2, 2, 2)), HEADS, KV_HEADS) is not None
    long = GroupSpan(0, 1, (CompletionSpan(1, group_attention.LONGEST),))
    others = [GroupSpan(long.end + 10 * i, 5, (CompletionSpan(long.end + 10 * i + 5, 5),)) for i in range(5)]
    assert find_grouped(build_attention_plan(Layout(others[-1].end, (long, *others))), HEADS, KV_HEADS) is None
    wide = GroupSpan(0, 4, tuple(CompletionSpan(4 + 12 * i, 12) for i in range(20)))
    assert find_grouped(build_attention_plan(Layout(wide.end, (wide,))), HEADS, KV_HEADS) is None

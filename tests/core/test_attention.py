"""Packed attention segment by segment and by kernel against a dense mask; what it refuses; the flex backend's mask."""

from __future__ import annotations

import contextlib
import itertools
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree as pytree
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from burnish.core import attention
from burnish.core.attention import PackingRefused, attach_plan, packed_attention
from burnish.core.batch import Layout, PackedBatch, build_packed_batch
from burnish.core.flex import build_mask_mod
from burnish.core.group import Completion, Group
from burnish.core.kernels import calls
from burnish.core.segments import AttentionPlan, build_attention_plan

SIZES = [(150, [80, 3]), (2, [4]), (9, [1, 2, 7]), (1, [1]), (30, [5, 40])]


def _batch(sizes=SIZES) -> PackedBatch:
    def ids(n: int) -> np.ndarray:
        return np.zeros(n, np.int32)

    return build_packed_batch(
        [
            Group(f"g{i}", ids(p), tuple(Completion(ids(n), np.ones(n, bool)) for n in ls))
            for i, (p, ls) in enumerate(sizes)
        ]
    )


def _dense_mask(layout: Layout, window: int | None = None) -> Tensor:
    """(T, T) bool, written straight from the definition."""
    mask = torch.zeros(layout.total, layout.total, dtype=torch.bool)
    for g in layout.groups:
        for start, length in [(g.start, 0), *((c.start, c.length) for c in g.completions)]:
            row = [*range(g.start, g.start + g.prompt), *range(start, start + length)]
            for i, q in enumerate(row):
                for j, k in enumerate(row[: i + 1]):
                    mask[q, k] = window is None or i - j < window
    return mask


def _draw(total: int, dtype=torch.float64, heads=(4, 2), size=8, value_size=None):
    generator = torch.Generator().manual_seed(0)
    h, n = heads
    shapes = [(1, total, h, size), (1, total, n, size), (1, total, n, value_size or size)]
    drawn = [torch.randn(s, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(dtype) for s in shapes]
    return [x.transpose(1, 2).requires_grad_() for x in drawn]


def _dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float, softcap=None, sinks=None) -> Tensor:
    rep = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(rep, 1), v.repeat_interleave(rep, 1)
    scores = q @ k.transpose(2, 3) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(1, -1, 1, 1).expand(1, -1, scores.shape[2], 1)), -1)
    weights = torch.softmax(scores, -1)[..., : k.shape[2]]
    return (weights @ v).transpose(1, 2)


def _with_gradients(out: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(torch.bfloat16).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, weights)]


def _gaps(found: list[Tensor], expected: list[Tensor]) -> list[float]:
    return [float((a.double() - b.double()).norm() / b.double().norm()) for a, b in zip(found, expected, strict=True)]


def _run(batch: PackedBatch, inputs: list[Tensor], **kwargs) -> list[Tensor]:
    plan = build_attention_plan(batch.layout)
    out, weights = packed_attention(nn.Identity(), *inputs, None, burnish_plan=plan, **kwargs)
    assert weights is None and plan.calls == 1
    return _with_gradients(out, [*inputs, *([kwargs["s_aux"]] if "s_aux" in kwargs else [])])


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 60, 140, 1000])
def test_r22_float64_equals_a_dense_mask_to_1e_12(heads: tuple[int, int], window: int | None) -> None:
    batch = _batch()
    inputs = _draw(batch.layout.total, heads=heads)
    expected = _with_gradients(_dense(*inputs, _dense_mask(batch.layout, window), 0.3), inputs)
    assert max(_gaps(_run(batch, inputs, scaling=0.3, sliding_window=window), expected)) <= 1e-12


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("sinks", [False, True])
def test_softcap_and_sinks_equal_a_dense_softmax(softcap: float | None, window: int | None, sinks: bool) -> None:
    batch = _batch()
    inputs = _draw(batch.layout.total)
    aux = torch.randn(4, dtype=torch.float64, requires_grad=True) if sinks else None
    kwargs = {"softcap": softcap, "sliding_window": window} | ({"s_aux": aux} if sinks else {})
    dense = _dense(*inputs, _dense_mask(batch.layout, window), 8**-0.5, softcap, aux)
    expected = _with_gradients(dense, [*inputs, *([aux] if sinks else [])])
    assert max(_gaps(_run(batch, inputs, **kwargs), expected)) <= 1e-12


def test_values_of_another_size() -> None:
    """Latent attention has values smaller than queries."""
    batch = _batch()
    inputs = _draw(batch.layout.total, size=12, value_size=8)
    expected = _with_gradients(_dense(*inputs, _dense_mask(batch.layout), 12**-0.5), inputs)
    assert max(_gaps(_run(batch, inputs), expected)) <= 1e-12


@pytest.mark.parametrize("kernels", [True, False])
def test_bf16_is_as_near_to_float64_as_its_rounding(kernels: bool) -> None:
    batch = _batch()
    exact = _run(batch, _draw(batch.layout.total))
    with contextlib.nullcontext() if kernels else calls.without_kernels():
        found = _run(batch, _draw(batch.layout.total, torch.bfloat16))
    assert all(x.dtype == torch.bfloat16 for x in found)
    assert max(_gaps(found, exact)) <= 3e-3  # half a unit in the last place is 2e-3 of a number


def _run_by_narrow(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Segment by segment, each cut out of the row by itself."""
    parts = []
    for s in plan.segments:
        queries = q.narrow(2, s.start, s.own)
        keys, values = (
            torch.cat((x.narrow(2, s.prompt, s.before), x.narrow(2, s.start, s.own)), 2)
            if s.before
            else x.narrow(2, s.start, s.own)
            for x in (k, v)
        )
        mask = plan.visible(s.own, s.own + s.before, None, q.device) if s.before else None
        given = {"attn_mask": mask, "is_causal": mask is None, "enable_gqa": True}
        parts.append(nn.functional.scaled_dot_product_attention(queries, keys, values, **given))
    return torch.cat(parts, 2).transpose(1, 2)


def test_g04_one_gather_gives_what_segments_cut_out_one_by_one_give() -> None:
    batch = _batch([(9, [4, 7]), (20, [3]), (5, [6, 2])])
    plan, inputs = build_attention_plan(batch.layout), _draw(batch.layout.total)
    found = _with_gradients(attention._run_sdpa(plan, 8**-0.5, None, *inputs), inputs)
    expected = _with_gradients(_run_by_narrow(plan, *inputs), inputs)
    assert max(_gaps(found, expected)) <= 1e-15


class _Written(TorchDispatchMode):
    """Counts the operations, and the numbers that they write."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers, self.calls = 0, Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls[func.overloadpacket.__name__] += 1
        if not func.is_view:
            self.numbers += sum(t.numel() for t in pytree.tree_leaves(out) if isinstance(t, Tensor))
        return out


def _count(groups: int, run: Callable[..., Tensor]) -> tuple[_Written, int]:
    """One layer, forward and backward, over a row of so many pairs."""
    batch = _batch([(20, [10, 6])] * groups)
    plan, inputs = build_attention_plan(batch.layout), _draw(batch.layout.total, torch.float32)
    run(plan, 0.3, None, *inputs).sum().backward()  # builds what all layers share
    with _Written() as written:
        run(plan, 0.3, None, *inputs).sum().backward()
    return written, batch.layout.total


def test_g04_what_backward_writes_is_linear_in_tokens() -> None:
    few, short = _count(4, attention._run_sdpa)
    many, long = _count(64, attention._run_sdpa)
    assert many.numbers / long == pytest.approx(few.numbers / short, rel=0.02)


def test_a_window_makes_no_mask_of_a_whole_segment() -> None:
    plan = build_attention_plan(_batch([(3000, [500, 40])]).layout)
    pieces = plan.pieces(64, torch.device("cpu"))
    assert max(pieces.queries) <= 256 and max(pieces.keys) <= 256 + 63
    assert sum(pieces.queries) == plan.total


def test_autocast_decides_the_type() -> None:
    batch = _batch([(3, [2])])
    plan = build_attention_plan(batch.layout)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(nn.Identity(), *_draw(5, torch.float32), None, burnish_plan=plan)
    assert out.dtype == torch.bfloat16


def test_dropout_keeps_the_mean_and_is_reproducible() -> None:
    batch = _batch([(4, [3, 2])])
    plan = build_attention_plan(batch.layout)
    inputs = [x.detach() for x in _draw(batch.layout.total)]
    plain, _ = packed_attention(nn.Identity(), *inputs, None, burnish_plan=plan)

    def run(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return packed_attention(nn.Identity(), *inputs, None, burnish_plan=plan, dropout=0.3)[0]

    with torch.random.fork_rng():
        assert torch.equal(run(0), run(0)) and not torch.equal(run(0), run(1))
        mean = torch.stack([run(seed) for seed in range(600)]).mean(0)
    assert (mean - plain).abs().max() < 0.2


@pytest.mark.parametrize("kwargs", [{"position_bias": torch.zeros(1)}, {"cache": object()}, {"bogus": 3}])
def test_an_unknown_argument_is_refused(kwargs: dict) -> None:
    batch = _batch([(3, [2])])
    with pytest.raises(PackingRefused, match=next(iter(kwargs))):
        _run(batch, _draw(5), **kwargs)


def test_harmless_arguments_are_taken() -> None:
    batch = _batch([(3, [2])])
    _run(
        batch, _draw(5), use_cache=False, position_ids=batch.position_ids[None], output_router_logits=False, bogus=None
    )


def test_a_mask_or_a_row_of_another_length_is_refused() -> None:
    plan = build_attention_plan(_batch([(3, [2])]).layout)
    with pytest.raises(PackingRefused, match="mask"):
        packed_attention(nn.Identity(), *_draw(5), torch.zeros(1, 1, 5, 5), burnish_plan=plan)
    with pytest.raises(PackingRefused, match="5 tokens"):
        packed_attention(nn.Identity(), *_draw(6), None, burnish_plan=plan)
    with pytest.raises(PackingRefused, match="layout"):
        packed_attention(nn.Identity(), *_draw(5), None)


def test_the_plan_is_found_by_the_position_ids() -> None:
    """For models that swallow forward arguments they do not know."""
    batch = _batch([(3, [2])])
    plan = build_attention_plan(batch.layout)
    positions = batch.position_ids[None].clone()
    attach_plan(positions, plan)
    for given in (positions, positions[:, :]):
        packed_attention(nn.Identity(), *_draw(5), None, position_ids=given)
    assert plan.calls == 2


@pytest.mark.parametrize("window", [None, 4])
def test_flex_mask_equals_the_definition(window: int | None) -> None:
    layout = _batch([(6, [3, 3]), (2, [3]), (1, [1, 1, 5])]).layout
    mask_mod = build_mask_mod(layout, window)
    zero = torch.zeros((), dtype=torch.int64)
    q, k = (torch.tensor(x) for x in zip(*itertools.product(range(layout.total), repeat=2), strict=True))
    found = mask_mod(zero, zero, q, k).view(layout.total, layout.total)
    assert torch.equal(found, _dense_mask(layout, window))


def test_flex_attention_forward_with_that_mask() -> None:
    """Uncompiled flex attention runs on the CPU without gradient: scores, softcap and sinks as the backend passes them."""
    from burnish.core import flex

    batch = _batch([(6, [3, 3]), (2, [3])])
    plan = build_attention_plan(batch.layout)
    inputs = [x.detach().float() for x in _draw(batch.layout.total, size=16)]
    mask = _dense_mask(batch.layout, 4)
    from torch.nn.attention.flex_attention import flex_attention

    original = flex._compiled
    flex._compiled = lambda: flex_attention  # type: ignore[assignment]
    try:
        with torch.no_grad():
            found = flex.run_flex(plan, 0.25, 4, 2.0, None, *inputs)
    finally:
        flex._compiled = original
    assert (found - _dense(*inputs, mask, 0.25, 2.0)).abs().max() < 1e-5

"""Flex attention's block mask, made from the spans, against the mask function evaluated everywhere."""

from __future__ import annotations

import pytest
import torch

from burnish.core import flex
from burnish.core.batch import Layout
from burnish.core.flex import build_block_mask, build_mask_mod, find_blocks
from burnish.core.segments import build_attention_plan
from tests.core.test_attention import _batch

SIZES = [
    [(150, [80, 3]), (2, [4]), (9, [1, 2, 7]), (1, [1]), (30, [5, 40])],
    [(64, [64, 64]), (32, [16])],
    [(5, [200])],
    [(300, [7, 260, 33])],
]


def _dense(layout: Layout) -> torch.Tensor:
    rows = torch.arange(layout.total)
    zero = torch.zeros((), dtype=torch.int64)
    return build_mask_mod(layout, None)(zero, zero, rows[:, None], rows[None, :])


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("size", [16, 32, 128])
def test_blocks_are_those_of_the_mask_function(sizes: list, size: int) -> None:
    """A block is visible if any of its pairs is, and full if all are (blocks over the row's end never are)."""
    layout = _batch(sizes).layout
    dense, count = _dense(layout), -(-layout.total // size)
    padded = torch.zeros(count * size, count * size, dtype=torch.bool)
    padded[: layout.total, : layout.total] = dense
    tiles = padded.view(count, size, count, size).transpose(1, 2)
    visible, full = find_blocks(layout, size)
    assert (tiles.any(-1).any(-1) == torch.from_numpy(visible)).all()
    assert (tiles.all(-1).all(-1) == torch.from_numpy(full)).all()


@pytest.mark.parametrize("window", [None, 5])
def test_flex_attention_with_that_mask_equals_a_dense_softmax(window: int | None) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    layout = _batch(SIZES[3]).layout
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, layout.total, 8, dtype=torch.float64) for _ in range(3))
    mask = build_block_mask(layout, window, "cpu")
    found = flex_attention(q, k, v, block_mask=mask)
    rows, zero = torch.arange(layout.total), torch.zeros((), dtype=torch.int64)
    seen = build_mask_mod(layout, window)(zero, zero, rows[:, None], rows[None, :])
    scores = (q @ k.transpose(-1, -2) / 8**0.5).masked_fill(~seen, float("-inf"))
    expected = torch.softmax(scores, -1) @ v
    assert torch.allclose(found, expected, atol=1e-12)  # type: ignore[arg-type]
    assert mask.kv_num_blocks.sum() + (mask.full_kv_num_blocks.sum() if window is None else 0) > 0


def test_rows_of_many_lengths_are_compiled_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo's graphs are counted; a backend that only runs them stands for the compiler. Padding changes no number."""
    from torch._dynamo.testing import CompileCounter
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(flex_attention, dynamic=True, fullgraph=True, backend=counter)
    monkeypatch.setattr(flex, "_compiled", lambda: compiled)
    for seed, groups in enumerate([1, 2, 3, 5, 8, 13, 21, 34]):
        layout = _batch([(40 + seed, [30, 11])] * groups).layout
        torch.manual_seed(seed)
        q, k, v = (torch.randn(1, 2, layout.total, 8) for _ in range(3))
        with torch.no_grad():
            found = flex.run_flex(build_attention_plan(layout), 0.3, None, 2.0, None, q, k, v)
        scores = torch.tanh(q @ k.transpose(-1, -2) * 0.3 / 2.0) * 2.0
        expected = torch.softmax(scores.masked_fill(~_dense(layout), float("-inf")), -1) @ v
        assert torch.allclose(found, expected.transpose(1, 2), atol=1e-5)
    assert counter.frame_count <= 2
    torch._dynamo.reset()


def test_padded_rows_have_few_lengths() -> None:
    lengths = {flex._round_length(n) for n in range(1, 16_385)}
    assert len(lengths) <= 50 and all(n % 128 == 0 and n >= 384 for n in lengths)
    assert all(n <= flex._round_length(n) <= max(384, 1.15 * n + 128) for n in range(1, 16_385))

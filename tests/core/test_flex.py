"""Flex attention's block mask, made from the spans, against the mask function evaluated everywhere."""

from __future__ import annotations

import pytest
import torch

from burnish.core.batch import Layout
from burnish.core.flex import build_block_mask, build_mask_mod, find_blocks
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

"""Every kernel against its formula in fp64, at widths that fill vectors and at some that do not."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from burnish.core.batch import Layout
from burnish.core.kernels import calls
from burnish.core.kernels.build import load_kernels
from burnish.core.kernels.calls import Heads
from burnish.core.segments import build_attention_plan
from tests.core.dense import attend_dense, draw_layout

pytestmark = pytest.mark.skipif(load_kernels().library is None, reason=f"no kernels here: {load_kernels().note}")

LOW = pytest.mark.parametrize("low", [torch.float32, torch.bfloat16])
WIDTHS = pytest.mark.parametrize("shape", [(1, 16), (70, 160), (33, 24), (5, 7)])


def _draw(seed: int, *shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def _close(found: Tensor, expected: Tensor, *, by: float = 2e-6) -> None:
    """To fp32 rounding of the largest number; results that are stored in bf16 to its rounding."""
    assert found.shape == expected.shape
    step = 2.0**-8 * expected.abs() if found.dtype == torch.bfloat16 else 0.0
    wrong = (found.double() - expected).abs() - step - by * max(1.0, float(expected.abs().max()))
    assert float(wrong.max()) <= 0, float(wrong.max())


@LOW
@WIDTHS
def test_norm_and_its_gradient(shape: tuple[int, int], low: torch.dtype) -> None:
    x, weight, residual = _draw(0, *shape), _draw(1, shape[1]), _draw(3, *shape)
    grad = _draw(2, *shape).to(low)
    wide, scale = x.double().requires_grad_(), weight.double().requires_grad_()
    expected = wide * (wide.square().mean(-1, keepdim=True) + 0.01).rsqrt() * scale
    d_x, d_weight = torch.autograd.grad(expected, [wide, scale], grad.double())
    found, rstd = calls.norm(x, weight, 0.01, low)
    _close(found, expected.detach())
    for more in (residual, None):
        dx, dw = calls.norm_backward(grad, x, rstd, weight, more, True)
        _close(dx, d_x if more is None else d_x + more.double(), by=4e-6)
        assert dw is not None
        _close(dw, d_weight, by=4e-6)
    assert calls.norm_backward(grad, x, rstd, weight, None, False)[1] is None


@LOW
@WIDTHS
def test_swiglu_and_its_gradient(shape: tuple[int, int], low: torch.dtype) -> None:
    gate, up, grad = (_draw(i, *shape, scale=3.0).to(low) for i in range(3))
    g, u = (t.double().requires_grad_() for t in (gate, up))
    expected = F.silu(g) * u
    d_both = torch.cat(torch.autograd.grad(expected, [g, u], grad.double()), 1)
    _close(calls.swiglu(gate, up), expected.detach())
    both, again = calls.swiglu_backward(gate, up, grad)
    _close(both, d_both)
    assert torch.equal(again, calls.swiglu(gate, up))


def test_swiglu_far_out_and_nan() -> None:
    gate = torch.tensor([[-300.0, -88.0, 0.0, 88.0, 300.0, float("nan"), float("inf"), -1e38, float("-inf")]])
    found = calls.swiglu(gate, torch.ones_like(gate))[0]
    assert found[7] == 0 and found[8].isnan(), "as PyTorch's"
    assert found[0].abs() < 1e-35 and found[1].abs() < 1e-35 and found[2] == 0
    assert found[3] == 88 and found[4] == 300 and found[5].isnan() and found[6] == float("inf")


@LOW
def test_sum_with_the_residual(low: torch.dtype) -> None:
    product, x = _draw(0, 3, 20).to(low), _draw(1, 5, 20)
    rows = torch.tensor([4, 0, 0])
    assert torch.equal(calls.add(product, x, rows), product.float() + x[rows])
    assert torch.equal(calls.add(product, x[:3].contiguous(), None), product.float() + x[:3])


@LOW
@pytest.mark.parametrize("size", [32, 8, 6, 80])
@pytest.mark.parametrize("normed", [True, False])
def test_rotation_and_its_gradient(size: int, normed: bool, low: torch.dtype) -> None:
    heads, total, half = Heads(6, 2, size, 0.3, 1e-3), 37, size // 2
    qkv, grad = _draw(0, total, 10 * size).to(low), _draw(1, total, 10, size)
    cos, sin = _draw(2, total, size), _draw(3, total, size)
    norms = (_draw(4, size), _draw(5, size)) if normed else (None, None)
    leaves = [qkv.double().requires_grad_()] + [n.double().requires_grad_() for n in norms if n is not None]
    x = leaves[0].view(total, 10, size)
    parts = []
    for n, part in enumerate((x[:, :6], x[:, 6:8])):
        if normed:
            part = part * (part.square().mean(-1, keepdim=True) + 1e-3).rsqrt() * leaves[1 + n]
        turned = torch.cat((-part[..., half:], part[..., :half]), -1)
        parts.append((part * cos[:, None] + turned * sin[:, None]) * (0.3 if n == 0 else 1.0))
    expected = torch.cat((*parts, x[:, 8:]), 1)
    gradients = torch.autograd.grad(expected, leaves, grad.double())
    _close(calls.rotate(qkv, *norms, cos, sin, heads), expected.detach())
    d_qkv, *d_norms = calls.rotate_backward(grad, qkv, *norms, cos, sin, heads)
    _close(d_qkv, gradients[0], by=4e-6)
    for found, wanted in zip(d_norms, gradients[1:]):
        _close(found, wanted, by=4e-6)
    assert normed or d_norms == [None, None]


def _draw_layout(seed: int, completions: tuple[int, ...], longest: int) -> Layout:
    return draw_layout(seed, completions, (0, longest), (1, longest))


@LOW
@pytest.mark.parametrize("completions", [(1,) * 7, (2,) * 5, (3, 1, 2, 1), (1,)])
@pytest.mark.parametrize(("heads", "kv_heads", "size", "longest"), [(6, 2, 32, 20), (2, 2, 4, 9), (4, 1, 80, 70)])
def test_attention_and_its_gradient(
    completions: tuple[int, ...], heads: int, kv_heads: int, size: int, longest: int, low: torch.dtype
) -> None:
    layout = _draw_layout(len(completions), completions, longest)
    table = build_attention_plan(layout).table
    rows = _draw(0, layout.total, heads + 2 * kv_heads, size)
    grad = _draw(1, layout.total, heads, size).to(low)
    wide = rows.double().requires_grad_()
    expected = attend_dense(wide, layout, heads, kv_heads)
    (d_rows,) = torch.autograd.grad(expected, wide, grad.double())
    found, lse = calls.attend(rows, table, heads, kv_heads, low, keep=True)
    _close(found, expected.detach(), by=5e-6)
    assert lse is not None
    _close(calls.attend_backward(rows, table, heads, kv_heads, grad, lse), d_rows, by=5e-6)
    assert calls.attend(rows, table, heads, kv_heads, low, keep=False)[1] is None


@LOW
@pytest.mark.parametrize("columns", [64, 37, 5])
def test_log_softmax_over_tiles(columns: int, low: torch.dtype) -> None:
    z, grad = _draw(0, 19, 3 * columns, scale=4.0).to(low), _draw(1, 19)
    targets = torch.randint(0, 3 * columns, (19,), generator=torch.Generator().manual_seed(2))
    wide = z.double().requires_grad_()
    expected = (wide * 0.5).log_softmax(1).gather(1, targets[:, None])[:, 0]
    (d_z,) = torch.autograd.grad(expected, wide, grad.double())
    lse, picked = torch.full((19,), float("-inf")), torch.zeros(19)
    tiles = [(i, z[:, i : i + columns].contiguous()) for i in range(0, 3 * columns, columns)]
    for first, tile in tiles:
        calls.read_tile(tile, targets, first, 0.5, lse, picked)
    _close(picked - lse, expected.detach())
    for first, tile in tiles:
        out = calls.tile_gradient(tile, targets, first, 0.5, lse, grad, torch.empty_like(tile))
        _close(out, d_z[:, first : first + columns], by=1e-6)


@pytest.mark.parametrize("order", [1, -1])
def test_a_tile_of_words_that_cannot_be_adds_nothing(order: int) -> None:
    """As a model masks words: log-probs of the rest are those without them, wherever the masked tile comes."""
    z, targets = _draw(0, 3, 20), torch.tensor([1, 5, 19])
    tiles = [(0, z), (20, torch.full((3, 20), float("-inf")))][::order]
    lse, picked = torch.full((3,), float("-inf")), torch.zeros(3)
    for first, tile in tiles:
        calls.read_tile(tile, targets, first, 1.0, lse, picked)
    _close(picked - lse, z.double().log_softmax(1).gather(1, targets[:, None])[:, 0])


def test_infinite_and_nan_logits_stay_visible() -> None:
    z = torch.tensor([[0.0, float("nan")], [float("-inf"), 1.0], [float("inf"), 1.0], [float("-inf")] * 2])
    lse, picked = torch.full((4,), float("-inf")), torch.zeros(4)
    calls.read_tile(z, torch.zeros(4, dtype=torch.long), 0, 1.0, lse, picked)
    expected = z.log_softmax(1)[:, 0]
    assert torch.equal((picked - lse).isnan(), expected.isnan()) and float((picked - lse)[1]) == float("-inf")


@LOW
def test_the_number_of_threads_changes_no_bit(low: torch.dtype) -> None:
    layout = _draw_layout(3, (2,) * 12, 30)
    table, heads = build_attention_plan(layout).table, Heads(4, 2, 16, 0.25, 1e-6)
    rows, x = _draw(0, layout.total, 8, 16), _draw(1, layout.total, 48)
    grad, wide = _draw(2, layout.total, 4, 16).to(low), _draw(3, layout.total, 48).to(low)
    qkv = _draw(4, layout.total, 8 * 16).to(low)
    angles, ones = _draw(5, layout.total, 16), torch.ones(16)

    def compute() -> list[Tensor | None]:
        out, lse = calls.attend(rows, table, 4, 2, low, keep=True)
        assert lse is not None
        d_rows = calls.attend_backward(rows, table, 4, 2, grad, lse)
        _, rstd = calls.norm(x, torch.ones(48), 1e-6, low)
        more = calls.norm_backward(wide, x, rstd, torch.ones(48), None, True)
        return [out, lse, d_rows, *more, *calls.rotate_backward(d_rows, qkv, ones, ones, angles, angles, heads)]

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = compute()
        torch.set_num_threads(3)
        for a, b in zip(alone, compute(), strict=True):
            assert a is not None and b is not None and torch.equal(a, b)
    finally:
        torch.set_num_threads(before)


def test_what_is_served() -> None:
    x = torch.zeros(2, 4)
    assert calls.serves(torch.bfloat16, x, None) and calls.serves(torch.float32, x)
    assert not calls.serves(torch.float64, x) and not calls.serves(torch.float32, x.double())
    assert not calls.serves(torch.float32, x.t()) and not calls.serves(torch.float32, x[:0])
    assert calls.serves(torch.bfloat16, x, given=(x.bfloat16(), x[:0].bfloat16()))
    assert not calls.serves(torch.bfloat16, x, given=(x,)) and not calls.serves(torch.float32, given=(x.t(),))
    with calls.without_kernels():
        assert not calls.serves(torch.float32, x)
    assert calls.serves(torch.float32, x)


def test_a_kernel_without_room_says_that_memory_ran_out(monkeypatch: pytest.MonkeyPatch) -> None:
    layout = _draw_layout(0, (1,), 5)
    monkeypatch.setattr(calls, "_functions", lambda: {"attend": lambda *args: 1})
    with pytest.raises(MemoryError, match="not enough memory"):
        calls.attend(_draw(0, layout.total, 3, 4), build_attention_plan(layout).table, 1, 1, torch.float32, keep=False)


def test_another_default_type_changes_nothing() -> None:
    """Buffers that C fills are fp32 whatever torch's default is."""
    qkv, angles = _draw(0, 40, 32), _draw(1, 40, 8)
    expected = calls.rotate(qkv, None, None, angles, angles, Heads(2, 1, 8, 1.0, 1e-6))
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        found = calls.rotate(qkv, None, None, angles, angles, Heads(2, 1, 8, 1.0, 1e-6))
    finally:
        torch.set_default_dtype(before)
    assert found.dtype == torch.float32 and torch.equal(found, expected)

"""Flex and variable-length attention on a CUDA device, forward and backward, against attention written out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from burnish.core.attention import _Explicit
from burnish.core.flex import run_flex
from burnish.core.segments import build_attention_plan
from burnish.core.varlen import explain_missing, run_varlen
from tests.core.test_attention import _batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
SIZES = [(150, [80, 3]), (30, [5, 40]), (9, [1, 2, 7])]


def _draw(total: int, dtype: torch.dtype, heads: tuple[int, int], size: int = 64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, n, total, size) for n in (heads[0], heads[1], heads[1])]
    return [torch.randn(s, generator=generator).to("cuda", dtype).requires_grad_() for s in shapes]


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize(
    ("window", "softcap", "sinks"), [(None, None, False), (20, None, False), (None, 5.0, False), (None, None, True)]
)
@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-3), (torch.bfloat16, 2e-2)])
def test_flex_equals_attention_written_out(
    heads: tuple[int, int], window: int | None, softcap: float | None, sinks: bool, dtype: torch.dtype, most: float
) -> None:
    """Output and the gradients of queries, keys and values; relative to the norm of each."""
    plan = build_attention_plan(_batch(SIZES).layout)
    inputs = _draw(plan.total, dtype, heads)
    aux = torch.linspace(-1, 1, heads[0], device="cuda") if sinks else None
    found = run_flex(plan, 0.125, window, softcap, aux, *inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _Explicit(plan, 0.125, window, softcap, aux, 0.0)(*exact)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad(found, inputs, weights.to(dtype))
    theirs = torch.autograd.grad(expected, exact, weights)
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < most


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("sizes", [SIZES, [(5, [3]), (1, [7]), (200, [90])]])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_g05_varlen_equals_attention_written_out(
    heads: tuple[int, int], window: int | None, sizes: list, dtype: torch.dtype
) -> None:
    if missing := explain_missing(torch.device("cuda")):
        pytest.skip(missing)
    plan = build_attention_plan(_batch(sizes).layout)
    inputs = _draw(plan.total, dtype, heads)
    found = run_varlen(plan, 0.125, window, *inputs)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = _Explicit(plan, 0.125, window, None, None, 0.0)(*exact)
    weights = torch.randn_like(expected)
    ours = torch.autograd.grad(found, inputs, weights.to(dtype))
    theirs = torch.autograd.grad(expected, exact, weights)
    for a, b in zip([found, *ours], [expected, *theirs], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 2e-2


def test_g05_a_layer_launches_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels that a layer starts do not grow with the row's segments, and the host waits for none of them."""
    if missing := explain_missing(torch.device("cuda")):
        pytest.skip(missing)
    counts = []
    for groups in (4, 64):
        plan = build_attention_plan(_batch([(20, [10, 6])] * groups).layout)
        inputs = _draw(plan.total, torch.bfloat16, (4, 2))
        run_varlen(plan, 0.125, None, *inputs).sum().backward()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
                run_varlen(plan, 0.125, None, *inputs).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        counts.append(sum(e.count for e in profile.key_averages()))
    assert counts[0] == counts[1]

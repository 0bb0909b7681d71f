"""Variable-length attention over packed rows: gather, bounds and gradients with torch's function replaced by its definition."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from burnish.core import attention, varlen
from burnish.core.attention import packed_attention
from burnish.core.segments import build_attention_plan
from tests.core.plain_varlen import varlen_attn
from tests.core.test_attention import SIZES, _batch, _count, _dense, _dense_mask, _draw, _gaps, _with_gradients


@pytest.fixture(autouse=True)
def _plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "find_varlen", lambda: varlen_attn)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("window", [None, 1, 3, 60, 140, 1000])
@pytest.mark.parametrize("sizes", [SIZES, [(5, [3]), (1, [7]), (12, [1])]])
def test_g05_float64_equals_a_dense_mask_to_1e_12(heads: tuple[int, int], window: int | None, sizes: list) -> None:
    """Pairs and more completions, and groups of one completion, whose keys are the row itself."""
    batch = _batch(sizes)
    plan, inputs = build_attention_plan(batch.layout), _draw(batch.layout.total, heads=heads)
    window_in_row = None if window is None or window >= plan.longest else window
    found = _with_gradients(varlen.run_varlen(plan, 0.3, window_in_row, *inputs), inputs)
    expected = _with_gradients(_dense(*inputs, _dense_mask(batch.layout, window), 0.3), inputs)
    assert max(_gaps(found, expected)) <= 1e-12


def test_g05_operations_of_a_layer_do_not_grow_with_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def launch(query, key, value, *args, **kwargs):
        launches.append(1)
        return query + (key.sum() + value.sum())  # one launch whatever it is given

    monkeypatch.setattr(varlen, "find_varlen", lambda: launch)
    (few, _), (many, _) = _count(2, varlen.run_varlen), _count(64, varlen.run_varlen)
    assert few.calls == many.calls and few.calls["index_select"] == 2
    assert len(launches) == 4, "one launch for each layer of each row"


def test_keys_of_groups_of_one_completion_are_not_gathered() -> None:
    plan = build_attention_plan(_batch([(5, [3]), (1, [7])]).layout)
    assert plan.pieces(None, torch.device("cpu")).index is None


def test_index_tensors_are_built_once_for_all_layers() -> None:
    plan = build_attention_plan(_batch().layout)
    device = torch.device("cpu")
    assert plan.pieces(None, device) is plan.pieces(None, device) and plan.bounds(device) is plan.bounds(device)


@pytest.mark.parametrize(
    ("dtype", "size", "value_size", "why"),
    [
        (torch.float32, 16, 16, "float32"),
        (torch.bfloat16, 12, 12, "multiple of 8"),
        (torch.bfloat16, 264, 264, "256"),
        (torch.bfloat16, 16, 8, "as wide"),
        (torch.bfloat16, 16, 16, ""),
    ],
)
def test_what_it_does_not_take_goes_segment_by_segment(
    dtype: torch.dtype, size: int, value_size: int, why: str, caplog: pytest.LogCaptureFixture, monkeypatch
) -> None:
    taken = []
    real = varlen.run_varlen
    monkeypatch.setattr(attention, "run_varlen", lambda *args: taken.append(1) or real(*args))
    attention._say_once.cache_clear()
    batch = _batch([(5, [3, 4])])
    plan = build_attention_plan(batch.layout)
    inputs = _draw(batch.layout.total, dtype, size=size, value_size=value_size)
    with caplog.at_level(logging.INFO, "burnish"):
        for _ in range(2):
            found, _ = packed_attention(nn.Identity(), *inputs, None, burnish_plan=plan, way="varlen")
    exact = [x.detach().double() for x in inputs]
    expected = _dense(*exact, _dense_mask(batch.layout), size**-0.5)
    assert _gaps([found], [expected])[0] <= 1e-2
    assert len(taken) == (0 if why else 2)
    assert len(caplog.messages) == bool(why) and all(why in m for m in caplog.messages)


def test_softcaps_sinks_and_dropout_do_not_reach_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "run_varlen", lambda *args: pytest.fail("varlen has no softcap, sink or dropout"))
    batch = _batch([(5, [3, 4])])
    inputs = _draw(batch.layout.total, torch.bfloat16, size=16)
    for further in ({"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"dropout": 0.5}):
        plan = build_attention_plan(batch.layout)
        packed_attention(nn.Identity(), *inputs, None, burnish_plan=plan, way="varlen", **further)


def test_what_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "CUDA" in varlen.explain_missing(torch.device("cpu"))
    monkeypatch.setattr(varlen, "find_varlen", lambda: None)
    assert torch.__version__ in varlen.explain_missing(torch.device("cuda"))
    monkeypatch.setattr(varlen, "find_varlen", lambda: varlen_attn)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert "8.0" in varlen.explain_missing(torch.device("cuda"))


def test_a_torch_without_windows_counts_as_without_varlen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    varlen.find_varlen.cache_clear()
    try:
        import torch.nn.attention.varlen as module

        monkeypatch.setattr(module, "varlen_attn", lambda query, key, value, is_causal=False: None)
        assert varlen.find_varlen() is None
    finally:
        varlen.find_varlen.cache_clear()

"""Schedules against their formulas; parameter groups; the memory-light optimizer."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from burnish.config.stages import SftSettings
from burnish.engine.optimizer import build_optimizer, build_parameter_groups, compute_lr_factor
from burnish.errors import ConfigError


def _factors(total: int = 20, **changes) -> list[float]:
    return [compute_lr_factor(i, total, SftSettings(**changes)) for i in range(total)]


def test_linear_with_warmup():
    got = _factors(warmup_steps=4)
    assert got[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert got[4] == 1.0
    assert got[12] == pytest.approx(0.5)
    assert got[19] == pytest.approx(1 / 16)


def test_cosine_ends_at_the_floor():
    got = _factors(lr_scheduler_type="cosine", min_lr_ratio=0.1)
    assert got[10] == pytest.approx(0.1 + 0.9 * 0.5)
    assert got[19] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * 0.95)))


def test_wsd_is_flat_then_falls_linearly():
    got = _factors(lr_scheduler_type="wsd", decay_ratio=0.25)
    assert got[:15] == [1.0] * 15
    assert got[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2])


def test_constant_and_ratio_warmup():
    assert _factors(lr_scheduler_type="constant", warmup_ratio=0.1)[:3] == pytest.approx([1 / 3, 2 / 3, 1.0])


def _parameters() -> dict[str, nn.Parameter]:
    return {n: nn.Parameter(torch.ones(4, 3)) for n in ("layer.weight", "norm.weight", "score.weight")}


def test_norms_do_not_decay_and_the_head_has_its_own_rate():
    settings = SftSettings(weight_decay=0.1, learning_rate=1e-3, head_learning_rate=1e-2)
    groups = build_parameter_groups(_parameters(), settings, no_decay={"norm.weight"}, head={"score.weight"})
    found = {n: (g["weight_decay"], g["peak_lr"]) for g in groups for n in g["names"]}
    assert found == {"layer.weight": (0.1, 1e-3), "norm.weight": (0.0, 1e-3), "score.weight": (0.1, 1e-2)}


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_each_optimizer_steps(name):
    settings = SftSettings(optim=name, learning_rate=1e-2)
    parameters = _parameters()
    optimizer = build_optimizer(build_parameter_groups(parameters, settings, no_decay=set(), head=set()), settings)
    for p in parameters.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert all((p < 1).all() for p in parameters.values())
    state = sum(v.numel() for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))
    moments = {"adamw": 2 * 36, "adafactor": 0.7 * 36, "sgd": 1}[name]
    assert state <= moments + 9


@pytest.mark.skipif(torch.cuda.is_available(), reason="says that there is no CUDA device")
def test_adamw_8bit_without_cuda_says_so():
    settings = SftSettings(optim="adamw_8bit")
    with pytest.raises(ConfigError, match="CUDA"):
        build_optimizer(build_parameter_groups(_parameters(), settings, no_decay=set(), head=set()), settings)

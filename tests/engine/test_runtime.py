"""Which device a process computes on."""

from __future__ import annotations

import pytest
import torch

from burnish.engine import runtime
from burnish.errors import ConfigError


def test_devices_without_cuda_are_said_aloud(caplog, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = runtime.build_runtime([0, 1])
    assert found.device == torch.device("cpu")
    assert "no CUDA device" in caplog.text


def test_each_process_takes_its_own_of_the_named_devices(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert runtime._choose_device([3, 2]) == torch.device("cuda", 2)
    for wrong in ([3], [0, 9]):
        with pytest.raises(ConfigError, match="devices"):
            runtime._choose_device(wrong)

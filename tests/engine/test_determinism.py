"""G-02: equal bits are demanded of torch and cuBLAS, and an operation that has no such form is named."""

from __future__ import annotations

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from burnish.engine.determinism import CUBLAS_VARIABLE, deterministic, prepare_cublas
from burnish.engine.forward import reseed
from burnish.errors import ConfigError


def test_g02_torch_refuses_instead_of_warning() -> None:
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_g02_an_operation_without_such_a_form_is_named() -> None:
    refusal = (
        "kthvalue CUDA does not have a deterministic implementation, but you set "
        "'torch.use_deterministic_algorithms(True)'. You can turn off determinism just for this operation, or …"
    )
    with pytest.raises(ConfigError, match="kthvalue CUDA has no deterministic form") as caught, deterministic(True):
        raise RuntimeError(refusal)
    assert "deterministic: false" in caught.value.remedy
    assert not torch.are_deterministic_algorithms_enabled()
    with pytest.raises(RuntimeError, match="another fault"), deterministic(True):
        raise RuntimeError("another fault")


def test_g02_cublas_is_told_before_cuda_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    prepare_cublas()
    assert os.environ[CUBLAS_VARIABLE] == ":4096:8"
    monkeypatch.setenv(CUBLAS_VARIABLE, ":16:8")
    prepare_cublas()
    assert os.environ[CUBLAS_VARIABLE] == ":16:8"


def test_g02_a_run_on_a_device_begins_with_it() -> None:
    """In a process of its own: what is asked of CUDA first finds the variable set."""
    code = (
        "import os, torch\n"
        "seen = []\n"
        "torch.cuda.is_available = lambda: True\n"
        "torch.cuda.device_count = lambda: 1\n"
        "torch.cuda.set_device = lambda device: seen.append(os.environ.get('CUBLAS_WORKSPACE_CONFIG'))\n"
        "from burnish.engine.runtime import build_runtime\n"
        "build_runtime([0])\n"
        "print(seen)\n"
    )
    env = {k: v for k, v in os.environ.items() if k != CUBLAS_VARIABLE}
    found = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[':4096:8']"


def test_g11_only_the_generator_in_use_is_seeded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two devices the second is this process's: the first keeps its random numbers, and starts no context."""
    seeded: list[int] = []

    def generator(number: int) -> SimpleNamespace:
        return SimpleNamespace(manual_seed=lambda seed: seeded.append(number))

    monkeypatch.setattr(torch.cuda, "default_generators", (generator(0), generator(1)))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    runtime = SimpleNamespace(device=torch.device("cuda", 1), rank=0)
    with torch.random.fork_rng(devices=[]):
        reseed(SimpleNamespace(reseed=True, seed=3, runtime=runtime), 0, 0)  # pyright: ignore
    assert seeded == [1]

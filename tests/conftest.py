"""Shared fixtures: the real data where they are at hand, tiny models, tiny groups."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.forkserver import ForkServer

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("BURNISH_TESTING", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of programs that the tests start; two workers share the machine

ROOT = Path(__file__).resolve().parent.parent


def find_shared() -> Path | None:
    """The folder with real data: BURNISH_SHARED, or `shared` beside the repository."""
    for candidate in (os.environ.get("BURNISH_SHARED"), ROOT.parent / "shared"):
        if candidate and (Path(candidate) / "data").is_dir():
            return Path(candidate)
    return None


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with real data; the test is skipped where there is none."""
    found = find_shared()
    if found is None:
        pytest.skip("needs the real data: set BURNISH_SHARED to the folder that holds data/hh-harmless.jsonl.gz")
    return found


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache for the tests of this session and worker, apart from the user's."""
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path_factory.getbasetemp() / "burnish-cache"))


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """Tiny matrices: one thread is faster, and sums keep one order."""
    try:
        import torch
    except ImportError:
        return
    torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo) -> Iterator[None]:
    """What a test printed reaches the process that collects reports only as valid UTF-8; some tests log lone surrogates."""
    report = yield
    report.sections = [(n, t.encode("utf-8", "backslashreplace").decode("utf-8")) for n, t in report.sections]
    return report


@pytest.fixture(scope="session")
def server() -> Iterator[ForkServer]:
    """Forks a child for each command; started by the first test that asks for it."""
    found = ForkServer()
    yield found
    found.close()


@pytest.fixture(scope="session")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model/ (tiny), chat.jsonl and pairs.jsonl (24 rows each); not to be changed."""
    from tests.pipeline.tiny_folder import build_model_folder, write_rows

    folder = tmp_path_factory.mktemp("inputs")
    build_model_folder(folder / "model")
    write_rows(folder / "chat.jsonl", "pocket/chat", 24)
    write_rows(folder / "pairs.jsonl", "pocket/preferences", 24)
    return folder


@pytest.fixture
def arm_fault(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Arms one fault of `burnish.faults` in this process until the test ends; "" disarms."""
    from burnish import faults

    def arm(spec: str) -> None:
        monkeypatch.setattr(faults, "_SPEC", spec)
        monkeypatch.setattr(faults, "_ACTIVE", bool(spec))
        faults._SEEN.clear()

    return arm

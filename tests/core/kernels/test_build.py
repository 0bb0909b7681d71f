"""Where the library of kernels comes from: compiled once, kept where nobody else can write, or absent with a reason."""

from __future__ import annotations

import platform
import stat
import sys
from pathlib import Path

import pytest
import torch

from burnish.core.batch import CompletionSpan, GroupSpan, Layout
from burnish.core.kernels import build, calls
from burnish.core.kernels.build import Kernels, load_kernels
from burnish.core.segments import build_attention_plan

pytestmark = pytest.mark.skipif(load_kernels().library is None, reason=f"no kernels here: {load_kernels().note}")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", str(tmp_path / "cache"))


def _load() -> Kernels:
    """As a new process would."""
    return load_kernels.__wrapped__()


def _kept(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache" / "kernels").glob("*"))


def test_it_is_compiled_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load()
    assert first.library is not None and first.note.startswith("built by") and first.identity != "none"
    (kept,) = _kept(tmp_path)
    assert stat.S_IMODE(kept.parent.stat().st_mode) == 0o700
    monkeypatch.setattr(build, "_compile", lambda *args: pytest.fail("compiled again"))
    assert _load().identity == first.identity
    assert load_kernels().identity == first.identity, "the same sources, compiler and processor in another cache"


def test_other_flags_or_sources_are_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _load().identity
    monkeypatch.setattr(build, "FLAGS", (*build.FLAGS, "-DOTHER"))
    assert _load().identity != first and len(_kept(tmp_path)) == 2


def test_a_damaged_library_is_made_again(tmp_path: Path) -> None:
    kept = tmp_path / "cache" / "kernels" / f"kernels-{load_kernels().identity}.so"
    kept.parent.mkdir(parents=True, mode=0o700)
    kept.write_bytes(b"not a library")
    found = _load()
    assert found.library is not None and not found.note.endswith("for this process only")
    assert _kept(tmp_path) == [kept] and kept.read_bytes().startswith(b"\x7fELF")


def test_a_folder_that_others_may_write_is_not_used(tmp_path: Path) -> None:
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    assert _load().note.endswith("for this process only") and not _kept(tmp_path)


def test_without_a_cache_it_is_made_for_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_CACHE", "off")
    assert _load().note.endswith("for this process only")


@pytest.mark.parametrize("word", ["off", "0"])
def test_it_can_be_switched_off(word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BURNISH_KERNELS", word)
    assert _load() == Kernels(None, "none: BURNISH_KERNELS is off")


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    found = _load()
    assert found.library is None and "install gcc" in found.note and found.identity == "none"


def test_a_compiler_that_fails_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text(
        f"#!{sys.executable}\nimport sys\nif '--version' in sys.argv: print('odd 1')\n"
        "else: sys.exit('unknown option -O3')\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    found = _load()
    assert found.library is None and "unknown option -O3" in found.note
    assert not _kept(tmp_path), "nothing half-made is left behind"


def test_the_compiler_that_cc_names_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = tmp_path / "seen"
    compiler = tmp_path / "mine"
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {seen}\nexec gcc "$@"\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", f"{compiler} -DMINE")
    found = _load()
    if found.library is None:
        pytest.skip(f"gcc is not the compiler here: {found.note}")
    assert "-DMINE" in seen.read_text()


def test_not_on_other_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert _load().library is None


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flag is that of x86-64 processors")
def test_portable_vectors_agree_with_this_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sources without AVX-512: what other processors compile."""
    draw = torch.Generator().manual_seed(0)
    x, up, rows = (torch.randn(s, generator=draw) for s in ((9, 40), (9, 40), (12, 4, 24)))
    table = build_attention_plan(Layout(12, (GroupSpan(0, 3, (CompletionSpan(3, 4), CompletionSpan(7, 5))),))).table

    def compute() -> list[torch.Tensor]:
        out, lse = calls.attend(rows, table, 2, 1, torch.bfloat16, keep=True)
        assert lse is not None
        gradient = calls.attend_backward(rows, table, 2, 1, out, lse)
        return [out.float(), lse, gradient, calls.swiglu(x, up), calls.norm(x, up[0], 1e-6, torch.bfloat16)[0].float()]

    native = compute()
    monkeypatch.setattr(build, "FLAGS", tuple("-march=x86-64" if f == "-march=native" else f for f in build.FLAGS))
    portable = _load()
    assert portable.library is not None and portable.identity != load_kernels().identity
    monkeypatch.setattr(calls, "load_kernels", lambda: portable)
    monkeypatch.setattr(calls, "_functions", calls._functions.__wrapped__)
    for a, b in zip(native, compute(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2 if a is native[0] or a is native[4] else 1e-5, atol=1e-5)

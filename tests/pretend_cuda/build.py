"""The guard's shared library: compiled once for the installed torch, kept in the repository's build folder."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

SOURCE = Path(__file__).with_name("guard.cpp")
KEPT = Path(__file__).resolve().parents[2] / "build" / "pretend_cuda"


class NoGuard(Exception):
    """Why there is no pretended device here."""


def build_guard() -> Path:
    """The library, from the build folder or made now (about 6 seconds); torch is not imported.

    Raises:
        NoGuard: There is no g++, torch has CUDA itself, or the compiler failed.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise NoGuard("needs g++, which compiles a shim of 40 lines for torch")
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    torch = Path(spec.origin).parent
    if (torch / "lib" / "libtorch_cuda.so").exists():
        raise NoGuard("this torch has CUDA: `make test-gpu` tests on the device")
    version = (torch / "version.py").read_bytes()
    name = f"guard-{hashlib.sha256(SOURCE.read_bytes() + version + str(torch).encode()).hexdigest()[:16]}.so"
    for folder in (KEPT, Path(tempfile.gettempdir()) / f"burnish-pretend-cuda-{os.getuid()}"):
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            return folder / name if (folder / name).exists() else _compile(compiler, torch, folder / name)
        except OSError:
            continue
    raise NoGuard("no folder can be written that keeps the compiled shim")


def _compile(compiler: str, torch: Path, target: Path) -> Path:
    libraries = torch / "lib"
    includes = [f"-I{torch / 'include'}", f"-I{torch / 'include' / 'torch' / 'csrc' / 'api' / 'include'}"]
    links = [f"-L{libraries}", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{libraries}"]
    made = target.with_suffix(f".{os.getpid()}")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", *includes, str(SOURCE), *links, "-o", str(made)]
    found = subprocess.run(command, capture_output=True, text=True, errors="replace", check=False)
    if found.returncode:
        raise NoGuard(f"g++ cannot compile the shim for this torch: {found.stderr.strip()[:300]}")
    return made.replace(target)

"""The shared library of C kernels: compiled for this machine on first use, kept in the cache, or absent.

Needs Linux, a C compiler (`CC`, or gcc or cc on the path) and PyTorch's OpenMP threads. `BURNISH_KERNELS=off` goes without.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from burnish.disk import cache_root

FOLDER = Path(__file__).parent
SOURCES = ("attention.c", "rows.c", "head.c", "parallel.c")
HEADERS = ("vector.h", "parallel.h")
# The compiler may assume no value finite and reorder nothing; fused multiply-adds are allowed, as in PyTorch's own kernels.
FLAGS = ("-std=gnu11", "-O3", "-march=native", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w")
_LIMIT_S = 120.0


@dataclass(frozen=True, slots=True)
class Kernels:
    """The loaded library, or why there is none.

    Attributes:
        library: Its functions take addresses; None where PyTorch's operations do all the work.
        note: For people: how it was built, or what is missing.
        identity: Equal where results are equal bit for bit: a hash of sources, compiler and processor, or "none".
    """

    library: ctypes.CDLL | None
    note: str
    identity: str = "none"


class _Absent(Exception):
    """Why there are no kernels here."""


@functools.cache
def load_kernels() -> Kernels:
    """The kernels of this process; compiles them if nobody has done so on this machine (some seconds)."""
    try:
        threads = _find_threads()
        command = _find_compiler()
        version = _read_version(command)
        identity = _fingerprint(command, version)
        library, where = _load_or_build(command, f"kernels-{identity}.so")
        library.burnish_use.argtypes = [ctypes.c_void_p]
        library.burnish_use(threads)
        return Kernels(library, f"built by {version}{where}", identity)
    except _Absent as exc:
        return Kernels(None, f"none: {exc}")
    except Exception as exc:  # whatever is wrong with a compiler, a cache or a locale: PyTorch's operations do the work
        return Kernels(None, f"none: {' '.join(str(exc).split())[:300]}")


def _find_threads() -> int:
    """The address of GOMP_parallel in the OpenMP library that PyTorch has loaded."""
    if os.environ.get("BURNISH_KERNELS", "").lower() in ("off", "0", "false", "no"):
        raise _Absent("BURNISH_KERNELS is off")
    if sys.platform != "linux":
        raise _Absent("they are built on Linux only")
    own = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"  # a look-up there goes through what it is linked with
    with contextlib.suppress(OSError, AttributeError):
        return ctypes.cast(ctypes.CDLL(str(own)).GOMP_parallel, ctypes.c_void_p).value or 0
    with Path("/proc/self/maps").open(encoding="utf-8", errors="surrogateescape") as maps:
        paths = {
            line.split(maxsplit=5)[5].strip() for line in maps if line.count(" ") >= 5 and "omp" in Path(line).name
        }
    for path in sorted(p for p in paths if p.startswith("/") and ".so" in p):
        with contextlib.suppress(OSError, AttributeError):
            function = ctypes.CDLL(path).GOMP_parallel
            return ctypes.cast(function, ctypes.c_void_p).value or 0
    raise _Absent("PyTorch has no OpenMP threads here")


def _find_compiler() -> list[str]:
    for candidate in (shlex.split(os.environ.get("CC", "")), ["gcc"], ["cc"]):
        found = shutil.which(candidate[0]) if candidate else None
        if found:
            return [found, *candidate[1:]]
    raise _Absent("no C compiler was found (install gcc for faster steps on a CPU)")


def _read_version(command: list[str]) -> str:
    """The first line of what the compiler says of itself."""
    found = subprocess.run([*command, "--version"], capture_output=True, timeout=_LIMIT_S, check=True)
    text = found.stdout.decode(errors="replace")
    return text.splitlines()[0].strip() if text.strip() else command[0]


def _load_or_build(command: list[str], name: str) -> tuple[ctypes.CDLL, str]:
    """The library, from the cache or made now, and a remark."""
    root = cache_root()
    if root is not None:
        kept = root / "kernels" / name
        with contextlib.suppress(OSError):
            root.mkdir(parents=True, exist_ok=True)
            kept.parent.mkdir(mode=0o700, exist_ok=True)
            if _is_private(kept.parent):
                with contextlib.suppress(OSError):  # absent or damaged
                    return ctypes.CDLL(str(kept)), ""
                with _scratch(kept.parent) as scratch:
                    _compile(command, scratch / name).replace(kept)
                return ctypes.CDLL(str(kept)), ""
    with _scratch(None) as scratch:  # a mapped file stays when its folder goes
        return ctypes.CDLL(str(_compile(command, scratch / name))), ", for this process only"


def _fingerprint(command: list[str], version: str) -> str:
    digest = hashlib.sha256(repr((command, version, FLAGS, platform.machine(), _features())).encode())
    for file in (*SOURCES, *HEADERS):
        digest.update((FOLDER / file).read_bytes())
    return digest.hexdigest()[:16]


def _features() -> str:
    """What this processor can do: a cache may be shared by machines that differ."""
    with contextlib.suppress(OSError), Path("/proc/cpuinfo").open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            if line.lower().startswith(("flags", "features")):
                return line
    return platform.processor()


def _is_private(folder: Path) -> bool:
    """Nobody else can have put anything there: code is loaded from it."""
    facts = folder.stat()
    return facts.st_uid == os.getuid() and not facts.st_mode & 0o022


@contextlib.contextmanager
def _scratch(parent: Path | None) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=".build-", dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _compile(command: list[str], target: Path) -> Path:
    """Compile the sources side by side and link them."""
    objects = [target.parent / f"{source}.o" for source in SOURCES]
    jobs = [
        subprocess.Popen(
            [*command, *FLAGS, "-c", str(FOLDER / source), "-o", str(made)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for source, made in zip(SOURCES, objects, strict=True)
    ]
    try:
        outputs = [(job.communicate(timeout=_LIMIT_S)[0], job.returncode) for job in jobs]
    finally:
        for job in jobs:
            if job.poll() is None:
                job.kill()
                job.wait()
    _check(outputs)
    link = subprocess.run(
        [*command, "-shared", *map(str, objects), "-o", str(target), "-lm"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=_LIMIT_S,
        check=False,
    )
    _check([(link.stdout, link.returncode)])
    with target.open("rb") as made:
        os.fsync(made.fileno())
    return target


def _check(outputs: list[tuple[str, int]]) -> None:
    for text, code in outputs:
        if code:
            raise _Absent(f"the compiler failed: {' '.join(text.split())[:300] or f'exit {code}'}")

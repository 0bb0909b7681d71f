"""A parent that has imported everything and forks one child per command, so that hundreds of kills are affordable.

Run as a module it reads one JSON job a line: {"argv": […], "fault": "point:n:kill" | "", "call": "module:name:n:before" | "",
"signal_at": [point, number] | null, "die_at": calls | null, "cwd": folder, "log": file, "env": variables, "spare": bytes |
null} and answers {"status": exit status or −signal, "calls": number of calls}. No job depends on the clock: `call` kills the
child before or after the n-th call of a function or method, as seen from a module; for `signal_at` the child stops itself at
a fault point, and gets the signal there; `die_at` counts every call of Python's and C's functions in the main thread, and the
child dies within a millisecond after the n-th, in the middle of a system call or a kernel too (0 only counts).
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


class ForkServer:
    """Starts the parent and hands it jobs."""

    def __init__(self) -> None:
        env = os.environ | {
            "BURNISH_TESTING": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "OMP_NUM_THREADS": "1",
            "TERM": "dumb",
        }
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.forkserver"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, cwd=ROOT
        )

    def run(
        self,
        argv: list[str],
        *,
        log: Path,
        cwd: Path,
        fault: str = "",
        call: str = "",
        signal_at: tuple[str, int] | None = None,
        die_at: int | None = None,
        env: dict[str, str] | None = None,
        spare: int | None = None,
    ) -> int:
        """Run `burnish argv` in a fresh child; returns its exit status, or −n if signal n ended it.

        Args:
            signal_at: ("point:n", number): the signal is sent when the child passes the fault point for the n-th time.
            die_at: The number of calls after which the child dies by SIGALRM.
            env: Further environment variables.
            spare: Bytes of address space that the child may take beyond what it has as its first step begins (RLIMIT_AS).
        """
        job = {"argv": argv, "fault": fault, "call": call, "signal_at": signal_at, "die_at": die_at}
        job |= {"env": env or {}, "spare": spare}
        return int(self._ask(job | {"cwd": str(cwd), "log": str(log)})["status"])

    def count_calls(self, argv: list[str], *, log: Path, cwd: Path) -> int:
        """Run `burnish argv`, which must succeed; returns how many calls it took: the range of `die_at`."""
        job = {"argv": argv, "fault": "", "call": "", "signal_at": None, "die_at": 0, "env": {}, "spare": None}
        answer = self._ask(job | {"cwd": str(cwd), "log": str(log)})
        assert answer["status"] == 0, log.read_text()[-3000:]
        return int(answer["calls"])

    def _ask(self, job: dict[str, Any]) -> dict[str, Any]:
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write((json.dumps(job) + "\n").encode())
        self._parent.stdin.flush()
        return json.loads(self._parent.stdout.readline())

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait()


def _kill_at_call(module: str, name: str, nth: str, when: str) -> None:
    """Die before or after the n-th call of `module.name` (`name` may be Class.method)."""
    owner: Any = importlib.import_module(module)
    *path, last = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    whole, seen = getattr(owner, last), 0

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        seen += 1
        if seen == int(nth) and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = whole(*args, **kwargs)
        if seen == int(nth):
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(owner, last, counted)


def _limit_steps(spare: int) -> None:
    """Leave so many bytes of address space from the first step on; what was freed before is given back."""
    import ctypes
    import resource

    from burnish.engine import loop

    compute = loop.compute_gradient

    def limited(*args: Any, **kwargs: Any) -> Any:
        loop.compute_gradient = compute
        ctypes.CDLL(None).malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + spare
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        return compute(*args, **kwargs)

    loop.compute_gradient = limited


class _Calls:
    """Counts calls in the main thread; soon after the `last` of them the process dies."""

    def __init__(self, last: int) -> None:
        self.count, self._last = 0, last

    def __enter__(self) -> _Calls:
        sys.setprofile(self._see)
        return self

    def __exit__(self, *exc: object) -> None:
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, arg: object) -> None:
        if event in ("call", "c_call"):
            self.count += 1
            if self.count == self._last:
                sys.setprofile(None)
                signal.setitimer(signal.ITIMER_REAL, (1 + self._last % 1000) / 1e6)


def _child(job: dict[str, Any], told: int) -> None:
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])  # as `python -m burnish` has it
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from burnish import faults
    from burnish.cli.main import main

    torch.set_num_threads(1)
    fault = f"{job['signal_at'][0]}:stop" if job["signal_at"] else job["fault"]
    faults._SPEC, faults._ACTIVE = fault, bool(fault)
    if job["call"]:
        _kill_at_call(*job["call"].split(":"))
    os.environ.update(job["env"])
    if job["spare"] is not None:
        _limit_steps(job["spare"])
    status = 1
    try:
        if job["die_at"] is None:
            status = main(job["argv"])
        else:
            with _Calls(job["die_at"]) as calls:
                status = main(job["argv"])
            os.write(told, str(calls.count).encode())
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve() -> None:
    import pkgutil

    import burnish

    for module in pkgutil.walk_packages(burnish.__path__, "burnish."):
        if not module.name.endswith(("__main__", "wandb_sink", "tensorboard_sink", "bnb")):
            importlib.import_module(module.name)
    import peft  # noqa: F401
    import scipy.stats  # noqa: F401
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3ForSequenceClassification  # noqa: F401

    if name := os.environ.get("BURNISH_SEEDED_DEFECT"):
        from tests.reliability.defects import apply

        apply(name)
    for line in sys.stdin:
        job = json.loads(line)
        answers, told = os.pipe()
        pid = os.fork()
        if pid == 0:
            _child(job, told)
        os.close(told)
        _, status = os.waitpid(pid, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            if job["signal_at"]:
                os.kill(pid, job["signal_at"][1])
            os.kill(pid, signal.SIGCONT)
            _, status = os.waitpid(pid, 0)
        with os.fdopen(answers) as stream:
            calls = int(stream.read() or 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "calls": calls}), flush=True)


if __name__ == "__main__":
    _serve()

"""A parent that has imported everything and forks one child per command, so that hundreds of kills are affordable.

Run as a module it reads one JSON job a line: {"argv": […], "fault": "point:n:kill" | "", "call": "module:name:n:before" | "",
"kill_after": seconds | null, "signal_after": [number, seconds] | null, "cwd": folder, "log": file, "env": variables, "spare":
bytes | null} and answers {"status": exit status or −signal}. `call` kills the child before or after the n-th call of a function
or method, as seen from a module.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
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
        kill_after: float | None = None,
        signal_after: tuple[int, float] | None = None,
        env: dict[str, str] | None = None,
        spare: int | None = None,
    ) -> int:
        """Run `burnish argv` in a fresh child; returns its exit status, or −n if signal n ended it.

        Args:
            env: Further environment variables.
            spare: Bytes of address space that the child may take beyond what it has (RLIMIT_AS).
        """
        job = {"argv": argv, "fault": fault, "call": call, "kill_after": kill_after, "signal_after": signal_after}
        job |= {"env": env or {}, "spare": spare}
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write((json.dumps(job | {"cwd": str(cwd), "log": str(log)}) + "\n").encode())
        self._parent.stdin.flush()
        return int(json.loads(self._parent.stdout.readline())["status"])

    def close(self) -> None:
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait(timeout=20)


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


def _child(job: dict[str, Any]) -> None:
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])  # as `python -m burnish` has it
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from burnish import faults
    from burnish.cli.main import main

    torch.set_num_threads(1)
    faults._SPEC, faults._ACTIVE = job["fault"], bool(job["fault"])
    if job["call"]:
        _kill_at_call(*job["call"].split(":"))
    os.environ.update(job["env"])
    if job["spare"] is not None:
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + job["spare"]
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    status = 1
    try:
        status = main(job["argv"])
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
        pid = os.fork()
        if pid == 0:
            _child(job)
        timers = []
        if job["kill_after"] is not None:
            timers.append(threading.Timer(job["kill_after"], os.kill, (pid, signal.SIGKILL)))
        if job["signal_after"] is not None:
            number, seconds = job["signal_after"]
            timers.append(threading.Timer(seconds, os.kill, (pid, number)))
        for timer in timers:
            timer.start()
        _, status = os.waitpid(pid, 0)
        for timer in timers:
            timer.cancel()
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    _serve()

"""A process that has the pretended device and everything imported, and forks a child for each command line.

Run as a module it reads one JSON job a line: {"argv": […], "probe": name in `probes` | "", "fault": "point:n:action" | "",
"device": "cuda" | "cpu", "cwd": folder, "log": file, "answer": file} and answers {"status": exit status or −signal}. The child
writes the waits that it counted, and what a probe returned, to `answer`.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import pkgutil
import subprocess
import sys
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.pretend_cuda.build import build_guard

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Outcome:
    """What became of a command line or probe.

    Attributes:
        status: Exit status, or −signal.
        waits: See `device.Waits`.
        output: What it printed.
        value: What the probe returned.
    """

    status: int
    waits: Counter[tuple[str, str, int, str, str]]
    output: str
    value: Any = None


class PretendServer:
    """Starts the process and hands it jobs."""

    def __init__(self) -> None:
        env = os.environ | {
            "BURNISH_TESTING": "1",
            "PYTHONPATH": os.pathsep.join((str(ROOT / "src"), str(ROOT))),
            "OMP_NUM_THREADS": "1",
            "TERM": "dumb",
        }
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.pretend_cuda.server", str(build_guard())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
            cwd=ROOT,
        )

    def run(self, argv: list[str], folder: Path, *, device: str = "cuda", fault: str = "") -> Outcome:
        """Run `burnish argv` in `folder`, in a fresh child.

        Args:
            device: "cuda": the pretended one; "cpu".
        """
        return self._do({"argv": argv, "probe": "", "fault": fault, "device": device}, folder)

    def probe(self, name: str, folder: Path) -> Outcome:
        """Call a function of `probes` on the pretended device, in a fresh child."""
        return self._do({"argv": [], "probe": name, "fault": "", "device": "cuda"}, folder)

    def _do(self, job: dict[str, Any], folder: Path) -> Outcome:
        folder.mkdir(parents=True, exist_ok=True)
        log, answer = folder / "output.txt", folder / "answer.json"
        answer.unlink(missing_ok=True)
        job |= {"cwd": str(folder), "log": str(log), "answer": str(answer)}
        assert self._parent.stdin and self._parent.stdout
        self._parent.stdin.write((json.dumps(job) + "\n").encode())
        self._parent.stdin.flush()
        status = int(json.loads(self._parent.stdout.readline())["status"])
        found = json.loads(answer.read_text()) if answer.exists() else {"waits": [], "value": None}
        waits = Counter({tuple(key): count for key, count in found["waits"]})
        return Outcome(status, waits, log.read_text(errors="replace"), found["value"])

    def close(self) -> None:
        """End the process."""
        assert self._parent.stdin
        self._parent.stdin.close()
        self._parent.wait()


def _child(job: dict[str, Any]) -> None:
    os.chdir(job["cwd"])
    sys.path.insert(0, job["cwd"])
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    import torch

    from burnish import faults
    from burnish.cli.main import main
    from tests.pretend_cuda.device import pretend_cuda

    torch.set_num_threads(1)
    faults._SPEC, faults._ACTIVE = job["fault"], bool(job["fault"])
    status, value = 1, None
    try:
        with pretend_cuda() if job["device"] == "cuda" else contextlib.nullcontext() as waits:
            if job["probe"]:
                value = getattr(importlib.import_module("tests.pretend_cuda.probes"), job["probe"])(waits)
                status = 0
            else:
                try:
                    status = main(job["argv"])
                except SystemExit as stop:
                    status = stop.code if isinstance(stop.code, int) else 1
        found = {"waits": list(waits.found.items()) if waits else [], "value": value}
        Path(job["answer"]).write_text(json.dumps(found))
    except Exception:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _serve(guard: str) -> None:
    ctypes.CDLL(guard, mode=ctypes.RTLD_GLOBAL)  # before torch, which asks once whether there are CUDA hooks
    import burnish

    for module in pkgutil.walk_packages(burnish.__path__, "burnish."):
        if not module.name.endswith(("__main__", "wandb_sink", "tensorboard_sink")):
            importlib.import_module(module.name)
    import peft  # noqa: F401
    from transformers import AutoModelForCausalLM, Qwen3ForCausalLM, Qwen3ForSequenceClassification  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        pid = os.fork()
        if pid == 0:
            _child(job)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])

"""Training steps on a CUDA device: burnish against TRL at its best, on a random model of Qwen3-0.6B's shape.

Rows have the lengths of HH dialogues. For each method both sides run in processes of their own, in turn; the last line is JSON:
tokens a second (of the rows, without padding), peak memory of the device, and the share of the device's own rate of products
that the useful operations reach (`flops.py`). Without a CUDA device it says so and ends with status 0.

    python benchmarks/gpu.py                          # about 6 minutes
    python benchmarks/gpu.py --plan                   # what would run
    python benchmarks/gpu.py --device cpu --tiny      # a trial of the script itself; its figures mean nothing
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from flops import compute_useful_flops, measure_matmul_peak
from peer_trl import build_arguments, run_trl
from workload import Plan, Shape, load_workload, save_workload

METHODS = ("sft", "dpo", "reward")
SIDES = ("burnish", "trl")
QWEN3_06B = Shape(28, 1024, 16, 8, 128, 3072, 151_936)
TINY = Shape(1, 32, 2, 1, 16, 64, 512)
WARMUP = 3
LIMIT_S = 150  # of one worker; six of them and the preparation stay under 8 minutes on the devices this is meant for


def build_plan(method: str, device: str, *, tiny: bool) -> Plan:
    """What both sides do for a method."""
    plan = Plan(method, batch_size=64, warmup_steps=WARMUP, device=device, shape=QWEN3_06B)
    return replace(plan, batch_size=4, warmup_steps=1, shape=TINY, precision="fp32") if tiny else plan


def count_rows(plan: Plan, steps: int) -> int:
    """Rows of the timed steps and of those before."""
    return (plan.warmup_steps + steps) * plan.batch_size


def write_rows(file: Path, count: int, seed: int, longest: int) -> Path:
    """Made-up dialogues with HH's lengths: prompts of 117 words on average, answers of 44, both log-normal."""
    draw = random.Random(seed)

    def text(mean: float, spread: float) -> str:
        length = min(max(int(draw.lognormvariate(mean, spread)), 2), longest)
        return " ".join(draw.choice(WORDS) for _ in range(length))

    rows = []
    for number in range(count):
        prompt = f"\n\nHuman: {text(4.4, 0.85)} {number}\n\nAssistant:"
        rows.append(
            {key: f"{prompt} {text(3.4, 0.85)} {mark}" for key, mark in (("chosen", "yes"), ("rejected", "no"))}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


WORDS = [a + b + c for a in ("ba", "ko", "li", "mu", "ne", "ra", "su", "to") for b in "aeiou" for c in "lnrst"]


def run_worker(side: str, folder: Path) -> dict[str, Any]:
    """Train once; figures of the timed steps. Runs in a process of its own."""
    import torch

    plan, pairs = load_workload(folder)
    if plan.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    if side == "burnish":
        from side_burnish import run_burnish

        found = run_burnish(plan, pairs, folder)
    else:
        found = run_trl(plan, pairs, folder, "tuned")
    timed = pairs[plan.warmup_steps * plan.batch_size :]
    answers = 1 if plan.method == "sft" else 2
    tokens = sum(len(p.prompt_ids) + len(p.chosen_ids) + (answers - 1) * len(p.rejected_ids) for p in timed)
    peak = measure_matmul_peak(plan.precision, 8192 if plan.device == "cuda" else 256, device=plan.device)
    return {
        "losses": found["losses"],
        "seconds": round(found["seconds"], 4),
        "tokens_per_second": round(tokens / found["seconds"], 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if plan.device == "cuda" else None,
        "share_of_peak": round(compute_useful_flops(timed, plan) / found["seconds"] / peak, 4),
        "matmul_peak": peak,
    }


def run_method(plan: Plan, sides: list[str], steps: int) -> dict[str, Any]:
    """Both sides of a method, each in a process of its own."""
    row: dict[str, Any] = {"method": plan.method}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        count = count_rows(plan, steps)
        longest = 20 if plan.shape == TINY else 700
        data = write_rows(folder / "rows.jsonl", 2 * count, plan.seed, longest)
        row |= save_workload(folder, plan, data, count, 2048)
        for side in sides:
            row[side] = start_worker(side, folder)
    if all("tokens_per_second" in row.get(side, {}) for side in SIDES):
        row["ratio"] = round(row["burnish"]["tokens_per_second"] / row["trl"]["tokens_per_second"], 3)
        if row["trl"]["peak_bytes"]:
            row["memory_ratio"] = round(row["trl"]["peak_bytes"] / row["burnish"]["peak_bytes"], 3)
        row["loss_max_abs_diff"] = max(
            abs(a - b) for a, b in zip(row["burnish"]["losses"], row["trl"]["losses"], strict=False)
        )
    return row


def start_worker(side: str, folder: Path) -> dict[str, Any]:
    """A worker's figures, or why there are none."""
    out = folder / f"{side}.json"
    command = [sys.executable, __file__, "--worker", side, "--folder", str(folder), "--out", str(out)]
    start = time.monotonic()
    try:
        subprocess.run(command, check=True, timeout=LIMIT_S, stdout=subprocess.DEVNULL)
    except (subprocess.SubprocessError, OSError) as error:
        return {"failed": str(error)[:300]}
    return json.loads(out.read_text()) | {"worker_s": round(time.monotonic() - start, 1)}


def describe(plans: list[Plan], sides: list[str], steps: int) -> dict[str, Any]:
    """What would run, without loading anything."""
    return {
        "steps": steps,
        "sides": sides,
        "flash_attention": find_spec("flash_attn") is not None,
        "plans": [asdict(plan) | {"rows": count_rows(plan, steps)} for plan in plans],
        "trl": {p.method: build_arguments(p, "tuned", Path("out")) for p in plans} if "trl" in sides else {},
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    parser.add_argument("--steps", type=int, default=20, help="timed optimizer steps")
    parser.add_argument("--tiny", action="store_true", help="a tiny model: tries the script")
    parser.add_argument("--plan", action="store_true", help="print what would run")
    for hidden in ("--worker", "--folder", "--out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    if arguments.worker:
        Path(arguments.out).write_text(json.dumps(run_worker(arguments.worker, Path(arguments.folder))))
        return 0
    sides = list(SIDES) if arguments.peer == "trl" else ["burnish"]
    plans = [build_plan(method, arguments.device, tiny=arguments.tiny) for method in arguments.methods]
    if arguments.plan:
        print(json.dumps(describe(plans, sides, arguments.steps)))
        return 0
    import torch

    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device here: nothing was measured")
        return 0
    device = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    rows = [run_method(plan, sides, arguments.steps) for plan in plans]
    print(json.dumps({"device": device, "torch": torch.__version__, "tiny": arguments.tiny, "rows": rows}))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Time and memory of training steps: burnish against TRL on the same rows, model, precision and optimizer.

    python benchmarks/train_step.py --method dpo --setting full,lora,top_k,padded --peer trl --json

Every measurement is a fresh process of this script (`--worker`), the sides in turn (A B C A B C …). The last line of
standard output is one JSON object a method; progress goes to standard error. What the figures mean: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from disturbance import Disturbance, is_disturbed
from workload import SETTINGS, Plan, Shape, find_data, load_workload, save_workload

METHODS = ("dpo", "reward", "sft", "kto", "orpo")
SIDES = {"burnish": "burnish", "defaults": "trl", "tuned": "trl", "accumulated": "trl"}
STARTED = time.perf_counter()


def run_prepare(out: Path, folder: Path) -> None:
    """Write the workload in this process; `out` holds the order and gets the facts."""
    order = json.loads(out.read_text(encoding="utf-8"))
    plan = Plan(**{**order["plan"], "shape": Shape(**order["plan"]["shape"])})
    facts = save_workload(folder, plan, Path(order["data"]), order["rows"], order["max_length"])
    out.write_text(json.dumps(facts), encoding="utf-8")


def prepare(folder: Path, plan: Plan, data: Path, rows: int, max_length: int) -> dict[str, Any]:
    """Write the workload below `folder` in a process of its own.

    This process must stay small: Linux carries the peak size of a parent over to the children that it starts.
    """
    out = folder / "order.json"
    order = {"plan": asdict(plan), "data": str(data), "rows": rows, "max_length": max_length}
    out.write_text(json.dumps(order), encoding="utf-8")
    start_worker(Path(__file__), ["--worker", "prepare", "--folder", str(folder), "--out", str(out)])
    return json.loads(out.read_text(encoding="utf-8"))


def run_worker(side: str, mode: str, setting: str, folder: Path, out: Path, profile: Path | None) -> None:
    """One measurement in this process: figures go to `out`."""
    import resource

    import torch
    from flops import compute_useful_flops, measure_matmul_peak

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    plan, pairs = load_workload(folder)
    plan = replace(plan, setting=setting)
    watch = Disturbance()
    if side == "burnish":
        from side_burnish import run_burnish

        found = run_burnish(plan, pairs, folder, profile)
    else:
        from peer_trl import run_trl

        found = run_trl(plan, pairs, folder, mode)
    found["others"] = watch.share()
    scale = 1024.0**2 if sys.platform != "darwin" else 1024.0**3
    found["gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
    found["matmul_peak"] = measure_matmul_peak(plan.precision)
    timed = pairs[plan.warmup_steps * plan.batch_size :]
    known = setting in ("full", "padded") and plan.method in ("dpo", "reward", "sft")
    useful = compute_useful_flops(timed, plan) if known else None
    found["peak_share"] = useful and useful / found["seconds"] / found["matmul_peak"]
    found["busy"] = found["cpu_seconds"] / found["seconds"] / torch.get_num_threads()
    out.write_text(json.dumps(found), encoding="utf-8")


def measure(side: str, folder: Path, setting: str = "full", profile: Path | None = None) -> dict[str, Any]:
    """Run one worker process for `side` (a key of SIDES) and return its figures; once more if it was disturbed."""
    for again in (False, True):
        out = folder / "result.json"
        out.unlink(missing_ok=True)
        words = ["--worker", SIDES[side], "--peer-mode", side, "--setting", setting]
        words += ["--folder", str(folder), "--out", str(out)]
        if profile:
            words += ["--profile-out", str(profile)]
        start_worker(Path(__file__), words)
        found = json.loads(out.read_text(encoding="utf-8"))
        share = "" if found["peak_share"] is None else f", peak share {found['peak_share']:.2f}"
        note(
            f"  {side}, {setting}: {found['seconds']:.2f} s ({found['cpu_seconds']:.1f} s of processor, "
            f"busy {found['busy']:.2f}), {found['gb']:.2f} GB{share}"
        )
        if not is_disturbed(found["others"]):
            break
        what = "it is marked" if again else "measured once more"
        note(f"  DISTURBED: other programs used {100 * found['others']:.0f} % of the machine: {what}")
    return found


def start_worker(script: Path, words: list[str]) -> None:
    """Run `script` with these arguments in a process of its own, with a fixed number of threads."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(os.cpu_count() or 1)
    environment = dict(os.environ, PYTHONWARNINGS="ignore", OMP_NUM_THREADS=threads, MKL_NUM_THREADS=threads)
    command = [sys.executable, str(script), *words]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        sys.stderr.write(done.stdout[-4000:] + done.stderr[-8000:])
        raise SystemExit(f"the worker ({' '.join(words[:4])}) ended with status {done.returncode}")


def describe_machine() -> dict[str, Any]:
    """Processor, versions and commit of the measurement."""
    from importlib.metadata import PackageNotFoundError, version

    def find_version(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    root = Path(__file__).resolve().parents[1]
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True, check=False
    )
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else None,
        "commit": commit.stdout.strip() or None,
        **{name: find_version(name) for name in ("torch", "transformers", "trl")},
    }


def note(text: str) -> None:
    """A line of progress, with the minutes since the start."""
    print(f"{(time.perf_counter() - STARTED) / 60:5.1f} min  {text}", file=sys.stderr, flush=True)


def check_trainable(plan: Plan, runs: dict[str, list[dict[str, Any]]]) -> None:
    """Raise unless all sides train equally many parameters."""
    counts = {side: found[0]["trainable"] for side, found in runs.items() if found}
    if len(set(counts.values())) > 1:
        raise SystemExit(f"{plan.method}, {plan.setting}: the sides train different parameters: {counts}")


def compute_row(plan: Plan, runs: dict[str, list[dict[str, Any]]], facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON object of one method and setting: medians, ratios peer ÷ burnish, agreement of losses.

    TRL tuned is the faster of its two variants (all rows at once, or a quarter of them at a time).
    """
    check_trainable(plan, runs)
    runs = dict(runs)
    variants = [side for side in ("tuned", "accumulated") if runs.get(side)]
    if variants:
        best = min(variants, key=lambda side: statistics.median(r["seconds"] for r in runs[side]))
        runs["tuned"], variant = runs[best], best
    else:
        variant = None

    def median(side: str, key: str) -> float | None:
        values = [r[key] for r in runs.get(side, [])]
        return statistics.median(values) if values and None not in values else None

    def ratio(side: str, key: str) -> float | None:
        ours, theirs = median("burnish", key), median(side, key)
        return round(theirs / ours, 3) if ours and theirs else None

    def difference(side: str) -> float | None:
        if not runs.get(side) or not runs.get("burnish") or not runs[side][0]["losses"]:
            return None
        ours, theirs = runs["burnish"][0]["losses"], runs[side][0]["losses"]
        assert len(ours) == len(theirs), (len(ours), len(theirs))
        return max(abs(a - b) for a, b in zip(ours, theirs, strict=True))

    def rounded(value: float | None) -> float | None:
        return None if value is None else round(value, 4)

    main = "defaults" if runs.get("defaults") else "tuned"
    row: dict[str, Any] = {
        "method": plan.method,
        "setting": plan.setting,
        "time_ratio": ratio("defaults", "seconds"),
        "memory_ratio": ratio("defaults", "gb"),
        "time_ratio_tuned": ratio("tuned", "seconds"),
        "memory_ratio_tuned": ratio("tuned", "gb"),
        "burnish_s": rounded(median("burnish", "seconds")),
        "peer_s": rounded(median("defaults", "seconds")),
        "peer_tuned_s": rounded(median("tuned", "seconds")),
        "burnish_gb": rounded(median("burnish", "gb")),
        "peer_gb": rounded(median("defaults", "gb")),
        "peer_tuned_gb": rounded(median("tuned", "gb")),
        "cpu_time_ratio": ratio("defaults", "cpu_seconds"),
        "cpu_time_ratio_tuned": ratio("tuned", "cpu_seconds"),
        "tuned_variant": variant,
        "trainable": runs["burnish"][0]["trainable"] if runs.get("burnish") else None,
        "disturbed": [side for side in runs if any(is_disturbed(r["others"]) for r in runs[side])],
        "busy": {side: rounded(median(side, "busy")) for side in runs},
        "loss_max_abs_diff": difference(main),
        "loss_first": runs["burnish"][0]["losses"][0] if runs.get("burnish") else None,
        "matmul_peak_share": rounded(median("burnish", "peak_share")),
        "matmul_peak_tflops": rounded((median("burnish", "matmul_peak") or 0.0) / 1e12),
        "peer_matmul_peak_share": rounded(median("defaults", "peak_share")),
        "precision": plan.precision,
        "batch_size": plan.batch_size,
        "warmup_rows": plan.warmup_steps * plan.batch_size,
        "threads": int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1)),
        "runs": {side: [rounded(r["seconds"]) for r in found] for side, found in runs.items()},
    }
    return row | facts | describe_machine()


def choose_sides(arguments: argparse.Namespace, setting: str) -> list[str]:
    """The sides of one setting; the peer has no padded backend of its own, it always pads."""
    sides = [] if arguments.peer_only else ["burnish"]
    if arguments.peer == "trl" and setting != "padded":
        tuned = ["tuned", "accumulated"]
        sides += {"tuned": tuned, "both": ["defaults", *tuned]}.get(arguments.peer_mode, [arguments.peer_mode])
    return sides


def run_sides(folder: Path, sides: list[str], setting: str, alternations: int) -> dict[str, list[dict[str, Any]]]:
    """The sides in turn; of the two tuned variants only the faster is measured more than once."""
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for turn in range(alternations):
        for side in sides:
            other = {"tuned": "accumulated", "accumulated": "tuned"}.get(side)
            slower = turn and other in runs and runs[other][0]["seconds"] < runs[side][0]["seconds"]
            if not slower:
                runs[side].append(measure(side, folder, setting))
    return runs


def run_method(plan: Plan, settings: list[str], arguments: argparse.Namespace, data: Path) -> None:
    """All measurements of one method; prints a JSON object a setting."""
    with tempfile.TemporaryDirectory(prefix="burnish-bench-") as name:
        folders: dict[bool, tuple[Path, dict[str, Any]]] = {}
        peers: dict[str, list[dict[str, Any]]] = {}
        rows = arguments.rows + plan.warmup_steps * plan.batch_size
        for setting in settings:
            tied = setting != "top_k"
            current = replace(plan, setting=setting, shape=replace(plan.shape, tied=tied))
            if tied not in folders:
                folder = Path(name) / ("tied" if tied else "untied")
                folder.mkdir()
                folders[tied] = folder, prepare(folder, current, data, rows, arguments.max_length)
            folder, facts = folders[tied]
            note(f"{plan.method}, {setting}: {facts}")
            runs = run_sides(folder, choose_sides(arguments, setting), setting, arguments.alternations)
            if setting == "full":
                peers = {side: found for side, found in runs.items() if side != "burnish"}
            elif setting == "padded":
                runs |= peers
            print(json.dumps(compute_row(current, runs, facts)), flush=True)
        if arguments.profile:
            folder = next(iter(folders.values()))[0]
            table = folder / "profile.txt"
            measure("burnish", folder, settings[0], table)
            print(table.read_text(encoding="utf-8"))


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[*METHODS, "all"], default="dpo")
    parser.add_argument("--setting", default="full", help=f"one or more of {','.join(SETTINGS)}, or all")
    parser.add_argument("--peer", choices=["trl", "none"], default="trl")
    parser.add_argument("--peer-mode", choices=["both", *SIDES], default="both")
    parser.add_argument("--peer-only", action="store_true", help="measure the peer alone")
    parser.add_argument("--data", help="HH rows (chosen/rejected), .jsonl or .jsonl.gz")
    parser.add_argument("--rows", type=int, default=40, help="timed rows (a multiple of the batch size)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=1024, help="rows with more tokens are left out")
    parser.add_argument("--alternations", type=int, default=2)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, help="threads of each side (default: all processors)")
    parser.add_argument("--json", action="store_true", help="accepted for clarity: the last line always is JSON")
    parser.add_argument("--profile", action="store_true", help="one more burnish run, under the profiler")
    for hidden in ("--worker", "--folder", "--out", "--profile-out"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    return parser


def main() -> int:
    arguments = build_parser().parse_args()
    if arguments.worker == "prepare":
        run_prepare(Path(arguments.out), Path(arguments.folder))
        return 0
    if arguments.worker:
        profile = Path(arguments.profile_out) if arguments.profile_out else None
        folder, out = Path(arguments.folder), Path(arguments.out)
        run_worker(arguments.worker, arguments.peer_mode, arguments.setting, folder, out, profile)
        return 0
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    if arguments.rows % arguments.batch_size:
        raise SystemExit(f"--rows {arguments.rows} is not a multiple of --batch-size {arguments.batch_size}")
    settings = list(SETTINGS) if arguments.setting == "all" else arguments.setting.split(",")
    if not set(settings) <= set(SETTINGS):
        raise SystemExit(f"--setting {arguments.setting}: use {', '.join(SETTINGS)} or all")
    data = find_data(arguments.data)
    base = Plan(
        method="dpo",
        batch_size=arguments.batch_size,
        precision=arguments.precision,
        seed=arguments.seed,
        shape=Shape(layers=arguments.layers),
    )
    methods = METHODS if arguments.method == "all" else (arguments.method,)
    for method in methods:
        run_method(replace(base, method=method), settings, arguments, data)
    return 0


if __name__ == "__main__":
    sys.exit(main())

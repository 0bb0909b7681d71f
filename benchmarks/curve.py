"""The cost curve of a training step: time a token and memory against pairs a step, and time against the rows' shape.

    python benchmarks/curve.py --part pairs --out benchmarks/results/curve.json
    python benchmarks/curve.py --part rows --out benchmarks/results/curve.json

Every point is a process of its own. The method is DPO with the reference's log-probs ready (a column of zeros: only the cost
matters), at a fixed token budget. `benchmarks/results_table.py` draws the figure and writes the table.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from disturbance import Disturbance, is_disturbed
from train_step import describe_machine, note, prepare, start_worker
from workload import Pair, Plan, choose_pairs, find_data, load_workload

PAIRS = (2, 4, 8, 16, 32, 64)
ROWS = ("any", "short_prompts", "long_prompts", "even", "uneven")
ROW_NAMES = {
    "any": "a random sample",
    "short_prompts": "short prompts",
    "long_prompts": "long prompts",
    "even": "even lengths",
    "uneven": "uneven lengths",
}
POOL = 1000  # rows of the file from which every point chooses
TIMED = 64  # pairs that every point of the pairs axis trains on, the same ones
BUDGET = 2048  # tokens of a micro-batch


def run_point(folder: Path, plan: Plan, timed: int, out: Path) -> None:
    """Train on `timed` pairs in this process and write seconds, tokens and peak memory to `out`."""
    import resource

    import torch
    from side_burnish import build_groups, train_groups

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    _, pool = load_workload(folder)
    pairs = choose_pairs(pool, plan, timed)
    groups = build_groups(plan, pairs, reference=0.0)
    train_groups(replace(plan, batch_size=8), groups[:8], folder)  # buffers, kernels, files
    disturbance = Disturbance()
    watch = train_groups(plan, groups, folder)
    others = disturbance.share()
    first = len(watch.ends) > 1  # with several steps the first one is left out: it allocates the optimizer's moments
    seconds = watch.ends[-1] - (watch.ends[0] if first else watch.start)
    cpu = watch.cpu[-1] - (watch.cpu[0] if first else watch.start_cpu)
    counted = groups[plan.batch_size :] if first else groups
    scale = 1024.0**2 if sys.platform != "darwin" else 1024.0**3
    found = {
        "seconds": seconds,
        "steps": len(watch.ends) - first,
        "tokens": sum(g.tokens for g in counted),
        "padded_tokens": count_padded(pairs[plan.batch_size :] if first else pairs, plan.batch_size),
        "gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale,
        "others": others or 0.0,
        "busy": cpu / seconds / torch.get_num_threads(),
    }
    out.write_text(json.dumps(found), encoding="utf-8")


def count_padded(pairs: list[Pair], batch_size: int) -> int:
    """Tokens of the rectangles that a padded trainer would compute for these pairs, `batch_size` at a time."""
    steps = [pairs[i : i + batch_size] for i in range(0, len(pairs), batch_size)]
    return sum(2 * len(step) * max(p.longest for p in step) for step in steps)


def measure_point(folder: Path, axis: str, label: str, plan: Plan, timed: int) -> dict[str, Any]:
    """One point in a process of its own."""
    out = folder / "point.json"
    words = ["--worker", plan.rows, "--pairs", str(plan.batch_size), "--timed", str(timed)]
    found: dict[str, Any] = {}
    for _ in range(2):
        start_worker(Path(__file__), [*words, "--folder", str(folder), "--out", str(out)])
        found = json.loads(out.read_text(encoding="utf-8"))
        note(
            f"{axis} {label}: {1000 * found['seconds'] / found['tokens']:.3f} ms a token, {found['gb']:.2f} GB, "
            f"busy {found['busy']:.2f}{' DISTURBED' if is_disturbed(found['others']) else ''}"
        )
        if not is_disturbed(found["others"]):
            break
    milliseconds, disturbed = 1000 * found["seconds"] / found["tokens"], is_disturbed(found["others"])
    point = {"axis": axis, "label": label, "ms_per_token": round(milliseconds, 4), "disturbed": disturbed}
    return point | {k: round(v, 4) for k, v in found.items()}


def measure_curve(data: Path, parts: list[str]) -> list[dict[str, Any]]:
    """All points of the parts."""
    base = Plan(method="dpo", micro_batch_tokens=BUDGET)
    found = []
    with tempfile.TemporaryDirectory(prefix="burnish-curve-") as name:
        folder = Path(name)
        note(f"prepared: {prepare(folder, base, data, POOL, 1024)}")
        if "pairs" in parts:
            for pairs in PAIRS:
                found.append(measure_point(folder, "pairs", str(pairs), replace(base, batch_size=pairs), TIMED))
        if "rows" in parts:
            for rows in ROWS:
                found.append(measure_point(folder, "rows", rows, replace(base, rows=rows), 32))
    return found


# ---- the figure and the table -------------------------------------------------------------------------------------


def fit_cost(points: list[dict[str, Any]]) -> tuple[float, float]:
    """(seconds a token, seconds a step): least squares of a step's seconds on its tokens, relative errors."""
    rows = [(p["tokens"] / p["steps"], p["seconds"] / p["steps"]) for p in points]
    weights = [1 / seconds**2 for _, seconds in rows]
    total = sum(weights)
    mean_t = sum(w * t for w, (t, _) in zip(weights, rows, strict=True)) / total
    mean_s = sum(w * s for w, (_, s) in zip(weights, rows, strict=True)) / total
    top = sum(w * (t - mean_t) * (s - mean_s) for w, (t, s) in zip(weights, rows, strict=True))
    slope = top / sum(w * (t - mean_t) ** 2 for w, (t, _) in zip(weights, rows, strict=True))
    return slope, mean_s - slope * mean_t


def draw_curve(found: dict[str, Any], path: Path) -> None:
    """Three panels: time a token, peak memory, and time against tokens for rows of different shapes."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams.update({"svg.hashsalt": "burnish", "font.size": 9, "axes.spines.top": False})
    matplotlib.rcParams.update({"axes.spines.right": False, "axes.titlesize": 9.5, "axes.titlelocation": "left"})
    from matplotlib import pyplot

    pairs = [p for p in found["points"] if p["axis"] == "pairs"]
    rows = [p for p in found["points"] if p["axis"] == "rows"]
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(10, 3.1), constrained_layout=True)
    blue, grey = "#1f5fa8", "#8a94a0"
    x = [int(p["label"]) for p in pairs]
    times = [p["ms_per_token"] for p in pairs]
    middle_time = statistics.median(times)
    left.axhspan(0.85 * middle_time, 1.15 * middle_time, color=grey, alpha=0.18, lw=0)
    left.plot(x, times, "o-", color=blue)
    left.set(title="ms a token (band: median ± 15 %)", xlabel="pairs a step", ylim=(0, 1.5 * max(times)))
    middle.plot(x, [p["gb"] for p in pairs], "o-", color=blue)
    middle.set(title="peak memory, GB", xlabel="pairs a step", ylim=(0, 1.5 * max(p["gb"] for p in pairs)))
    for axes in (left, middle):
        axes.set_xscale("log", base=2)
        axes.set_xticks(x, [str(n) for n in x])
    per_token = statistics.median(p["seconds"] / p["tokens"] for p in rows)
    reach = 1.3 * max(p["tokens"] for p in rows)
    right.plot([0, reach / 1000], [0, per_token * reach], color=grey, lw=1)
    for p, marker in zip(rows, "os^Dv", strict=False):
        right.plot([p["tokens"] / 1000], [p["seconds"]], marker, color=blue, label=ROW_NAMES[p["label"]])
    right.legend(loc="lower right", frameon=False, fontsize=8, handletextpad=0.2)
    right.set(title="seconds (line: in proportion)", xlabel="thousand tokens computed", xlim=(0, None), ylim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", facecolor="white", metadata={"Date": None})
    pyplot.close(figure)


def build_section(found: dict[str, Any]) -> str:
    """Two small tables."""
    pairs = [p for p in found["points"] if p["axis"] == "pairs"]
    rows = [p for p in found["points"] if p["axis"] == "rows"]
    lines = ["![Time a token, peak memory and time against tokens](images/cost-curve.svg)", ""]
    if pairs:
        slope, step = fit_cost(pairs)
        by = {int(p["label"]): p for p in pairs}
        middle = statistics.median(p["ms_per_token"] for p in pairs)
        far = max(abs(p["ms_per_token"] / middle - 1) for p in pairs)
        lines += [
            "| pairs a step | " + " | ".join(p["label"] for p in pairs) + " |",
            "|---" * (len(pairs) + 1) + "|",
            "| ms a token | " + " | ".join(f"{p['ms_per_token']:.2f}" for p in pairs) + " |",
            "| peak memory, GB | " + " | ".join(f"{p['gb']:.2f}" for p in pairs) + " |",
            "",
            f"The largest deviation from the median is {100 * far:.0f} %. A step costs {1000 * slope:.2f} ms a token and "
            f"{1000 * max(step, 0.0):.0f} ms whatever its size (the optimizer, mostly).",
        ]
        if 8 in by and 64 in by:
            lines[-1] += f" From 8 to 64 pairs the peak changes by {100 * (by[64]['gb'] / by[8]['gb'] - 1):+.0f} %."
    if rows:
        lines += [
            "",
            "| rows, 8 pairs a step | tokens computed | tokens of padded rectangles | seconds | ms a token |",
            "|---|---|---|---|---|",
        ]
        lines += [
            f"| {ROW_NAMES[p['label']]} | {p['tokens']:,.0f} | {p['padded_tokens']:,.0f} | {p['seconds']:.2f} "
            f"| {p['ms_per_token']:.2f} |"
            for p in rows
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=["pairs", "rows", "all"], default="all")
    parser.add_argument("--data", help="HH rows (chosen/rejected), .jsonl or .jsonl.gz")
    parser.add_argument("--threads", type=int, help="threads (default: all processors)")
    parser.add_argument("--out", type=Path, help="JSON file that keeps the points; those of this part are replaced")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    for hidden in ("--pairs", "--timed"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        plan = Plan(
            method="dpo", rows=arguments.worker, batch_size=arguments.pairs, micro_batch_tokens=BUDGET, warmup_steps=0
        )
        run_point(arguments.folder, plan, arguments.timed, arguments.out)
        return 0
    if arguments.threads:
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    parts = ["pairs", "rows"] if arguments.part == "all" else [arguments.part]
    points = measure_curve(find_data(arguments.data), parts)
    if arguments.out and arguments.out.exists():
        before = json.loads(arguments.out.read_text(encoding="utf-8"))["points"]
        points = [p for p in before if p["axis"] not in parts] + points
    text = json.dumps({"budget": BUDGET, **describe_machine(), "points": points}, indent=1)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())

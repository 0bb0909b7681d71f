"""Cost against batch size, prompt share, spread of lengths and depth: burnish at every point, TRL at the ends."""

from __future__ import annotations

import tempfile
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_step import measure, note, prepare
from workload import Plan


def build_points(base: Plan) -> list[tuple[str, str, Plan, bool]]:
    """(axis, label, plan, whether TRL is measured too)."""
    return [
        ("batch_size", "2", replace(base, batch_size=2, warmup_steps=4), True),
        ("batch_size", "8", base, False),
        ("batch_size", "16", replace(base, batch_size=16), True),
        ("batch_size", "32", replace(base, batch_size=32), False),
        ("prompt_share", "low", replace(base, rows="short_prompts"), True),
        ("prompt_share", "high", replace(base, rows="long_prompts"), True),
        ("spread", "even", replace(base, rows="even"), False),
        ("spread", "uneven", replace(base, rows="uneven"), False),
        ("layers", "4", replace(base, shape=replace(base.shape, layers=4)), True),
        ("layers", "16", replace(base, shape=replace(base.shape, layers=16)), True),
    ]


def run_curve(base: Plan, data: Path, arguments: Namespace) -> dict[str, Any]:
    """One measurement a point (no medians): seconds, memory, and ratios to TRL's defaults where it was measured."""
    found = []
    for axis, label, plan, ends in build_points(base):
        timed = max(16, plan.batch_size)
        with tempfile.TemporaryDirectory(prefix="burnish-curve-") as name:
            folder = Path(name)
            rows = timed + plan.warmup_steps * plan.batch_size
            facts = prepare(folder, plan, data, rows, arguments.max_length)
            note(f"{axis} {label}: {facts}")
            ours = measure("burnish", folder)
            point: dict[str, Any] = {
                "axis": axis,
                "label": label,
                "burnish_s_per_row": round(ours["seconds"] / timed, 4),
                "burnish_gb": round(ours["gb"], 3),
                "matmul_peak_share": round(ours["peak_share"], 3),
                "mean_prompt_tokens": facts["mean_prompt_tokens"],
                "mean_answer_tokens": facts["mean_answer_tokens"],
            }
            if ends and arguments.peer == "trl":
                theirs = measure("defaults", folder)
                point["peer_s_per_row"] = round(theirs["seconds"] / timed, 4)
                point["peer_gb"] = round(theirs["gb"], 3)
                point["time_ratio"] = round(theirs["seconds"] / ours["seconds"], 2)
                point["memory_ratio"] = round(theirs["gb"] / ours["gb"], 2)
        found.append(point)
    return {"method": base.method, "precision": base.precision, "points": found}

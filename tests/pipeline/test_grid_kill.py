"""SIGKILL in the middle of a grid, then the same command: the same bits in every cell as without it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from tests.forkserver import ForkServer
from tests.pipeline.test_grid import write_grid
from tests.pipeline.test_kill import describe_fault, run_until_done

# A fault point and its n-th passing, or the n-th call of a function; one run takes 4 steps of sft and 4 of each form.
FEW = [
    "update.after_optimizer:3",  # in the shared stage, under the first cell
    "update.after_optimizer:7 > burnish.pipeline.grid:link_stage:2:after",  # in the first cell; then as it is continued
    "update.after_optimizer:11",  # in the second cell
]
MANY = [
    "grid.next:1",
    "grid.next:2",
    "grid.link:1",
    "grid.link:2",
    "stage.started:1",
    "stage.recorded:1",
    "stage.recorded:2",
    "burnish.pipeline.grid:link_stage:1:before",
    "burnish.pipeline.reference:compute_reference_table:1:before",
    "burnish.pipeline.reference:compute_reference_table:1:after",
    "burnish.pipeline.comparison:write_json_file:1:before",
    "burnish.report.compare:write_file:1:before",
    "folder.rename:3",
    "folder.rename:6",
    "folder.manifest:2",
    "stage.started:3",
    "update.after_optimizer:5 > grid.next:1 > update.after_optimizer:6",
]


def digest(root: Path) -> dict[str, str]:
    """File → SHA-256: weights and metrics of all stages, each where it really lies."""
    files = [
        p for p in root.rglob("*") if p.name in ("model.safetensors", "metrics.jsonl") and "superseded" not in p.parts
    ]
    kept = [p for p in files if not any(q.is_symlink() for q in p.parents) and "checkpoint" not in p.parent.name]
    found = {p.relative_to(root).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in kept}
    rows = json.loads((root / "summary.json").read_text())["cells"]
    return found | {row["name"]: row["state"] for row in rows}


def check_kills(server: ForkServer, inputs: Path, tmp: Path, points: list[str]) -> None:
    def command(out: Path) -> list[str]:
        out.mkdir()
        stages = [
            {"kind": "sft", "data": str(inputs / "chat.jsonl")},
            {"name": "prefer", "init_from": "sft", "data": str(inputs / "pairs.jsonl")},
        ]
        changes = {"stages": stages, "max_steps": 4, "save_steps": 2, "precision": "fp32"}
        return ["run", str(write_grid(out, inputs, grid={"prefer": ["dpo", "ipo"]}, **changes))]

    run_until_done(server, command(tmp / "calm"), tmp / "calm", [{}])
    expected = digest(tmp / "calm/runs/small")
    assert len([name for name in expected if name.endswith("model.safetensors")]) == 3
    for index, point in enumerate(points):
        out = tmp / f"point-{index}"
        faults = [describe_fault(part) for part in point.split(" > ")]
        statuses = run_until_done(server, command(out), out, faults)
        assert statuses[:-1] == [-9] * len(faults), f"{point} was not reached: {statuses}"
        assert digest(out / "runs/small") == expected, point
        shutil.rmtree(out)


def test_r01_kills_in_a_grid(server, inputs, tmp_path):
    """R-01: killed in the shared stage, in a cell and between cells; continued by the same command: the same bits."""
    check_kills(server, inputs, tmp_path, FEW)


@pytest.mark.kill
def test_r01_many_kills_in_a_grid(server, inputs, tmp_path):
    """R-01: between cells, around links, the cache, the summary and the page."""
    check_kills(server, inputs, tmp_path, MANY)

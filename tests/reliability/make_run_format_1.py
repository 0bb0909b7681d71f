"""Made tests/reliability/run-format-1.tar.gz: a run folder of format 1, interrupted after step 6, with a tiny checkpoint.

    python -m tests.reliability.make_run_format_1 TARGET.tar.gz

Kept as the programs of that format wrote it; later programs must read it or refuse it. For a new format, make a new file
with the program as it is then, and keep the old one.
"""

from __future__ import annotations

import sys
import tarfile
import tempfile
from pathlib import Path

from burnish.artifacts.folder import FolderWriter
from burnish.artifacts.run_folder import RunFolder, save_stage
from tests.reliability.stages import build_job, fault

RESOLVED = {"name": "old", "model": "pocket", "seed": 5, "stages": [{"kind": "sft", "name": "sft", "max_steps": 10}]}


def build(root: Path) -> Path:
    """The run folder `root/old`: 01-sft interrupted, 02-sft done."""
    with RunFolder.open(root, "old", recipe_text="name: old\n", resolved=RESOLVED, command=["burnish", "run"]) as run:
        stage = run.stage_dir(1, "sft")
        job = build_job(stage, run_id=run.run_id, save_total_limit=1)
        job.trainable = {n: p for n, p in job.trainable.items() if "ln_f" in n}
        with fault("loop.after_step:7:raise"):
            from burnish.engine.loop import run_training

            try:
                run_training(job)
            except RuntimeError:
                save_stage(stage, {"state": "interrupted", "kind": "sft", "name": "sft", "key": "k", "settings": {}})
        done = run.stage_dir(2, "sft2")
        with FolderWriter(done / "final", kind="final", meta={"stage": "sft2", "steps": 10}) as writer:
            writer.write_json("config.json", {"model_type": "gpt2"})
        figures = {"steps": 10, "eval": {"eval_loss": 1.5}}
        save_stage(done, {"state": "done", "kind": "sft", "name": "sft2", "key": "k", "figures": figures})
        run.finish("interrupted", seconds=1.5, exit_code=143)
    (root / "old" / ".lock").unlink()
    return root / "old"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder, tarfile.open(sys.argv[1], "w:gz") as archive:
        archive.add(build(Path(folder)), "old")

"""Which checkpoint is used (R-03) and which may go (R-19)."""

import os
import random
import shutil
import signal
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest

from burnish.artifacts.checkpoints import (
    checkpoint_writer,
    hold_checkpoint,
    list_checkpoints,
    newest_valid,
    prune,
    verify_checkpoint,
)
from burnish.artifacts.folder import PINNED, DamagedFolder, FolderWriter


def save(stage: Path, step: int, run_id: str = "r", name: str | None = None) -> Path:
    with checkpoint_writer(stage, step, meta={"run_id": run_id}) as w:
        w.write_bytes("model.safetensors", f"{run_id}{step}".encode() * 10)
    if name:
        (stage / f"checkpoint-{step}").rename(stage / name)
    return stage / (name or f"checkpoint-{step}")


def steps(stage: Path, **kw) -> list[int]:
    return [ref.step for ref in list_checkpoints(stage, **kw)]


def test_order_is_by_the_manifests_step_not_by_name_or_time(tmp_path):
    for step in (9, 100, 10):
        save(tmp_path, step)
    save(tmp_path, 50, name="checkpoint-7000")
    os.utime(tmp_path / "checkpoint-9", (2e9, 2e9))
    assert steps(tmp_path) == [9, 10, 50, 100]
    found, problems = newest_valid(tmp_path)
    assert found is not None and found.step == 100 and not problems


def test_r03_the_one_before_is_used_and_every_problem_is_a_line(tmp_path):
    for step in (1, 2, 3, 4, 5):
        save(tmp_path, step)
    (tmp_path / "checkpoint-5/manifest.json").unlink()
    (tmp_path / "checkpoint-4/model.safetensors").write_bytes(b"r4" * 9 + b"r5")
    (tmp_path / "checkpoint-3/model.safetensors").write_bytes(b"")
    found, problems = newest_valid(tmp_path)
    assert found is not None and found.step == 2
    assert [p.split(":")[0] for p in problems] == ["checkpoint-5", "checkpoint-4", "checkpoint-3"]
    assert all(p.endswith("checkpoint-2 is used instead") and "\n" not in p for p in problems)
    assert "no manifest.json" in problems[0] and "altered" in problems[1] and "0 bytes instead of 20" in problems[2]


def test_r03_with_none_left_the_problems_say_so(tmp_path):
    assert newest_valid(tmp_path) == (None, [])
    assert newest_valid(tmp_path / "absent") == (None, [])
    save(tmp_path, 1)
    (tmp_path / "checkpoint-1/model.safetensors").unlink()
    found, problems = newest_valid(tmp_path)
    assert found is None and problems == ["checkpoint-1: model.safetensors is missing; no earlier checkpoint is whole"]


def test_other_folders_are_not_checkpoints(tmp_path):
    save(tmp_path, 1)
    with FolderWriter(tmp_path / "final", kind="model", meta={"step": 9}) as w:
        w.write_bytes("a", b"")
    (tmp_path / ".tmp-checkpoint-8-aa").mkdir()
    (tmp_path / "checkpoint-9").symlink_to(tmp_path / "checkpoint-1")
    assert steps(tmp_path) == [1] and newest_valid(tmp_path)[1] == []
    with pytest.raises(DamagedFolder, match="a model folder"):
        verify_checkpoint(tmp_path / "final")


def test_r19_checkpoints_of_another_run_are_neither_used_nor_deleted(tmp_path):
    save(tmp_path, 1000, run_id="old")
    for step in (1, 2, 3):
        save(tmp_path, step, run_id="new")
    found, problems = newest_valid(tmp_path, run_id="new")
    assert found is not None and found.step == 3
    assert problems == ["checkpoint-1000: made by another run (old); checkpoint-3 is used instead"]
    assert prune(tmp_path, 1, set(), run_id="new") == [1, 2]
    assert steps(tmp_path) == [3, 1000]


def test_keep_zero_keeps_all_and_the_newest_always_stays(tmp_path):
    for step in range(1, 6):
        save(tmp_path, step)
    assert prune(tmp_path, 0, set()) == []
    (tmp_path / "checkpoint-1" / PINNED).touch()
    assert prune(tmp_path, 2, {3}, known_good=5) == [2]
    assert steps(tmp_path) == [1, 3, 4, 5]
    (tmp_path / "checkpoint-1" / PINNED).unlink()
    assert prune(tmp_path, 1, set()) == [1, 3, 4]


def test_a_deletion_that_is_interrupted_leaves_no_half_checkpoint(tmp_path, monkeypatch):
    from burnish.artifacts import checkpoints

    for step in (1, 2):
        save(tmp_path, step)

    def fault(name: str) -> bool:
        if name == "prune.remove":
            raise RuntimeError
        return False

    monkeypatch.setattr(checkpoints, "fault_point", fault)
    with pytest.raises(RuntimeError):
        prune(tmp_path, 1, set())
    assert steps(tmp_path) == [2] and newest_valid(tmp_path)[1] == []


@pytest.fixture
def fast_folder():
    """A folder in memory where there is one: this test makes tens of thousands of small files."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.mark.parametrize("seeds", [range(60), pytest.param(range(60, 560), marks=pytest.mark.slow)], ids=["60", "500"])
def test_r19_retention_over_random_histories(fast_folder, seeds):
    """Histories of saves, damage, clock changes, restores, pins, readers, other runs' folders, renames and prunes."""
    pool = fast_folder / "pool"
    pool.mkdir()
    for step in range(1, 15):
        save(pool, step)
    foreign = fast_folder / "foreign"
    foreign.mkdir()
    save(foreign, 1000, run_id="other")
    for seed in seeds:
        rng = random.Random(seed)
        stage = fast_folder / f"s{seed}"
        stage.mkdir()
        pinned: set[int] = set()
        damaged: set[int] = set()
        best = None
        strangers = 0
        readers: dict[int, ExitStack] = {}
        for step in range(1, rng.randint(3, 14)):
            shutil.copytree(pool / f"checkpoint-{step}", stage / f"checkpoint-{step}", copy_function=os.link)
            present = {r.step: r.path for r in list_checkpoints(stage, run_id="r")}
            action = rng.choice(
                ["pin", "best", "damage", "touch", "restore", "rename", "none", "read", "leave", "foreign"]
            )
            chosen = rng.choice(sorted(present))
            if action == "pin":
                (present[chosen] / PINNED).touch()
                pinned.add(chosen)
            elif action == "best":
                best = chosen
            elif action == "damage":
                bad = present[chosen] / "model.safetensors"
                size = bad.stat().st_size
                bad.unlink()
                bad.write_bytes(b"?" * size)
                damaged.add(chosen)
            elif action == "touch":
                when = rng.uniform(0, 4e9)
                for path in present.values():
                    os.utime(path, (when, when))
            elif action == "read" and chosen not in readers:
                readers[chosen] = ExitStack()
                readers[chosen].enter_context(hold_checkpoint(present[chosen]))
            elif action == "leave" and readers:
                readers.pop(rng.choice(sorted(readers))).close()
            elif action == "foreign":
                strangers += 1
                shutil.copytree(foreign / "checkpoint-1000", stage / f"checkpoint-{999 + strangers}")
            elif action == "restore" and chosen not in pinned | set(readers):
                shutil.rmtree(present[chosen])
                shutil.copytree(pool / f"checkpoint-{chosen}", present[chosen])
                damaged.discard(chosen)
            elif action == "rename":
                present[chosen].rename(stage / f"renamed-{rng.randint(0, 99)}-{chosen}")
            before = set(steps(stage, run_id="r"))
            good = before - damaged
            keep = rng.randint(1, 3)
            protect = {best} if best is not None else set()
            deleted = set(prune(stage, keep, protect, run_id="r"))
            after = set(steps(stage, run_id="r"))
            assert after == before - deleted
            assert not deleted & (pinned | protect | set(readers))
            assert len(steps(stage)) == len(after) + strangers, "another run's checkpoint went"
            if good:
                assert max(good) in after, "the newest good one went"
                found, _ = newest_valid(stage, run_id="r")
                assert found is not None and found.step == max(good)
                assert all(step < max(good) for step in deleted)
                below = sorted(
                    (s for s in after if s <= max(good) and s not in pinned | protect | set(readers)), reverse=True
                )
                assert len(below) <= keep
            else:
                assert not deleted
        for reader in readers.values():
            reader.close()
        shutil.rmtree(stage)


def test_r19_a_reader_that_dies_holds_nothing(tmp_path):
    """Another process reads checkpoint-1: it stays; the reader is killed: it goes."""
    for step in (1, 2):
        save(tmp_path, step)
    ready, told = os.pipe()
    pid = os.fork()
    if pid == 0:
        with hold_checkpoint(tmp_path / "checkpoint-1"):
            os.write(told, b".")
            signal.pause()
        os._exit(0)
    os.read(ready, 1)
    assert prune(tmp_path, 1, set()) == []
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert prune(tmp_path, 1, set()) == [1]
    os.close(ready), os.close(told)

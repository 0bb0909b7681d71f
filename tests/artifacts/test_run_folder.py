"""Run folders: layout (S1-08), another recipe's folder, secrets (R-29), old and new formats (R-39), listing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from burnish.artifacts import run_folder
from burnish.artifacts.folder import FolderWriter, NewerFormat
from burnish.artifacts.run_folder import (
    RunFolder,
    check_name,
    describe_differences,
    list_runs,
    load_run,
    load_stage,
    plain_name,
    save_stage,
    stage_folders,
)
from burnish.errors import ResourceError, UsageError

RESOLVED = {"name": "quick", "model": "pocket", "seed": 7, "stages": [{"kind": "sft"}, {"kind": "dpo", "beta": 0.1}]}


def open_run(root: Path, run: str = "r", **changes) -> RunFolder:
    resolved = {**RESOLVED, **changes}
    return RunFolder.open(
        root, run, recipe_text=yaml.safe_dump(resolved), resolved=resolved, command=["burnish", "run"]
    )


def test_s1_08_the_tree(tmp_path):
    with open_run(tmp_path / "runs") as run:
        stage = run.stage_dir(1, "sft")
        other = run.stage_dir(2, "dpo", model="org/gpt2")
        assert stage == tmp_path / "runs/r/01-sft" and stage.is_dir()
        assert other == tmp_path / "runs/r/org--gpt2/02-dpo"
        save_stage(stage, {"state": "done"})
        save_stage(other, {"state": "running"})
        names = {p.name for p in run.path.iterdir()}
        assert {"recipe.yaml", "resolved.yaml", "environment.json", "run.json"} <= names
        assert yaml.safe_load((run.path / "resolved.yaml").read_text()) == RESOLVED
        assert [p.relative_to(run.path).as_posix() for p in stage_folders(run.path)] == ["01-sft", "org--gpt2/02-dpo"]
        record = load_run(run.path)
        assert record["state"] == "running" and record["recipe"] == "quick" and record["starts"] == 1
        run.finish("done", seconds=1.5, exit_code=0)
    record = load_run(tmp_path / "runs/r")
    assert record["state"] == "done" and record["exit_code"] == 0 and record["seconds"] == 1.5


def test_opened_again_it_is_the_same_run(tmp_path):
    with open_run(tmp_path) as first:
        first.stage_dir(1, "sft")
        first.finish("failed", seconds=1, exit_code=4, error="numbers")
        assert first.fresh
    with open_run(tmp_path) as second:
        assert not second.fresh and second.run_id == first.run_id
        assert second.record["starts"] == 2 and second.record["state"] == "running"
        assert "error" not in second.record and "exit_code" not in second.record
        assert not (second.path / "superseded").exists()
    assert RunFolder.attach(tmp_path / "r").run_id == first.run_id


def test_a_changed_recipe_keeps_the_old_one(tmp_path):
    with open_run(tmp_path) as run:
        before = (run.path / "recipe.yaml").read_bytes()
    with open_run(tmp_path, seed=8) as run:
        assert (run.path / "superseded/recipe.yaml.1").read_bytes() == before
        assert yaml.safe_load((run.path / "resolved.yaml").read_text())["seed"] == 8
        assert yaml.safe_load((run.path / "superseded/resolved.yaml.1").read_text())["seed"] == 7


def test_another_recipes_folder_is_refused_with_the_difference(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(UsageError) as found:
        open_run(tmp_path, **{"name": "other", "stages": [{"kind": "sft"}]})
    text = str(found.value)
    assert found.value.exit_code == 2
    assert 'name: "quick" → "other"' in text and 'stages.1: {"kind": "dpo", "beta": 0.1} → (absent)' in text
    open_run(tmp_path).close()  # and the lock is free again


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/thesis.tex").write_text("mine")
    with pytest.raises(UsageError, match=r"thesis\.tex"):
        open_run(tmp_path)
    assert (tmp_path / "r/thesis.tex").read_text() == "mine"


@pytest.mark.parametrize("kept", [[], [".lock"], [".lock", "log.txt"], [".lock", "recipe.yaml"]])
def test_killed_before_run_json_it_starts_afresh(tmp_path, kept):
    (tmp_path / "r").mkdir()
    (tmp_path / "r/.tmp-run.json-00").write_text("{")
    for name in kept:
        (tmp_path / "r" / name).write_text("")
    with open_run(tmp_path) as run:
        assert run.fresh and run.notes
        assert not (run.path / ".tmp-run.json-00").exists()


def test_leftovers_of_a_stage_are_cleared(tmp_path):
    with open_run(tmp_path) as run:
        stage = run.stage_dir(1, "sft")
        (stage / ".tmp-checkpoint-3-ff").mkdir()
        run.stage_dir(1, "sft")
        assert not list(stage.iterdir()) and "checkpoint-3" in run.notes[-1]


def test_superseded_stages_are_numbered(tmp_path):
    with open_run(tmp_path) as run:
        for number in (1, 2, 3):
            stage = run.stage_dir(1, "sft", model="a/b")
            (stage / "mark").write_text(str(number))
            moved = run.supersede(stage)
            assert moved == run.path / f"superseded/a--b/01-sft.{number}" and not stage.exists()
            assert (moved / "mark").read_text() == str(number)
        assert run.supersede(stage) is None
        assert stage_folders(run.path) == []


def test_stage_records(tmp_path):
    assert load_stage(tmp_path) is None
    save_stage(tmp_path, {"state": "running", "key": "k", "inputs": {"data": "abc"}})
    assert load_stage(tmp_path) == {"format": 1, "state": "running", "key": "k", "inputs": {"data": "abc"}}
    with pytest.raises(ValueError):
        save_stage(tmp_path, {"state": "finished"})
    (tmp_path / "stage.json").write_text('{"format": 1')
    with pytest.raises(UsageError, match="damaged"):
        load_stage(tmp_path)


def test_r39_later_formats_are_refused_and_nothing_is_written(tmp_path):
    open_run(tmp_path).close()
    place = tmp_path / "r/run.json"
    place.write_text(json.dumps({**json.loads(place.read_text()), "format": 5, "burnish": "9.1"}))
    before = {p.name: p.read_bytes() for p in place.parent.iterdir() if p.name != ".lock"}
    with pytest.raises(NewerFormat, match=r"burnish 9\.1"):
        open_run(tmp_path)
    assert {p.name: p.read_bytes() for p in place.parent.iterdir() if p.name != ".lock"} == before
    assert "9.1" in list_runs(tmp_path)[0]["problem"]


def test_list_runs(tmp_path):
    assert list_runs(tmp_path / "absent") == []
    for name in ("one", "two"):
        with open_run(tmp_path, name) as run:
            save_stage(run.stage_dir(1, "sft"), {"state": "running"})
            rows = {r["name"]: r for r in list_runs(tmp_path)}
            assert rows[name]["state"] == "running" and rows[name]["holder"]["pid"] == os.getpid()
            if name == "one":
                run.finish("done", seconds=2, exit_code=0)
    (tmp_path / "notes").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/run.json").write_text("{")
    (tmp_path / "link").symlink_to(tmp_path / "one")
    rows = {r["name"]: r for r in list_runs(tmp_path)}
    assert set(rows) == {"one", "two", "broken"}
    assert rows["one"]["state"] == "done"
    assert rows["two"]["state"] == "interrupted"  # its record says running and nobody holds the lock
    assert rows["two"]["stages"] == [{"stage": "01-sft", "state": "interrupted"}]
    assert rows["broken"]["problem"]


@pytest.mark.parametrize(
    "name", ["", " ", ".", "..", "a/b", "a\\b", "-rf", ".hidden", "a\0b", "a\n", "x" * 201, "a.", "a:b"]
)
def test_names_that_cannot_be_runs(tmp_path, name):
    with pytest.raises(UsageError):
        open_run(tmp_path, name)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["ü 日本 'x' #1 %", "é", "é", "😀", "n" * 200, "a b"])
def test_r37_names_that_can(tmp_path, name):
    with open_run(tmp_path / "dir ü #", check_name(name)) as run:
        with FolderWriter(run.stage_dir(1, "sft") / "checkpoint-1", kind="checkpoint", meta={"step": 1}) as w:
            w.write_bytes("a", b"")
        assert [r["name"] for r in list_runs(tmp_path / "dir ü #")] == [name]


def test_plain_names():
    assert plain_name("org/model") == "org--model" and plain_name("../x") == "x" and plain_name("///") == "unnamed"
    assert len(plain_name("ü" * 300).encode()) <= 120


def test_differences():
    old = {"a": 1, "b": [1, {"c": 2}], "d": None, "same": 1}
    new = {"a": 1.5, "b": [1, {"c": 3}, 4], "e": "x", "same": 1}
    assert describe_differences(old, new) == [
        "a: 1 → 1.5",
        "b.1.c: 2 → 3",
        "b.2: (absent) → 4",
        "d: null → (absent)",
        'e: (absent) → "x"',
    ]
    many = describe_differences({}, {str(i): i for i in range(30)}, limit=20)
    assert len(many) == 21 and many[-1] == "… and 10 more"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError) as found:
        open_run(tmp_path / "file")
    assert found.value.exit_code == 5


def test_r29_no_secret_in_any_file(tmp_path, monkeypatch):
    secrets = {
        "HF_TOKEN": "hf_canaryCANARY0123456789canary",
        "WANDB_API_KEY": "0123456789abcdef0123456789abcdef01234567",
        "MY_SERVICE_PASSWORD": 'tricky"quote\\and ü',
    }
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    canaries = [*secrets.values(), "sk-canary0123456789ABC", "urlpass123"]
    text = f"""
name: quick
data: https://user:urlpass123@host/data.jsonl
api: sk-canary0123456789ABC
key: {secrets["WANDB_API_KEY"]}
odd: '{secrets["MY_SERVICE_PASSWORD"]}'
"""
    resolved = {**yaml.safe_load(text), "stages": [{"token": secrets["HF_TOKEN"], "api_key": "plainvalue99"}]}
    canaries.append("plainvalue99")
    command = ["burnish", "run", f"hf_token={secrets['HF_TOKEN']}"]
    with RunFolder.open(
        tmp_path, "r", recipe_text=text, resolved=resolved, command=command, environment={"note": canaries[3]}
    ) as run:
        save_stage(run.stage_dir(1, "sft"), {"state": "failed", "error": f"401 for {secrets['HF_TOKEN']}"})
        run.update(error=" ".join(canaries))
        run.finish("failed", seconds=1, exit_code=6, error=f"GET https://u:{canaries[4]}@h/x?token=abcdefgh1 failed")
    whole = b"".join(p.read_bytes() for p in run.path.rglob("*") if p.is_file())
    for canary in canaries[:-1]:
        for form in (canary, json.dumps(canary)[1:-1], yaml.safe_dump(canary).strip("'\"\n.")):
            assert form.encode() not in whole, form
    assert b"plainvalue99" not in whole and b"abcdefgh1" not in whole
    assert b"https://user:***@host/data.jsonl" in whole
    environment = json.loads((run.path / "environment.json").read_text())
    assert environment["packages"]["numpy"] and environment["cpus"] >= 1 and environment["python"]
    assert not set(environment["variables"]) & set(secrets)


def test_nothing_is_written_under_a_dead_lock(tmp_path, monkeypatch):
    """An error while opening frees the lock."""
    monkeypatch.setattr(run_folder, "describe_environment", lambda extra: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_run(tmp_path)
    monkeypatch.undo()
    open_run(tmp_path).close()


def test_imports_neither_torch_nor_needs_fcntl():
    code = """
import sys
for name in ("fcntl", "resource", "pwd", "msvcrt"):
    sys.modules[name] = None
import tempfile, pathlib
from burnish.artifacts import checkpoints, deletion, folder, lock, run_folder
from burnish.track import log, metrics, progress, signals, sinks
from burnish.report import html, terminal
assert not {"torch", "transformers", "rich", "matplotlib", "numpy"} & set(sys.modules)
root = pathlib.Path(tempfile.mkdtemp())
run = run_folder.RunFolder.open(root, "a", recipe_text="", resolved={"name": "x"})
assert lock.lock_holder(root / "a")
run.close()
run_folder.RunFolder.open(root, "a", recipe_text="", resolved={"name": "x"}).close()
deletion.delete_run(root, "a")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_remarks_stand_above_the_resolved_recipe_as_comments(tmp_path):
    with RunFolder.open(tmp_path, "r", recipe_text="", resolved={"name": "r"}, remarks=["a table:\n  x  1"]) as run:
        text = (run.path / "resolved.yaml").read_text(encoding="utf-8")
    assert text.startswith("# a table:\n#   x  1\n") and yaml.safe_load(text) == {"name": "r"}

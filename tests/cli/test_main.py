"""The command line: exit statuses, errors without tracebacks, suggestions."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from burnish import __version__
from burnish.cli.failure import report_failure
from burnish.cli.main import ORDER, main
from burnish.config.registry import ALIASES, KINDS
from burnish.errors import (
    BurnishError,
    ConfigError,
    DataError,
    InterruptedRun,
    NumericStop,
    ResourceError,
    ServiceError,
)


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("BURNISH_TRACEBACK", raising=False)


def test_help_says_what_each_short_name_adds(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for line in ("dpo with loss_type: ipo.", "dpo with loss_type: [sigmoid, sft].", "dpo with a reward_model."):
        assert line in text
    assert all(alias.describe() for alias in ALIASES.values())


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name in ORDER:
        assert f"\n  {name} " in text
    assert set(ORDER) >= {*KINDS, *ALIASES, "run", "data", "runs", "config", "doctor", "report"}
    assert main([]) == 0
    assert capsys.readouterr().out.strip() == text.strip()


@pytest.mark.parametrize("name", ORDER)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]):
    assert main([name, "--help"]) == 0
    assert f"burnish {name}" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"burnish {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["rnu", "x"], "did you mean run"),
        (["quickstart.yaml"], "write `burnish run quickstart.yaml`"),
        (["run"], "no recipe is named"),
        (["run", "a.yaml", "b.yaml"], "several recipes are named"),
        (["run", "quickstart", "--config", "a.yaml"], "several recipes are named"),
        (["run", "quickstat"], "did you mean quickstart"),
        (["run", "nowhere.yaml"], "there is no recipe 'nowhere.yaml'"),
        (["run", "quickstart", "--ouput-dir", "x"], "did you mean --output-dir"),
        (["run", "quickstart", "--lerning_rate", "3"], "did you mean --learning_rate"),
        (["run", "quickstart", "--learning_rate"], "needs a value"),
        (["run", "quickstart", "--resume", "--fresh"], "contradict"),
        (["run", "quickstart", "--after", "'"], "is not a command"),
        (["run", "quickstart", "--after", " "], "--after is empty"),
        (["run", "quickstart", "--num-processes", "0"], "num-processes"),
        (["run", "quickstart", "--model-index", "4"], "the recipe has 1 model"),
        (["run", "quickstart", "dpo.betta=3"], "did you mean beta"),
        (["sft", "--modle", "x"], "did you mean --model"),
        (["sft", "data.jsonl"], "write --data data.jsonl"),
        (["sft", "--model", "pocket"], "stages.sft.data: the stage has no data"),
        (["sft", "--no-shuffle=3", "--data", "x"], "takes no value"),
        (["sft", "--resume_from", "nowhere"], "there is no such checkpoint"),
        (["data", "check", "--for", "sft"], "no source is named"),
        (["data", "check", "a", "b", "--for", "sft"], "several sources"),
        (["data", "check", "a"], "--for"),
        (["data", "check", "gone.jsonl", "--for", "sft"], "there is no file or folder 'gone.jsonl'"),
        (["data", "chek"], "No such command"),
        (["config", "show"], "name one recipe"),
        (["config", "example", "ppo"], "ppo"),
        (["runs", "show", "x"], "there is no run 'x'"),
        (["runs", "delete", "..", "--yes", ".."], "there is no run '..'"),
        (["runs", "delete", "x", "--yes", "x"], "there is no run 'x'"),
        (["report", "x"], "there is no run 'x'"),
    ],
)
def test_wrong_usage_is_status_2(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert expected in err and "→" in err, err
    assert "Traceback" not in err and out == ""
    assert list(Path().iterdir()) == [], "nothing is written"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ConfigError("a", remedy="b", where="f:1"), 2, "error: f:1: a\n  → b"),
        (DataError("a", remedy="b"), 2, "a"),
        (NumericStop("a", remedy="b"), 4, "a"),
        (ResourceError("a", remedy="b"), 5, "a"),
        (ServiceError("a", remedy="b"), 6, "a"),
        (InterruptedRun("a", remedy="b", signum=15), 143, "a"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 5, "out of memory"),
        (OSError(errno.ENOSPC, "No space left on device", "/x/y"), 5, "/x/y: no space left"),
        (SystemExit(3), 3, ""),
        (SystemExit(), 0, ""),
    ],
)
def test_statuses(error: BaseException, status: int, said: str, capsys: pytest.CaptureFixture[str], monkeypatch):
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr("burnish.config.bundled.bundled_recipes", fail)
    assert main(["config", "recipes"]) == status
    err = capsys.readouterr().err
    assert said in err and "Traceback" not in err


def test_anything_else_is_status_1_with_a_traceback(capsys: pytest.CaptureFixture[str]):
    try:
        raise RuntimeError("odd")
    except RuntimeError as error:
        assert report_failure(error) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err and "error: RuntimeError: odd" in err and "report it" in err


@pytest.mark.parametrize("way", ["flag", "environment"])
def test_a_traceback_when_asked_for(way: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    if way == "environment":
        monkeypatch.setenv("BURNISH_TRACEBACK", "1")
    assert main(["run", "nowhere", *(["--verbose"] if way == "flag" else [])]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_device_out_of_memory(capsys: pytest.CaptureFixture[str]):
    class OutOfMemoryError(RuntimeError):
        """As torch names it."""

    assert report_failure(OutOfMemoryError("CUDA")) == 5
    assert "micro_batch_tokens" in capsys.readouterr().err


def test_a_closed_pipe_is_quiet(tmp_path: Path):
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "burnish", "config", "schema"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 141 and done.stderr == b""


def test_every_error_of_burnish_has_its_status():
    assert {cls.exit_code for cls in (BurnishError, ConfigError, NumericStop, ResourceError, ServiceError)} == {
        1,
        2,
        4,
        5,
        6,
    }


def test_json_of_config(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "show", "quickstart", "--json", "dpo.beta=0.2"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["sources"]["stages.dpo.beta"] == "command line"
    assert main(["config", "schema"]) == 0
    assert json.loads(capsys.readouterr().out)["title"] == "burnish recipe"


def test_config_recipes(capsys: pytest.CaptureFixture[str]):
    assert main(["config", "recipes"]) == 0
    assert "quickstart" in capsys.readouterr().out


def test_config_reference(tmp_path: Path):
    assert main(["config", "reference", "--output", str(tmp_path / "s.md")]) == 0
    assert (tmp_path / "s.md").read_text(encoding="utf-8").startswith("# Settings")


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secretsecretsecretsecret")
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert facts["problems"] == {} and facts["packages"]["torch"] and "torch threads" in facts["device"]
    assert facts["environment"]["HF_TOKEN"] == "set" and "hf_secret" not in out
    monkeypatch.setattr("burnish.cli.doctor.find_version", lambda name: None)
    assert main(["doctor"]) == 1
    assert "not installed" in capsys.readouterr().out


def test_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    from burnish.artifacts.run_folder import RunFolder, save_stage

    with RunFolder.open(tmp_path / "runs", "demo", recipe_text="", resolved={"name": "demo"}) as run:
        stage = run.stage_dir(1, "sft")
        save_stage(stage, {"state": "done", "figures": {"eval": {"eval_loss": 1.25}}})
        run.finish("done", seconds=1.5, exit_code=0)
    assert main(["runs", "list"]) == 0
    out = capsys.readouterr().out
    assert "demo" in out and "01-sft:done" in out
    assert main(["runs", "list", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["name"] == "demo"
    assert main(["runs", "show", "demo"]) == 0
    assert "eval.eval_loss                   1.25" in capsys.readouterr().out
    assert main(["runs", "show", "dmeo"]) == 2
    assert "did you mean demo" in capsys.readouterr().err
    assert main(["runs", "delete", "demo", "--yes", "dmo"]) == 2
    assert "nothing was deleted" in capsys.readouterr().err
    assert main(["runs", "delete", "demo", "--yes", "demo"]) == 0
    assert not (tmp_path / "runs" / "demo").exists()
    assert main(["runs", "list"]) == 0

"""`burnish run` and the stage verbs: what reaches the pipeline (S1-01, S4-04)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from burnish.cli.main import main
from burnish.cli.run import child_arguments
from burnish.config.keys import settings_class
from burnish.config.load import LoadedRecipe
from burnish.config.options import RunOptions
from burnish.config.registry import ALIASES, KINDS
from burnish.errors import NumericStop


class Pipeline:
    """Stands in for the pipeline: keeps what it was given."""

    def __init__(self) -> None:
        self.status: int | BaseException = 0
        self.loaded: LoadedRecipe | None = None
        self.options: RunOptions | None = None
        self.launched: tuple[list[str], int] | None = None

    def run_recipe(self, loaded: LoadedRecipe, options: RunOptions) -> int:
        self.loaded, self.options = loaded, options
        if isinstance(self.status, BaseException):
            raise self.status
        return self.status

    def launch(self, argv: Sequence[str], processes: int) -> int:
        self.launched = (list(argv), processes)
        return 0

    @property
    def stage(self) -> Any:
        """The first stage of the recipe that arrived."""
        assert self.loaded is not None
        return self.loaded.recipe.stages[0]


@pytest.fixture(autouse=True)
def pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK", "HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    double = Pipeline()
    for name in ("run", "launch"):
        module = ModuleType(f"burnish.pipeline.{name}")
        setattr(
            module,
            "run_recipe" if name == "run" else "launch",
            getattr(double, "run_recipe" if name == "run" else "launch"),
        )
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return double


def test_the_options_arrive(pipeline: Pipeline):
    arguments = "--model-index 0 --dry-run --output-dir out --run-name n --resume --allow-change lr --allow-change seed"
    assert main(["run", "quickstart", *arguments.split(), "--json", "--verbose"]) == 0
    assert pipeline.options == RunOptions(
        dry_run=True, model_index=0, resume=True, allow_change=("lr", "seed"), json=True, verbose=True
    )
    assert pipeline.loaded is not None
    assert (pipeline.loaded.recipe.output_dir, pipeline.loaded.run_name()) == ("out", "n")


def test_a_file_as_argument_or_option(pipeline: Pipeline, tmp_path: Path):
    folder = tmp_path / "a=b ü 'x' #1"
    folder.mkdir()
    path = folder / "r.yaml"
    path.write_text("model: m\nstages: [{kind: sft, data: d}]\n")
    assert main(["run", str(path), "seed=3"]) == 0
    assert pipeline.stage.seed == 3
    assert main(["run", "--config", str(path), "seed=4"]) == 0
    assert pipeline.stage.seed == 4
    assert pipeline.loaded is not None and pipeline.loaded.text.startswith("model: m")


@pytest.mark.parametrize(
    "words",
    [
        ["dpo.beta=0.05"],
        ["stages.dpo.beta=0.05"],
        ["--dpo.beta", "0.05"],
        ["--dpo.beta=0.05"],
        ["--stages.dpo.beta", "0.05"],
        ["--beta", "0.05"],
        ["--", "dpo.beta=0.05"],
    ],
)
def test_settings_on_the_command_line(pipeline: Pipeline, words: list[str]):
    assert main(["run", "quickstart", *words]) == 0
    assert pipeline.loaded is not None
    assert pipeline.loaded.recipe.stage("dpo").beta == 0.05  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--learning_rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate", "1e-5"], "learning_rate", 1e-5),
        (["--learning-rate=1e-5"], "learning_rate", 1e-5),
        (["learning_rate=1e-5"], "learning_rate", 1e-5),
        (["--lr", "1e-5"], "learning_rate", 1e-5),
        (["--max_steps", "-1"], "max_steps", -1),
        (["--shuffle"], "shuffle", True),
        (["--shuffle", "--seed", "3"], "shuffle", True),
        (["--no-shuffle"], "shuffle", False),
        (["--no_shuffle"], "shuffle", False),
        (["--shuffle", "false"], "shuffle", False),
        (["--shuffle=off"], "shuffle", False),
        (["--shuffle", "True"], "shuffle", True),
        (["--bf16"], "precision", "bf16"),
        (["--bf16", "false"], "precision", "fp32"),
        (["--seed", "3"], "seed", 3),
        (["--report_to", "tensorboard"], "report_to", ["tensorboard"]),
        (["--devices", "0,1"], "devices", [0, 1]),
        (["--chat-template", "{{ x }}"], "chat_template", "{{ x }}"),
    ],
)
def test_flags_of_a_verb(pipeline: Pipeline, words: list[str], name: str, value: object):
    assert main(["sft", "--model", "m", "--data", "d", *words]) == 0
    assert getattr(pipeline.stage, name) == value
    assert (pipeline.stage.model, pipeline.stage.data) == ("m", "d")


def test_nested_flags(pipeline: Pipeline):
    assert main(["dpo", "--model", "m", "--data", "d", "--lora.r", "8", "--lora.use_rslora", "--lora.dropout=0"]) == 0
    assert (pipeline.stage.lora.r, pipeline.stage.lora.use_rslora) == (8, True)
    assert main(["dpo", "--model", "m", "--data", "d", "--lora"]) == 2 or pipeline.stage.lora.r == 16


@pytest.mark.parametrize("word", [*KINDS, *ALIASES])
def test_every_verb(pipeline: Pipeline, word: str):
    needed = {"distill": ["--teacher", "b/t"], "madpo": ["--reward-model", "b/r"]}.get(word, [])
    assert main([word, "--model", "a/m", "--data", "d", "--seed", "5", "--output-dir", "out", "--fresh", *needed]) == 0
    assert pipeline.loaded is not None and pipeline.options is not None and pipeline.options.fresh
    recipe = pipeline.loaded.recipe
    assert (recipe.seed, recipe.output_dir, pipeline.loaded.run_name()) == (5, "out", f"{word}_m")
    assert (pipeline.stage.data, pipeline.stage.seed, pipeline.stage.name) == ("d", 5, word)
    if word in ALIASES:
        assert pipeline.stage.kind == ALIASES[word].kind
        assert {key: getattr(pipeline.stage, key) for key in ALIASES[word].fixed} == ALIASES[word].fixed


@pytest.mark.parametrize("kind", list(KINDS))
def test_every_setting_is_a_flag_in_the_help(kind: str, capsys: pytest.CaptureFixture[str]):
    assert main([kind, "--help"]) == 0
    text = capsys.readouterr().out
    for name in settings_class(kind).model_fields.keys() - {"kind", "name", "init_from"}:
        assert f"--{name}" in text
    if kind != "evaluate":
        assert "--lora.target_modules" in text


def test_the_recipe_of_a_verb_is_kept(pipeline: Pipeline):
    assert main(["dpo", "--model", "a/m", "--data", "d", "--beta", "0.2"]) == 0
    assert pipeline.loaded is not None
    assert "kind: dpo" in pipeline.loaded.text and "# stages.0.beta=0.2" in pipeline.loaded.text


def test_the_folder_is_named_by_k(pipeline: Pipeline):
    """S2-03."""
    assert main(["sft", "--model", "a/m", "--data", "d", "--top_k", "2"]) == 0
    assert pipeline.loaded is not None and pipeline.loaded.run_name() == "sft_m_top2"


def test_several_models(pipeline: Pipeline):
    assert main(["sft", "--models", "a,b", "--data", "d"]) == 0
    assert pipeline.loaded is not None and pipeline.loaded.recipe.model_list() == ["a", "b"]


def test_a_file_of_settings_for_a_verb(pipeline: Pipeline, tmp_path: Path):
    (tmp_path / "s.yaml").write_text("model: m\ndata: d\nlearning_rate: 1e-3\nbatch_size: 4\n")
    assert main(["sft", "--config", "s.yaml", "--batch_size", "2"]) == 0
    assert (pipeline.stage.kind, pipeline.stage.learning_rate, pipeline.stage.batch_size) == ("sft", 1e-3, 2)


def make_run(folder: Path) -> Path:
    """A run folder as far as settings of a checkpoint need one."""
    resolved = {
        "name": "x",
        "models": [],
        "stages": [
            {"kind": "sft", "name": "sft", "model": "m", "data": "d", "learning_rate": 0.003, "batch_size": 4},
            {"kind": "dpo", "name": "dpo", "init_from": "sft", "model": None, "data": "p", "beta": 0.7},
        ],
    }
    for name in ("01-sft/checkpoint-4", "01-sft/final", "02-dpo/checkpoint-2"):
        (folder / name).mkdir(parents=True)
    (folder / "resolved.yaml").write_text(json.dumps(resolved))
    return folder


def test_precedence_with_a_checkpoint(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run = make_run(tmp_path / "runs" / "x")
    monkeypatch.setenv("BURNISH_SFT__LEARNING_RATE", "0.1")
    monkeypatch.setenv("BURNISH_SFT__MAX_LENGTH", "99")
    (tmp_path / "s.yaml").write_text("batch_size: 6\n")
    arguments = [
        "sft",
        "--resume_from",
        str(run / "01-sft" / "checkpoint-4"),
        "--config",
        "s.yaml",
        "--eval_steps",
        "5",
    ]
    assert main(arguments) == 0
    stage = pipeline.stage
    assert (stage.learning_rate, stage.batch_size, stage.eval_steps, stage.max_length) == (0.003, 6, 5, 99)
    assert (stage.model, stage.data) == ("m", "d")
    assert pipeline.options is not None and pipeline.options.resume_from == arguments[2]


def test_a_checkpoint_of_a_later_stage(pipeline: Pipeline, tmp_path: Path):
    run = make_run(tmp_path / "runs" / "x")
    assert main(["dpo", "--resume_from", str(run / "02-dpo" / "checkpoint-2")]) == 0
    assert (pipeline.stage.beta, pipeline.stage.model) == (0.7, str(run.resolve() / "01-sft" / "final"))


def test_a_checkpoint_of_another_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = make_run(tmp_path / "runs" / "x")
    assert main(["reward", "--resume_from", str(run / "01-sft" / "checkpoint-4")]) == 2
    assert "use `burnish sft --resume_from" in capsys.readouterr().err


def test_status_of_the_pipeline(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]):
    pipeline.status = 4
    assert main(["run", "sft"]) == 4
    pipeline.status = NumericStop("the loss is not finite", remedy="lower the learning rate")
    assert main(["run", "sft"]) == 4
    assert "the loss is not finite" in capsys.readouterr().err
    pipeline.status = KeyboardInterrupt()
    assert main(["run", "sft"]) == 130


@pytest.mark.parametrize("status", [0, 4, NumericStop("x", remedy="y"), KeyboardInterrupt(), RuntimeError("odd")])
def test_after_runs_whatever_the_outcome(pipeline: Pipeline, tmp_path: Path, status: Any):
    pipeline.status = status
    command = f"{sys.executable} -c \"open('done $HOME', 'w')\""
    code = main(["run", "sft", "--after", command])
    assert (tmp_path / "done $HOME").exists(), "no shell takes the command apart"
    assert code == {int: status, NumericStop: 4, KeyboardInterrupt: 130, RuntimeError: 1}[type(status)]


def test_after_a_wrong_recipe(tmp_path: Path):
    assert main(["run", "nowhere", "--after", f"{sys.executable} -c \"open('done', 'w')\""]) == 2
    assert (tmp_path / "done").exists()


def test_a_failing_after_is_said_and_hides_nothing(pipeline: Pipeline, capsys: pytest.CaptureFixture[str]):
    assert main(["run", "sft", "--after", "no-such-command-here"]) == 0
    assert "could not be started" in capsys.readouterr().err
    pipeline.status = 4
    assert main(["run", "sft", "--after", f"{sys.executable} -c 'raise SystemExit(3)'"]) == 4
    assert "ended with status 3" in capsys.readouterr().err


def test_several_processes(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch):
    arguments = ["run", "sft", "--num-processes", "2", "--after", "true", "batch_size=4", "--json"]
    assert main(arguments) == 0
    assert pipeline.launched == (["run", "sft", "batch_size=4", "--json"], 2)
    assert pipeline.loaded is None, "the parent trains nothing"
    assert main(["run", "sft", "--num_processes=2", "batch_size=3", "--gradient_accumulation_steps", "2"]) == 2, (
        "checked before anything starts"
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["run", "sft", "batch_size=4"]) == 0
    assert pipeline.loaded is not None and pipeline.loaded.processes == 2


def test_a_dry_run_of_several_processes_starts_none(pipeline: Pipeline):
    assert main(["run", "sft", "--num-processes", "2", "--dry-run"]) == 0
    assert pipeline.launched is None and pipeline.options is not None and pipeline.options.dry_run


def test_arguments_of_children():
    words = ["sft", "--num-processes=2", "--after", "x y", "--lr", "3", "--num_processes", "4", "--after=z"]
    assert child_arguments(words) == ["sft", "--lr", "3"]


def test_tokens_of_dotenv(pipeline: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / ".env").write_text("HUGGINGFACE_TOKEN=abc\nWANDB_API_KEY=def\nOTHER=x\nBURNISH__SEED=11\n")
    for name in ("HF_TOKEN", "HUGGINGFACE_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "")  # so that the test's end restores them
        monkeypatch.delenv(name)
    assert main(["run", "sft"]) == 0
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("abc", "def")
    assert "OTHER" not in os.environ
    assert pipeline.stage.seed == 11


def test_notes_of_a_dry_run(capsys: pytest.CaptureFixture[str]):
    assert main(["run", "sft", "lr=1e-4", "--dry-run"]) == 0
    assert "note: lr (command line) is the setting learning_rate" in capsys.readouterr().err


def test_data_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    calls = []
    for name in ("check", "show", "stats"):
        module = ModuleType(f"burnish.data.{name}")

        def collect(settings: Any, *, tokenizer: str | None, out: Any, as_json: bool, limit: int) -> int:
            calls.append((settings, tokenizer, as_json, limit))
            return 2

        setattr(module, f"run_{name}", collect)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    (tmp_path / "d.jsonl").write_text("{}\n")
    assert main(["data", "check", "d.jsonl", "--for", "ipo", "--max_length", "64", "--json"]) == 2
    assert main(["data", "show", "pocket/chat", "--for", "sft", "--model", "pocket", "--limit", "7"]) == 2
    assert main(["data", "stats", "--data", "{source: d.jsonl, weight: 2}", "--for", "reward"]) == 2
    first, second, third = calls
    assert (first[0].data, first[0].loss_type, first[0].max_length, *first[1:]) == (
        "d.jsonl",
        "ipo",
        64,
        None,
        True,
        20,
    )
    assert (second[0].data, *second[1:]) == ("pocket/chat", "pocket", False, 7)
    assert third[0].data.weight == 2.0

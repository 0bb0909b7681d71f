"""`burnish launch`: the text for Slurm and SkyPilot, run with stand-ins for the schedulers' commands."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import yaml

from burnish.cli.main import main

AWKWARD = 'it\'s "a" $HOME `b` \\ é'


@pytest.fixture(autouse=True)
def _stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("WORLD_SIZE", "RANK"):
        monkeypatch.delenv(name, raising=False)


def recipe(name: str = "recipe.yaml", **more: object) -> str:
    Path(name).write_text(
        json.dumps({"model": "pocket", "data": "pocket/chat", "stages": [{"kind": "sft"}], **more}), encoding="utf-8"
    )
    return name


def write(*words: str, via: str = "slurm") -> str:
    """The text that a command writes."""
    assert main(["launch", *words, "--via", via, "--output", "job"]) == 0
    return Path("job").read_text(encoding="utf-8")


def add_command(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{body}\n", encoding="utf-8")
    (folder / name).chmod(0o755)


def run_text(script: str, **variables: str) -> list[str]:
    """Runs a script whose srun runs its command and whose torchrun writes its arguments down."""
    bin_ = Path("bin").resolve()
    add_command(bin_, "scontrol", "echo first-node; echo second-node")
    add_command(bin_, "srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"')
    add_command(bin_, "torchrun", f"printf '%s\\0' \"$@\" > {bin_}/arguments")
    env = {"PATH": f"{bin_}:{os.environ['PATH']}", **variables}
    done = subprocess.run(["bash", "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return (bin_ / "arguments").read_text(encoding="utf-8").split("\0")[:-1]


SLURM = {"SLURM_JOB_ID": "41234", "SLURM_JOB_NODELIST": "n[1-2]"}
SKY = {"SKYPILOT_NODE_IPS": "10.0.0.1\n10.0.0.2", "SKYPILOT_NODE_RANK": "1"}


def test_slurm_runs_one_torchrun_a_machine_which_meet_on_the_first():
    text = write(recipe(), "seed=3", "--nodes", "2", "--gpus-per-node", "4", "--time", "1-12", "--partition", "gpu")
    subprocess.run(["bash", "-n", "job"], check=True)
    directives = {line.split()[1] for line in text.splitlines() if line.startswith("#SBATCH")}
    assert directives >= {
        "--nodes=2",
        "--ntasks-per-node=1",
        "--gpus-per-node=4",
        "--cpus-per-task=32",
        "--time=1-12",
        "--partition=gpu",
        "--job-name=recipe",
    }
    arguments = run_text(text, **SLURM)
    assert arguments[:2] == ["--nnodes=2", "--nproc-per-node=4"]
    assert "--rdzv-endpoint=first-node:21234" in arguments and "--rdzv-id=41234" in arguments
    assert arguments[arguments.index("-m") :] == ["-m", "burnish", "run", "recipe.yaml", "seed=3"]


def test_sky_names_the_first_machine_and_this_ones_rank():
    text = write(recipe(), "seed=3", "--nodes", "2", "--gpu-type", "H100", "--env", "HF_TOKEN", via="sky")
    task = yaml.safe_load(text)
    assert (task["num_nodes"], task["resources"], task["secrets"]) == (
        2,
        {"accelerators": "H100:8"},
        {"HF_TOKEN": None},
    )
    arguments = run_text(task["run"], **SKY)
    assert {"--nnodes=2", "--nproc-per-node=8", "--node-rank=1", "--master-addr=10.0.0.1"} < set(arguments)
    assert arguments[-4:] == ["burnish", "run", "recipe.yaml", "seed=3"]


@pytest.mark.parametrize("via", ["slurm", "sky"])
def test_names_with_spaces_and_quotes_arrive_as_they_were(via: str):
    name = recipe("it's a $(recipe).yaml", name="night run's")
    text = write(name, f"run_name={AWKWARD}", "--nodes", "1", "--gpus-per-node", "0", via=via)
    script, variables = (text, SLURM) if via == "slurm" else (yaml.safe_load(text)["run"], SKY)
    assert run_text(script, **variables)[-3:] == ["run", name, f"run_name={AWKWARD}"]
    assert ("--job-name=night-run-s" if via == "slurm" else "name: night-run-s") in text


def test_flags_are_settings_and_the_recipe_is_checked_for_all_processes(capsys: pytest.CaptureFixture[str]):
    text = write(recipe(), "--distributed.strategy", "fsdp2", "--nodes", "1", "--gpus-per-node", "2")
    assert text.rstrip().endswith("recipe.yaml distributed.strategy=fsdp2")
    assert (
        main(["launch", recipe(), "batch_size=6", "gradient_accumulation_steps=2", "--nodes", "2", "--via", "slurm"])
        == 2
    )
    assert "16 processes" in capsys.readouterr().err
    assert main(["launch", recipe(), "bata=0.1", "--nodes", "2", "--via", "slurm"]) == 2
    assert main(["launch", "no.yaml", "--nodes", "2", "--via", "slurm"]) == 2
    assert not Path("recipe.sbatch").exists()


def test_a_login_node_without_a_gpu_will_do(capsys: pytest.CaptureFixture[str]):
    main(["launch", recipe(), "optim=adamw_8bit", "--nodes", "1", "--via", "slurm", "--dry-run"])
    assert "CUDA" not in capsys.readouterr().err


def test_dry_run_prints_and_writes_nothing(capsys: pytest.CaptureFixture[str]):
    assert main(["launch", recipe(), "--nodes", "1", "--via", "slurm", "--dry-run"]) == 0
    assert capsys.readouterr().out.startswith("#!/bin/bash\n")
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml"]


def test_an_edited_file_is_kept_unless_it_is_named(capsys: pytest.CaptureFixture[str]):
    command = ["launch", recipe(), "--nodes", "1", "--via", "slurm"]
    assert main(command) == 0 and main(command) == 0
    Path("recipe.sbatch").write_text("edited", encoding="utf-8")
    assert main(command) == 2
    assert Path("recipe.sbatch").read_text(encoding="utf-8") == "edited"
    assert main([*command, "--output", "recipe.sbatch"]) == 0
    assert Path("recipe.sbatch").read_text(encoding="utf-8") != "edited"
    assert "submit it with: sbatch recipe.sbatch" in capsys.readouterr().out


def test_variables_are_passed_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_0123456789abcdef0123")
    text = write(recipe(), "--nodes", "1", "--env", "HF_TOKEN")
    assert "hf_0123" not in text
    assert run_text(text, **SLURM, HF_TOKEN="x")
    with pytest.raises(AssertionError, match="HF_TOKEN"):
        run_text(text, **SLURM)


@pytest.mark.parametrize(
    ("words", "via", "said"),
    [
        (["--env", "HF_TOKEN=hf_0123456789abcdef0123"], "slurm", "name of a variable"),
        (["--setup", "export HF_TOKEN=hf_0123456789abcdef0123"], "slurm", "secret"),
        (["--time", "tomorrow"], "slurm", "24:00:00"),
        (["--partition", "gpu\n#SBATCH --exclusive"], "slurm", "--partition"),
        (["--account", "a b"], "slurm", "--account"),
        (["--gpu-type", "H100", "--time", "1:00:00"], "sky", "--time is Slurm's"),
        ([], "sky", "--gpu-type"),
        (["--nodes", "0"], "slurm", "--nodes"),
    ],
)
def test_what_a_scheduler_would_not_take_is_refused(
    words: list[str], via: str, said: str, capsys: pytest.CaptureFixture[str]
):
    assert main(["launch", recipe(), "--nodes", "1", "--via", via, *words]) == 2
    errors = capsys.readouterr().err
    assert said in errors and "hf_0123" not in errors
    assert sorted(path.name for path in Path().iterdir()) == ["recipe.yaml"]


def test_sky_uploads_the_current_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = str(Path(recipe()).resolve())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["launch", name, "--nodes", "1", "--via", "sky", "--gpu-type", "H100"]) == 2

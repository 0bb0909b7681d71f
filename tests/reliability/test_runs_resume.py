"""R-18, R-30, R-31: what is continued, refused, skipped and made again; what a dry run says of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file

from burnish.cli.main import main
from burnish.config.registry import find_spec
from burnish.config.spec import may_resume_with
from burnish.config.stages import DpoSettings, EvaluateSettings, RewardSettings, SftSettings
from burnish.errors import ConfigError, UsageError
from burnish.pipeline import inputs as stage_inputs
from burnish.pipeline.decide import compute_key, decide
from tests.pipeline.test_kill import build_command, run_pair
from tests.pipeline.test_run import write_recipe

STAGES = {"sft": SftSettings, "reward": RewardSettings, "dpo": DpoSettings}
CODE = {"burnish": "1.0"}


def copy_inputs(inputs: Path, folder: Path) -> Path:
    shutil.copytree(inputs, folder / "inputs")
    return folder / "inputs"


# ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def half(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """inputs/ and an interrupted dpo of it, with another model as its reference."""
    folder = tmp_path_factory.mktemp("half")
    own = copy_inputs(inputs, folder)
    shutil.copytree(own / "model", own / "other")
    assert main(build(folder)) == 0
    stage = folder / "run" / "01-dpo"
    record = json.loads((stage / "stage.json").read_text())
    (stage / "stage.json").write_text(json.dumps(record | {"state": "interrupted"}))
    shutil.rmtree(stage / "final")
    return folder


def build(folder: Path, *more: str) -> list[str]:
    own = folder / "inputs"
    words = ["dpo", "--model", str(own / "model"), "--data", str(own / "pairs.jsonl"), "--output-dir", str(folder)]
    words += ["--run-name", "run", "--reference", str(own / "other"), "--max-steps", "3", "--batch-size", "4"]
    return [*words, "--save-steps", "2", "--precision", "fp32", *more]


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def flip_last_byte(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


def rename_token(file: Path) -> None:
    """The last added token gets another text."""
    fields = json.loads(file.read_text())
    fields["added_tokens"][-1]["content"] += "x"
    file.write_text(json.dumps(fields))


MUTATIONS = {
    "recipe": (lambda own: ["--beta", "0.3"], ["settings.beta: 0.1 → 0.3"], ["beta"]),
    "data": (
        lambda own: (own / "pairs.jsonl").write_text("".join((own / "pairs.jsonl").open().readlines()[:-1])),
        ["inputs.data:"],
        ["data"],
    ),
    "base model": (lambda own: flip_last_byte(own / "model/model.safetensors"), ["inputs.model:"], ["model"]),
    "configuration": (lambda own: edit(own / "model/config.json", rms_norm_eps=1e-4), ["inputs.model:"], ["model"]),
    "tokenizer": (
        lambda own: rename_token(own / "model/tokenizer.json"),
        ["inputs.tokenizer:"],
        ["model", "tokenizer"],
    ),
    "reference": (lambda own: flip_last_byte(own / "other/model.safetensors"), ["inputs.reference:"], ["reference"]),
    "chat template": (
        lambda own: (own / "model/chat_template.jinja").write_text(
            "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        ),
        ["inputs.chat_template:"],
        ["chat_template", "data", "model"],
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_r18_a_changed_input_is_refused_by_name(half, tmp_path, name, capfd):
    """R-18: recipe, data, base model, tokenizer, chat template, reference: exit 2 and a line for each field."""
    folder = tmp_path / "copy"
    shutil.copytree(half, folder)
    for file in folder.rglob("*.json"):  # the copy's own paths
        file.write_text(file.read_text().replace(str(half), str(folder)))
    change, lines, keys = MUTATIONS[name]
    more = change(folder / "inputs")
    command = build(folder, *(more if isinstance(more, list) else []))
    assert main(command) == 2
    text = capfd.readouterr().err
    assert "interrupted and has changed since" in text
    for line in lines:
        assert line in text
    for key in keys:
        assert f"--allow-change {key}" in text
    assert not (folder / "run" / "01-dpo" / "final").exists()


def test_r18_another_version_of_the_code_is_refused_and_can_be_allowed(half, tmp_path, monkeypatch, capfd):
    """R-18: the code's version; --allow-change is recorded in stage.json and said aloud."""
    folder = tmp_path / "copy"
    shutil.copytree(half, folder)
    shutil.rmtree(folder / "inputs")
    command = build(half)
    command[command.index("--output-dir") + 1] = str(folder)
    monkeypatch.setattr(stage_inputs, "__version__", "99.0")
    assert main(command) == 2
    text = capfd.readouterr().err
    assert "code.burnish:" in text and '→ "99.0"' in text and "--allow-change burnish" in text
    assert main([*command, "--allow-change", "burnish"]) == 0
    text = capfd.readouterr().err
    assert "continued although it changed: code.burnish:" in text
    record = json.loads((folder / "run" / "01-dpo" / "stage.json").read_text())
    assert record["code"]["burnish"] == "99.0" and record["starts"] == 2 and record["resumed_from"] == 3
    assert [line.partition(":")[0] for line in record["continued_with_changes"]] == ["code.burnish"]
    monkeypatch.setattr(stage_inputs, "__version__", "100.0")
    assert main(command) == 0, "a finished stage stays finished under other code"
    assert "skipped" in capfd.readouterr().err


def test_r18_harmless_keys_pass(half, tmp_path):
    """R-18: logging, saving, sinks, and more steps."""
    folder = tmp_path / "copy"
    shutil.copytree(half, folder)
    command = build(half, "--logging-steps", "2", "--save-steps", "1", "--report-to", "tensorboard")
    command[command.index("--output-dir") + 1] = str(folder)
    command[command.index("--max-steps") + 1] = "5"
    assert main(command) == 0
    record = json.loads((folder / "run" / "01-dpo" / "stage.json").read_text())
    assert record["figures"]["steps"] == 5 and record["resumed_from"] == 3


@pytest.mark.parametrize("kind", STAGES)
def test_r18_every_setting_is_either_harmless_or_refused(tmp_path, kind):
    """R-18: each key of the settings class in turn; the difference names it; --allow-change lets it through."""
    values = STAGES[kind](name="x", max_steps=8).model_dump(mode="json")
    found = {"model": "a", "tokenizer": "b", "chat_template": "c", "data": "d"}
    record = {"format": 1, "state": "interrupted", "kind": kind, "settings": values, "inputs": found, "code": CODE}
    (tmp_path / "stage.json").write_text(json.dumps(record | {"key": compute_key(values, found)}))

    def ask(changed: dict[str, Any], inputs: dict[str, str], code: dict[str, str] = CODE, allow: tuple = ()) -> str:
        return decide(tmp_path, compute_key(changed, inputs), changed, inputs, code=code, allow=allow).action

    assert ask(values, found) == "resume"
    harmless = may_resume_with(find_spec(values["kind"]))
    for name in values:
        changed = values | {name: "another"} if name != "max_steps" else values | {name: 7}
        if name == "kind":  # of another kind it would be another stage, and of none an error
            with pytest.raises(ConfigError, match="there is no kind 'another'"):
                ask(changed, found)
            continue
        if name in harmless:
            assert ask(changed, found) == "resume", name
            continue
        with pytest.raises(UsageError, match=rf"settings\.{name}: "):
            ask(changed, found)
        assert ask(changed, found, allow=(f"stages.{kind}.{name}",)) == "resume"
        with pytest.raises(UsageError):
            ask(changed, found, allow=("something_else",))
    assert ask(values | {"max_steps": 9}, found) == "resume"
    for name in found:
        with pytest.raises(UsageError, match=rf"inputs\.{name}: "):
            ask(values, found | {name: "z"})
    with pytest.raises(UsageError, match=r"code\.burnish"):
        ask(values, found, {"burnish": "1.1"})
    assert set(DpoSettings.model_fields) | set(EvaluateSettings.model_fields) >= harmless


# ---------------------------------------------------------------------------------------------------------------


@pytest.mark.dist
def test_r31_a_stage_of_two_processes_goes_on_with_one(server, inputs, tmp_path):
    """R-31: both killed after step 5, continued by one process: every sample once an epoch, in the same order.

    The ledger is a hash chain over the ids of all samples in the order of the global batches; it is that of a run on one
    process from the start. Parameters agree up to rounding, and the log says that bits may not.
    """
    found = {}
    for name in ("one", "two"):
        out = tmp_path / name
        command = [*build_command(inputs, "dpo", False, out), "--batch-size", "6", "--eval-steps", "-1"]
        if name == "two":
            assert run_pair(command, out, "both", "loop.after_step:5") != 0
            assert list((out / "run" / "01-dpo").glob("checkpoint-*"))
        out.mkdir(exist_ok=True)
        assert server.run(command, log=out / "log", cwd=out) == 0, (out / "log").read_text()[-3000:]
        stage = out / "run" / "01-dpo"
        rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
        record = json.loads((stage / "stage.json").read_text())
        found[name] = record["ledger"], [r["step"] for r in rows], load_file(stage / "final" / "model.safetensors")
        assert record["resumed_from"] == (3 if name == "two" else None)
        said = "resuming with 1 processes, not 2: results will not be bit-equal" in (out / "log").read_text()
        assert said == (name == "two")
    (ledger, steps, weights), (other_ledger, other_steps, other) = found["one"], found["two"]
    assert (ledger, steps) == (other_ledger, other_steps) and steps[:10] == list(range(1, 11))
    assert max(float((weights[n] - other[n]).abs().max()) for n in weights) < 1e-4


# ---------------------------------------------------------------------------------------------------------------


def read_starts(folder: Path) -> dict[str, int]:
    """stage → how often it was started in its present folder, plus how often it was made anew before."""
    run = folder / "runs" / "small"
    found = {}
    for place in sorted(run.glob("*/stage.json")):
        again = len(list((run / "superseded").glob(f"{place.parent.name}.*")))
        found[json.loads(place.read_text())["name"]] = json.loads(place.read_text())["starts"] + again
    return found


def read_results(folder: Path) -> dict[str, bytes]:
    """What a run ends with: weights of each stage, figures of the evaluation."""
    run = folder / "runs" / "small"
    files = [*run.glob("*/final/*.safetensors"), *run.glob("*/figures.json"), *run.glob("*/metrics.jsonl")]
    return {file.relative_to(run).as_posix(): file.read_bytes() for file in sorted(files)}


def foresee(server, recipe: Path, *more: str) -> dict[str, tuple[str, str]]:
    """stage → (action, why) of a dry run."""
    log = recipe.parent / "dry.json"
    log.unlink(missing_ok=True)
    assert server.run(["run", str(recipe), "--dry-run", "--json", *more], log=log, cwd=recipe.parent) == 0
    text = log.read_text()
    return {r["stage"]: (r["action"], r["why"]) for r in json.loads(text[text.index("{") :])["stages"]}


def run_all(server, recipe: Path, fault: str = "", *more: str) -> int:
    return server.run(["run", str(recipe), *more], log=recipe.parent / "log", cwd=recipe.parent, fault=fault)


@pytest.fixture(scope="module")
def calm(server, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished sft → reward → dpo → evaluate."""
    folder = tmp_path_factory.mktemp("calm")
    assert run_all(server, write_recipe(folder, inputs)) == 0, (folder / "log").read_text()[-3000:]
    return folder


ORDER = ("sft", "reward", "dpo", "evaluate")


def check_kill(server, inputs: Path, folder: Path, calm: Path, point: str, number: int) -> None:
    """A kill at the n-th passing of a point; `number` is the stage's place where the point is passed once a stage."""
    recipe = write_recipe(folder, inputs)
    assert run_all(server, recipe, f"{point}:{number}:kill") == -9
    plan = foresee(server, recipe)
    before = {name: (folder / "runs" / "small").glob(f"*-{name}/stage.json") for name in ORDER}
    done = [n for n, found in before.items() if any(json.loads(f.read_text())["state"] == "done" for f in found)]
    assert [n for n in ORDER if plan[n][0] == "skip"] == done
    assert all(plan[n][1] == "finished and unchanged" for n in done)
    assert all(plan[n][0] in ("resume", "run") for n in ORDER if n not in done)
    assert run_all(server, recipe) == 0, (folder / "log").read_text()[-3000:]
    starts = read_starts(folder)
    assert all(starts[n] == 1 for n in done), starts
    assert sum(starts.values()) <= len(ORDER) + 1
    assert read_results(folder) == read_results(calm)


def test_r30_killed_between_two_stages(server, inputs, tmp_path, calm):
    """R-30: killed as reward's record says done: sft and reward are not run again; the same bits in the end."""
    check_kill(server, inputs, tmp_path, calm, "stage.recorded", 2)


BOUNDARY = ("export.written", "stage.finished", "stage.recorded", "stage.next", "stage.started")


@pytest.mark.slow
@pytest.mark.parametrize("boundary", [1, 2, 3])
@pytest.mark.parametrize("point", BOUNDARY)
def test_r30_five_kills_at_every_boundary(server, inputs, tmp_path, calm, boundary, point):
    """R-30: while the result is written, before and after the record, before and after the next stage's start."""
    number = boundary + 1 if point in ("stage.next", "stage.started") else boundary
    check_kill(server, inputs, tmp_path, calm, point, number)


@pytest.mark.slow
@pytest.mark.parametrize(
    "point",
    [
        "step.forward:2",
        "step.forward:5",
        "step.backward:8",
        "folder.rename:5",
        "reference.forward:1",
        "measure.forward:3",
        "generate.batch:2",
    ],
)
def test_r30_kills_inside_stages(server, inputs, tmp_path, calm, point):
    """R-30: in the middle of each stage."""
    name, _, number = point.partition(":")
    check_kill(server, inputs, tmp_path, calm, name, int(number))


def check_change(server, calm: Path, folder: Path, inputs: Path, change, more: list[str], expected: set[str]) -> None:
    """After a change exactly the expected stages are made again, and the dry run says which and why before."""
    shutil.copytree(calm, folder, dirs_exist_ok=True)
    own = copy_inputs(inputs, folder)
    recipe = write_recipe(folder, own)
    assert all(action == "skip" for action, _ in foresee(server, recipe).values()), "paths alone change nothing"
    change(own, recipe)
    plan = foresee(server, recipe, *more)
    assert {n for n, (action, _) in plan.items() if action == "rerun"} == expected, plan
    first = next((n for n in ORDER if n in expected), None)
    assert first is None or "changed: " in plan[first][1], plan
    assert run_all(server, recipe, "", *more) == 0, (folder / "log").read_text()[-3000:]
    starts = read_starts(folder)
    assert {n for n, count in starts.items() if count > 1} == expected, starts


def edit_recipe(recipe: Path, stage: str, **changes: Any) -> None:
    fields = yaml.safe_load(recipe.read_text())
    next(s for s in fields["stages"] if s["kind"] == stage).update(changes)
    recipe.write_text(yaml.safe_dump(fields, sort_keys=False))


def test_r30_a_changed_stage_and_what_depends_on_it(server, inputs, tmp_path, calm):
    """R-30: another beta: dpo and the evaluation again, nothing else."""
    check_change(server, calm, tmp_path, inputs, lambda own, r: None, ["dpo.beta=0.3"], {"dpo", "evaluate"})


CHANGES = {
    "base model": (lambda own, r: flip_last_byte(own / "model/model.safetensors"), set(ORDER)),
    "chat data": (lambda own, r: cut_rows(own / "chat.jsonl"), set(ORDER)),
    "pairs": (lambda own, r: cut_rows(own / "pairs.jsonl"), {"reward", "dpo", "evaluate"}),
    "reward": (lambda own, r: edit_recipe(r, "reward", head_init_std=0.05), {"reward", "evaluate"}),
    "evaluation": (lambda own, r: edit_recipe(r, "evaluate", max_items=5), {"evaluate"}),
    "harmless": (lambda own, r: edit_recipe(r, "sft", logging_steps=2), set()),
}


def cut_rows(file: Path) -> None:
    file.write_text("".join(file.open().readlines()[:-1]))


@pytest.mark.slow
@pytest.mark.parametrize("name", CHANGES)
def test_r30_every_kind_of_change(server, inputs, tmp_path, calm, name):
    """R-30: model, data, settings of each stage, harmless settings."""
    change, expected = CHANGES[name]
    check_change(server, calm, tmp_path, inputs, change, [], expected)


@pytest.mark.slow
def test_r30_other_held_out_data_are_measured_again(server, inputs, tmp_path):
    """R-30: an evaluation with data of its own depends on their content."""
    own = copy_inputs(inputs, tmp_path)
    shutil.copy(own / "chat.jsonl", own / "held.jsonl")
    stages = [
        {"kind": "sft", "data": str(own / "chat.jsonl")},
        {"kind": "evaluate", "tasks": ["loss"], "data": str(own / "held.jsonl"), "max_items": 30},
    ]
    recipe = write_recipe(tmp_path, own, stages=stages)
    assert run_all(server, recipe) == 0, (tmp_path / "log").read_text()[-3000:]
    cut_rows(own / "held.jsonl")
    assert foresee(server, recipe)["evaluate"][0] == "rerun"
    assert run_all(server, recipe) == 0
    assert read_starts(tmp_path) == {"sft": 1, "evaluate": 2}

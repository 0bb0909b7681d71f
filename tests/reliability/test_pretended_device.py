"""All kinds of stages on the pretended CUDA device: no mixing of devices, waits in known places only, the CPU's figures."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from burnish.config.registry import KINDS
from burnish.config.spec import MethodSpec
from tests.pretend_cuda.build import NoGuard
from tests.pretend_cuda.probes import QUIET, READS
from tests.pretend_cuda.server import Outcome, PretendServer

STAGES: list[dict[str, Any]] = [
    {"kind": "sft", "data": "chat", "gradient_checkpointing": True},
    {"kind": "reward", "init_from": "sft"},
    {"kind": "dpo", "init_from": "sft"},
    {"kind": "kto", "init_from": "sft"},
    {"kind": "dpo", "name": "aot", "loss_type": "aot", "init_from": "sft", "reference_mode": "copy"},
    {"kind": "dpo", "name": "tdpo", "loss_type": "tdpo2", "init_from": "sft"},
    {"kind": "dpo", "name": "moving-beta", "dynamic_beta": {"type": "beta_dpo", "alpha": 0.05}, "init_from": "sft"},
    {"kind": "dpo", "name": "adapter", "lora": {"r": 4}, "reference_mode": "adapter", "init_from": "sft"},
    {"kind": "reward", "name": "reward-adapter", "lora": {"r": 4}, "optim": "adafactor", "init_from": "sft"},
    {"kind": "cpo", "init_from": "sft"},
    {"kind": "simpo", "init_from": "sft"},
    {"kind": "orpo", "init_from": "sft", "optim": "sgd"},
    {"kind": "distill", "data": "chat", "teacher": "sft"},
    {
        "kind": "evaluate",
        "tasks": ["loss", "preferences", "win_rate"],
        "judge": "reward",
        "max_items": 4,
        "max_new_tokens": 10,
    },
]

# Where the host may wait for the device, and why. Everything else fails the test.
IN_A_STEP = {
    "engine/fetch.py:fetch_numbers": "the one fetch of a step: its figures, whether they are finite, the gradient's norm",
    "methods/dynamic_beta.py:read_margins": "a moving beta is computed from the step's margins, on the host",
    "engine/parallel/single.py:clip_and_step": "torch's Adafactor reads the norm of each parameter",
    "engine/coupled.py:_find_trained": "which completions have a gradient: a second pass without the others saves more",
}
BETWEEN_STEPS = {
    "engine/fetch.py:fetch_numbers": "an evaluation's sums, once each",
    "engine/parallel/files.py:write_tensors": "a checkpoint is written on the host",
    "engine/parallel/single.py:prepare": "a model is loaded",
    "engine/state.py:load_tree": "a checkpoint is read back",
    "engine/state.py:_load_optimizer": "a checkpoint is read back",
    "evals/generate.py:_generate_batch": "drawn tokens, once in several; and transformers, which looks at the mask",
    "evals/measure.py:_measure": "numbers of all items, once a task",
    "models/adapters.py:attach_adapter": "a model is loaded",
    "models/frozen.py:load_frozen": "a model is loaded",
    "models/reference.py:_load_other": "a model is loaded",
    "models/adapters.py:<dictcomp>": "the result is written",
    "models/export.py:<dictcomp>": "the result is written",
    "models/export.py:_cast": "the result is written",
    "models/reference.py:compute_reference_table": "the reference's log-probs go to the disk",
    "models/reference.py:compute_start_gap": "whether the reference is the policy, once",
    "pipeline/reference.py:_check_columns": "whether the cached reference is the policy, once",
}
STEP_PHASES = {"forward", "backward", "optimizer"}


@pytest.fixture(scope="module")
def server() -> Iterator[PretendServer]:
    try:
        found = PretendServer()
    except NoGuard as error:
        pytest.skip(f"no pretended CUDA device: {error}")
    yield found
    found.close()


def write_recipe(folder: Path, inputs: Path, stages: list[dict[str, Any]], **changes: Any) -> list[str]:
    """A recipe over the tiny model with several micro-batches a step; the command that runs it."""
    folder.mkdir(parents=True, exist_ok=True)
    files = {name: str(folder / f"{name}.jsonl") for name in ("chat", "pairs")}
    for name, file in files.items():
        rows = (inputs / f"{name}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        Path(file).write_text("".join(rows[:12]), encoding="utf-8")
    placed = [s if s["kind"] == "evaluate" else s | {"data": files[s.get("data", "pairs")]} for s in stages]
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": str(inputs / "model"),
        "seed": 3,
        "max_steps": 2,
        "batch_size": 4,
        "learning_rate": 1e-3,
        "validation_split": 0.25,
        "precision": "fp32",
        "attention": "sdpa",
        "micro_batch_tokens": 160,
        "stages": placed,
    } | changes
    (folder / "tiny.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return ["run", "tiny.yaml"]


def read_figures(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage → the rows of its metrics."""
    files = sorted((folder / "runs" / "tiny").glob("*/metrics.jsonl"))
    return {file.parent.name: [json.loads(line) for line in file.read_text().splitlines()] for file in files}


def check_waits(outcome: Outcome) -> None:
    """Only the listed places; in a step, one fetch, and for coupled micro-batches one more each."""
    unknown: Counter[tuple[str, ...]] = Counter()
    fetches: Counter[tuple[str, int]] = Counter()
    for (stage, phase, step, operation, place), count in outcome.waits.items():
        within = phase in STEP_PHASES
        if place not in (IN_A_STEP if within else BETWEEN_STEPS):
            unknown[stage, phase, operation, place] += count
        if within and place == "engine/fetch.py:fetch_numbers":
            fetches[stage, step] += count
    assert not unknown, f"the host waits in places that are not listed: {unknown}"
    assert fetches and set(fetches.values()) == {1}, fetches


@pytest.fixture(scope="module")
def everything(server: PretendServer, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Outcome]:
    """All stages on the pretended device."""
    folder = tmp_path_factory.mktemp("device")
    return folder, server.run(write_recipe(folder, inputs, STAGES, max_steps=1), folder)


def test_the_list_has_every_kind() -> None:
    assert {name for name, spec in KINDS.items() if isinstance(spec, MethodSpec)} <= {s["kind"] for s in STAGES}


def test_the_device_notices_waits_and_mixing(server: PretendServer, tmp_path: Path) -> None:
    found = server.probe("count_reads", tmp_path)
    assert found.status == 0, found.output
    assert {name for name, count in found.value.items() if count} == set(READS)
    assert {name for name, count in found.value.items() if not count} == set(QUIET)
    mixed = server.probe("mix_devices", tmp_path)
    assert mixed.status == 0 and "not noticed" not in mixed.value, mixed.value
    assert "aten.add" in mixed.value[0] and "_fused_adamw_" in mixed.value[1]


def test_a_tensor_left_on_the_host_is_caught(server: PretendServer, tmp_path: Path) -> None:
    found = server.probe("leave_a_tensor_behind", tmp_path)
    assert found.status == 0, found.output
    assert "on the CPU beside tensors on cuda" in found.value and "core/batch.py:sum_tokens" in found.value


def test_every_kind_runs_without_mixing_and_waits_where_it_may(everything: tuple[Path, Outcome]) -> None:
    _, outcome = everything
    assert outcome.status == 0, outcome.output[-4000:]
    check_waits(outcome)


def test_figures_are_those_of_the_cpu(
    server: PretendServer, inputs: Path, tmp_path: Path, everything: tuple[Path, Outcome]
) -> None:
    on_cpu = server.run(write_recipe(tmp_path, inputs, STAGES, max_steps=1), tmp_path, device="cpu")
    assert on_cpu.status == 0, on_cpu.output[-4000:]
    expected, found = read_figures(tmp_path), read_figures(everything[0])
    assert expected.keys() == found.keys() and len(found) == len(STAGES) - 1
    for stage, rows in expected.items():
        assert len(rows) == len(found[stage]) > 1
        for ours, theirs in zip(found[stage], rows, strict=True):
            assert ours.pop("kind") == theirs.pop("kind"), stage
            assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4), stage


def test_g10_generation_waits_once_in_several_tokens(everything: tuple[Path, Outcome]) -> None:
    waits = everything[1].waits
    looks = sum(n for key, n in waits.items() if key[3] == "tolist" and key[4] == "evals/generate.py:_generate_batch")
    assert 0 < looks <= 2 * 4 * 3, looks  # four answering models, at most three batches of 10 tokens each


@pytest.fixture(scope="module")
def undisturbed(server: PretendServer, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two stages in fp16 with its loss scale, undisturbed."""
    folder = tmp_path_factory.mktemp("fp16")
    outcome = server.run(write_recipe(folder, inputs, HALF, **HALF_CHANGES), folder)
    assert outcome.status == 0, outcome.output[-4000:]
    check_waits(outcome)
    return folder


HALF: list[dict[str, Any]] = [
    {"kind": "sft", "data": "chat"},
    {"kind": "kto", "init_from": "sft", "lora": {"r": 4}, "reference_mode": "copy"},
]
HALF_CHANGES = {"precision": "fp16", "max_steps": 4, "save_steps": 2, "eval_steps": -1}


def hash_results(folder: Path) -> dict[str, str]:
    """The weights of every stage, and the rows of its metrics."""
    files = sorted([*folder.glob("runs/tiny/*/final/*.safetensors"), *folder.glob("runs/tiny/*/metrics.jsonl")])
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_fp16_trains_as_fp32_does(server: PretendServer, inputs: Path, tmp_path: Path, undisturbed: Path) -> None:
    exact = server.run(
        write_recipe(tmp_path, inputs, HALF, max_steps=4, save_steps=2, eval_steps=-1), tmp_path, device="cpu"
    )
    assert exact.status == 0, exact.output[-4000:]
    for stage, rows in read_figures(tmp_path).items():
        found = read_figures(undisturbed)[stage]
        assert [r["loss"] for r in found if r["kind"] == "train"] == pytest.approx(
            [r["loss"] for r in rows if r["kind"] == "train"], rel=2e-2
        )


@pytest.mark.parametrize("nth", [pytest.param(3, marks=pytest.mark.slow), 7])
def test_g01_a_killed_run_resumes_to_the_bit(
    server: PretendServer, inputs: Path, tmp_path: Path, undisturbed: Path, nth: int
) -> None:
    """Killed in the third step of either stage: fused AdamW goes on with moments and counts that lie on the device."""
    command = write_recipe(tmp_path, inputs, HALF, **HALF_CHANGES)
    assert server.run(command, tmp_path, fault=f"loop.after_step:{nth}:kill").status == -9
    again = server.run(command, tmp_path)
    assert again.status == 0, again.output[-4000:]
    assert "resum" in again.output or "continu" in again.output
    check_waits(again)
    assert hash_results(tmp_path) == hash_results(undisturbed)


def test_g01_counts_of_steps_lie_with_their_parameters(server: PretendServer, tmp_path: Path) -> None:
    found = server.probe("restore_moments", tmp_path)
    assert found.status == 0, found.output
    assert found.value == {"step": "cuda", "exp_avg": "cuda", "exp_avg_sq": "cuda"}

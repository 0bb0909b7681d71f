"""R-32: memory runs out: one message with stage, phase and a number that fits; nothing that was saved is lost."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from burnish.artifacts.checkpoints import list_checkpoints, verify_checkpoint
from burnish.engine.memory import SHRINK, describe_remedy, suggest_budget
from burnish.errors import is_out_of_memory
from burnish.track.whereabouts import Whereabouts
from tests.pipeline.test_kill import build_command, compute_digest
from tests.pipeline.test_run import write_recipe

BUDGET = re.compile(r"micro_batch_tokens: (\d+) → (\d+) \(the same gradient\)")


def run_out(server, command: list[str], folder: Path, fault: str) -> str:
    """The one message of a run whose memory ends at a point."""
    folder.mkdir(exist_ok=True)
    log = folder / "log"
    log.unlink(missing_ok=True)
    assert server.run(command, log=log, cwd=folder, fault=f"{fault}:oom") == 5, log.read_text()[-3000:]
    text = log.read_text()
    assert text.count("error: ") == 1, text
    assert "Traceback" not in text
    return text[text.index("error: ") :]


def check(server, inputs: Path, kind: str, folder: Path, fault: str, words: list[str], saved: int | None) -> None:
    """Out of memory, then the same command: the same bits as without."""
    command = build_command(inputs, kind, False, folder)
    message = run_out(server, command, folder, fault)
    for word in words:
        assert word in message, message
    stage = folder / "run" / f"01-{kind}"
    assert json.loads((stage / "stage.json").read_text())["state"] == "failed"
    refs = list_checkpoints(stage)
    for ref in refs:
        verify_checkpoint(ref.path)
    assert (refs[-1].step if refs else None) == saved, message
    if saved is not None:
        assert f"checkpoint-{saved}" in message
    proposed = BUDGET.search(message)
    log = folder / "log"
    change = ["--micro-batch-tokens", proposed[2], "--allow-change", "micro_batch_tokens"] if proposed else []
    assert server.run([*command, *change], log=log, cwd=folder) == 0, log.read_text()[-3000:]
    if not proposed:
        calm = folder / "calm"
        calm.mkdir()
        assert server.run(build_command(inputs, kind, False, calm), log=log, cwd=calm) == 0
        assert compute_digest(folder / "run") == compute_digest(calm / "run")


def test_r32_a_device_without_memory_says_which_number_fits(server, inputs, tmp_path):
    """R-32: from the backward of step 8 on nothing fits, down to single rows (saved at 6): state saved at 7, exit 5."""
    words = ["dpo", "phase backward", "after step 7", "alone does not fit"]
    check(server, inputs, "dpo", tmp_path, "step.backward:8+", words, 7)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sft", "reward", "dpo"])
@pytest.mark.parametrize(
    ("fault", "phase", "words", "saved"),
    [
        ("step.forward:1+", "forward", ["nothing is lost"], None),
        ("step.forward:8+", "forward", ["alone does not fit"], 7),
        ("step.backward:5+", "backward", ["alone does not fit"], 4),
        ("update.before_optimizer:6", "optimizer", ["adafactor", "checkpoint-3 is intact"], 3),
        ("evaluation.forward:1+", "evaluate", ["alone does not fit"], 4),
    ],
)
def test_r32_every_phase_of_training(server, inputs, tmp_path, kind, fault, phase, words, saved):
    """R-32: forward, backward, optimizer, evaluate × three kinds of stage."""
    check(server, inputs, kind, tmp_path, fault, [f"phase {phase}", *words], saved)


@pytest.mark.slow
def test_r32_reference_evaluation_and_answers(server, inputs, tmp_path):
    """R-32: reference log-probs, measuring, generating: each with its own setting; earlier stages stay."""
    recipe = str(write_recipe(tmp_path, inputs))
    message = run_out(server, ["run", recipe], tmp_path, "reference.forward:1")
    assert "phase reference" in message and "micro_batch_tokens" in message
    message = run_out(server, ["run", recipe], tmp_path, "measure.forward:2")
    assert "evaluate: out of memory in phase evaluate" in message and "max_length" in message
    message = run_out(server, ["run", recipe], tmp_path, "generate.batch:1")
    assert "phase generate" in message and re.search(r"batch_size: (6 → 3|5 → 2|4 → 2) in this stage", message), message
    log = tmp_path / "log"
    log.unlink()
    assert server.run(["run", recipe], log=log, cwd=tmp_path) == 0
    assert log.read_text().count("skipped (finished and unchanged)") == 3


def test_r32_a_real_memory_error_of_the_host(server, inputs, tmp_path):
    """R-32: with 60 MB of address space left, a step of 500,000 tokens: smaller pieces, said once each, and it goes on."""
    rows = (inputs / "chat.jsonl").read_text().splitlines()
    (tmp_path / "many.jsonl").write_text("\n".join(rows * 40) + "\n")
    command = build_command(inputs, "sft", False, tmp_path)
    command[command.index("--data") + 1] = str(tmp_path / "many.jsonl")
    command += ["--batch-size", "600", "--max-steps", "2", "--micro-batch-tokens", "500000", "--save-steps", "1"]
    log = tmp_path / "log"
    assert server.run(command, log=log, cwd=tmp_path, spare=60_000_000) == 0, log.read_text()[-3000:]
    text = log.read_text()
    assert "Traceback" not in text, text
    found = re.findall(r"out of memory with (\d+) tokens in a micro-batch: going on with (\d+)", text)
    assert found and len(set(found)) == len(found), text
    assert int(found[-1][1]) <= 250_000
    state = json.loads((tmp_path / "run" / "01-sft" / "checkpoint-2" / "state.json").read_text())
    assert state["counters"]["budget_limit"] == int(found[-1][1])


def test_r32_what_is_proposed_fits():
    """R-32: at most 0.6 of the micro-batch that failed; for a single row another setting."""
    assert suggest_budget(8192, 8000, 30) == 4096
    assert suggest_budget(8192, 3000, 2) == 1024
    assert suggest_budget(8192, 2000, 1) is None
    for budget in (1, 7, 256, 8192):
        for tokens in (0, 1, 100, 8192):
            found = suggest_budget(budget, tokens, 4)
            assert found is None or (found <= max(SHRINK * (tokens or budget), 1) and found < budget)
    alone = describe_remedy(Whereabouts("dpo", phase="forward", tokens=2000, budget=8192, rows=1))
    assert "max_length: 1000" in alone and "gradient_checkpointing" in alone


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory: you tried"),
            True,
        ),
        (RuntimeError("std::bad_alloc"), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True),
        (RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED"), False),
        (OSError(28, "No space left on device"), False),
        (RuntimeError("shapes do not match"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_r32_what_counts_as_out_of_memory(error, expected):
    assert is_out_of_memory(error) is expected

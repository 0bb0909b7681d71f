"""What the benchmark scripts make of their measurements: medians, marks, tables, the cost curve's fit and figure."""

from __future__ import annotations

import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import curve  # noqa: E402
import disturbance  # noqa: E402
import loss_cost  # noqa: E402
import results_table  # noqa: E402
import train_step  # noqa: E402
from peer_trl import build_arguments, freeze_all_but_top  # noqa: E402
from workload import TOP_K, Pair, Plan  # noqa: E402

from burnish.config.registry import LOSS_TYPES  # noqa: E402


def _run(
    seconds: float, *, gb: float = 2.0, others: float | None = 0.01, trainable: int = 7, losses: Any = (0.7, 0.6)
) -> dict:
    return {
        "seconds": seconds,
        "gb": gb,
        "cpu_seconds": 2 * seconds,
        "busy": 0.98,
        "others": others,
        "peak_share": 0.5,
        "matmul_peak": 4e11,
        "losses": list(losses),
        "trainable": trainable,
    }


FACTS = {"rows": 40, "mean_prompt_tokens": 117.0, "mean_answer_tokens": 44.0, "left_out": {}}
RUNS = {
    "burnish": [_run(5.0, gb=1.0), _run(7.0, gb=1.0), _run(6.0, gb=1.0)],
    "defaults": [_run(60.0, gb=4.0, losses=(0.7, 0.61))],
    "tuned": [_run(50.0), _run(52.0)],
    "accumulated": [_run(40.0, losses=()), _run(42.0, losses=())],
}


def test_a_row_holds_medians_and_the_faster_tuned_variant() -> None:
    row = train_step.compute_row(Plan(method="dpo"), RUNS, FACTS)
    assert row["burnish_s"] == 6.0 and row["peer_s"] == 60.0
    assert row["time_ratio"] == 10.0 and row["memory_ratio"] == 4.0
    assert row["tuned_variant"] == "accumulated" and row["peer_tuned_s"] == 41.0
    assert row["loss_max_abs_diff"] == pytest.approx(0.01)
    assert row["disturbed"] == []


def test_a_disturbed_measurement_is_marked() -> None:
    runs = RUNS | {"defaults": [_run(60.0, others=0.2)]}
    row = train_step.compute_row(Plan(method="dpo"), runs, FACTS)
    assert row["disturbed"] == ["defaults"]
    table = results_table.build_table([row | {"threads": 2}])
    assert "60.0 s, 2.00 GB †" in table and "† Another program" in table
    assert "†" not in results_table.build_table([train_step.compute_row(Plan(method="dpo"), RUNS, FACTS)])


def test_time_of_other_programs_and_of_the_host_counts() -> None:
    before = "cpu  100 0 50 1000 10 0 5 0 0 0\ncpu0 1 2 3"
    after = "cpu  150 10 60 1500 90 1 6 20 0 0\ncpu0 1 2 3"
    assert disturbance.parse_busy(after) - disturbance.parse_busy(before) == 50 + 10 + 10 + 1 + 1 + 20
    assert disturbance.is_disturbed(0.06) and not disturbance.is_disturbed(0.05) and not disturbance.is_disturbed(None)


def test_sides_that_train_different_parameters_are_refused() -> None:
    with pytest.raises(SystemExit, match="different parameters"):
        train_step.compute_row(Plan(method="dpo"), RUNS | {"tuned": [_run(50.0, trainable=8)]}, FACTS)


def test_every_setting_has_a_line_in_one_table() -> None:
    rows = []
    for setting in ("full", "lora", "top_k", "padded"):
        runs = RUNS if setting != "lora" else {"burnish": [_run(3.0) | {"peak_share": None}], "defaults": [_run(30.0)]}
        rows.append(train_step.compute_row(Plan(method="sft", setting=setting), runs, FACTS))
    lines = results_table.build_table(rows).splitlines()
    assert [line.split(" | ")[1] for line in lines[-4:]] == ["full", "LoRA", "last layers", "full, `attention: padded`"]
    assert len({line.count(" | ") for line in lines[-4:]}) == 1
    assert lines[2].count("|") == lines[3].count("|") == lines[-1].count("|")
    assert "| – |" in lines[-3]  # LoRA was not measured against the tuned peer


def test_only_the_marked_block_of_the_page_changes() -> None:
    page = results_table.PAGE.read_text(encoding="utf-8")
    for name in ("results", "curve", "cost"):
        begin, end = results_table.BEGIN.format(name), results_table.END.format(name)
        changed = results_table.replace_section(page, name, "NEW\n")
        assert changed == page.partition(begin)[0] + begin + "\nNEW\n" + end + page.partition(end)[2]
    with pytest.raises(ValueError, match="no marks"):
        results_table.replace_section("nothing", "results", "")


def _cost(group: str, one: float, several: float) -> dict[str, Any]:
    spread = [0.97, 1.05]
    return {"group": group, "one": {"time": one, "spread": spread}, "several": {"time": several, "spread": spread}}


COST = {
    "variants": {"dpo sigmoid": _cost("uncoupled", 1.0, 1.0), "kto": _cost("coupled", 1.01, 1.3)},
    "cpu": "a processor",
    "commit": "abc",
    "tokens": 2000,
    "layers": 4,
    "rounds": 3,
    "scored": 700,
    "logits_mb": 87.5,
    "memory_mb": {"dpo sigmoid": 400.0, "dpo tdpo2": 420.0},
}


def test_every_preference_loss_is_measured() -> None:
    names = [v.name for v in loss_cost.list_variants()]
    assert {f"dpo {n}" for n in LOSS_TYPES["dpo"] if n != "sft"} | {"kto", "orpo", "simpo", "cpo"} <= set(names)
    assert len(names) == len(set(names)) and loss_cost.BASELINE in names


def test_the_page_takes_what_was_measured(tmp_path: Path) -> None:
    import json

    page = results_table.PAGE.read_text(encoding="utf-8")
    assert results_table.update_page(page, tmp_path) == page
    row = train_step.compute_row(Plan(method="reward"), RUNS, FACTS)
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    (tmp_path / "curve.json").write_text(json.dumps({"points": _points()}), encoding="utf-8")
    (tmp_path / "loss_cost.json").write_text(json.dumps(COST), encoding="utf-8")
    changed = results_table.update_page(page, tmp_path)
    assert "| kto | 1.01 (0.97–1.05) | 1.30 (0.97–1.05) |" in changed and "| dpo tdpo2 | 420 |" in changed
    assert "| reward model | full | 6.0 s, 1.00 GB |" in changed and "uneven lengths" in changed
    assert results_table.update_page(changed, tmp_path) == changed


def test_the_peer_is_measured_where_it_can_differ() -> None:
    both = Namespace(peer="trl", peer_mode="both", peer_only=False)
    assert train_step.choose_sides(both, "lora") == ["burnish", "defaults", "tuned", "accumulated"]
    assert train_step.choose_sides(both, "padded") == ["burnish"]
    assert train_step.choose_sides(Namespace(peer="none", peer_mode="both", peer_only=False), "full") == ["burnish"]


def test_accumulated_steps_hold_the_same_rows() -> None:
    plan = Plan(method="dpo", batch_size=8)
    found = build_arguments(plan, "accumulated", Path("x"))
    assert (found["per_device_train_batch_size"], found["gradient_accumulation_steps"]) == (2, 4)
    assert found["precompute_ref_log_probs"] is True and found["gradient_checkpointing"] is False
    assert not {"gradient_checkpointing", "precompute_ref_log_probs"} & set(
        build_arguments(plan, "defaults", Path("x"))
    )


@pytest.mark.parametrize("head", ["lm", "score"])
def test_both_sides_freeze_the_same_parameters(head: str) -> None:
    import copy

    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

    from burnish.models import freeze

    config = Qwen3Config(
        vocab_size=31,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        tie_word_embeddings=False,
        num_labels=1,
        pad_token_id=0,
    )
    ours: Any = (Qwen3ForCausalLM if head == "lm" else Qwen3ForSequenceClassification)(config)
    theirs = copy.deepcopy(ours)
    freeze.freeze_all_but_top(ours, TOP_K, head=head)
    freeze_all_but_top(theirs, 4)
    trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert trained[0] == trained[1] and 0 < len(trained[0]) < len(list(ours.named_parameters()))


# ---- the curve ----------------------------------------------------------------------------------------------------


def _points() -> list[dict[str, Any]]:
    """2 ms a token and 100 ms a step, exactly."""
    points = []
    for pairs in (2, 8, 64):
        tokens, steps = 200 * 64, 64 // pairs
        seconds = 0.002 * tokens + 0.1 * steps
        points.append(
            {
                "axis": "pairs",
                "label": str(pairs),
                "tokens": tokens,
                "steps": steps,
                "seconds": seconds,
                "gb": 1.5,
                "ms_per_token": 1000 * seconds / tokens,
            }
        )
    for label in ("even", "uneven"):
        points.append(
            {
                "axis": "rows",
                "label": label,
                "tokens": 6000,
                "padded_tokens": 20000,
                "seconds": 12.0,
                "ms_per_token": 2.0,
            }
        )
    return points


def test_the_fit_finds_cost_a_token_and_cost_a_step() -> None:
    slope, step = curve.fit_cost([p for p in _points() if p["axis"] == "pairs"])
    assert slope == pytest.approx(0.002) and step == pytest.approx(0.1)


def test_the_curve_becomes_a_table_and_a_figure(tmp_path: Path) -> None:
    found = {"points": _points()}
    text = curve.build_section(found)
    assert "2.00 ms a token and 100 ms" in text and "changes by +0 %" in text and "uneven lengths" in text
    curve.draw_curve(found, tmp_path / "a.svg")
    curve.draw_curve(found, tmp_path / "b.svg")
    drawn = (tmp_path / "a.svg").read_bytes()
    assert drawn.startswith(b"<?xml") and drawn == (tmp_path / "b.svg").read_bytes()


def test_padded_tokens_are_those_of_each_steps_rectangle() -> None:
    def pair(prompt: int, good: int, bad: int) -> Pair:
        return Pair("", "", "", "", [0] * prompt, [0] * good, [0] * bad)

    assert curve.count_padded([pair(5, 3, 4), pair(4, 4, 2), pair(1, 1, 1)], 2) == 4 * 9 + 2 * 2

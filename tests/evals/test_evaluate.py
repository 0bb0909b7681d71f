"""A whole evaluation with tiny subjects: the figures are recomputed here from single items, one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from burnish.config.stages import EvaluateSettings
from burnish.core.batch import build_packed_batch
from burnish.errors import ConfigError, NumericStop, UsageError
from burnish.evals.evaluate import build_prompts, evaluate_subjects
from burnish.evals.intervals import compute_wilson
from burnish.evals.measure import choose_items
from burnish.evals.subjects import EvaluationData, Subject
from burnish.models.policy import Policy
from tests.evals.tiny import Shelf, build_data, build_groups, build_tokenizer
from tests.losses.tiny import build_model

SUBJECTS = [
    Subject("base", Path("lm-0")),
    Subject("tuned", Path("lm-1"), compare_to="base", reference_folder=Path("lm-0")),
    Subject("scorer", Path("score-2"), head="score"),
]
ALL = EvaluateSettings(tasks=["loss", "preferences", "set/one", "win_rate"], max_new_tokens=6, samples=3)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, list[str]]:
    folder = tmp_path_factory.mktemp("evaluation")
    shelf = Shelf()
    return evaluate_subjects(SUBJECTS, ALL, data=build_data(), out_dir=folder, load=shelf), folder, shelf.seen


def pick(figures: dict[str, Any], subject: str, task: str, metric: str) -> dict[str, Any]:
    (row,) = [r for r in figures["table"] if (r["subject"], r["task"], r["metric"]) == (subject, task, metric)]
    return row


def compare(figures: dict[str, Any], task: str, metric: str) -> dict[str, Any]:
    (row,) = [r for r in figures["comparisons"] if (r["task"], r["metric"]) == (task, metric)]
    return row


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def sums(seed: int, k: int) -> np.ndarray:
    """(G, K) Σ log π, one group at a time."""
    policy = Policy(build_model("lm", seed), head="lm").eval()
    rows = []
    for group in build_groups(12, k):
        batch = build_packed_batch([group])
        with torch.no_grad():
            out = policy(batch, frozenset({"logprobs"}))
        rows.append(batch.table.sum_tokens(out.logprobs.double()).tolist())
    return np.array(rows)


def test_rows_have_the_agreed_columns(done: Any) -> None:
    figures, _, _ = done
    for row in figures["table"]:
        assert list(row) == ["subject", "task", "metric", "value", "low", "high", "n", "higher_is_better"]
        assert row["n"] == 12 and row["low"] <= row["value"] <= row["high"]
        assert row["higher_is_better"] is (row["metric"] != "loss")
    for row in figures["comparisons"]:
        assert list(row) == ["task", "metric", "a", "b", "difference", "low", "high", "p_value", "test", "n"]
        assert (row["a"], row["b"]) == ("base", "tuned") and 0 < row["p_value"] <= 1
    assert json.loads(json.dumps(figures, allow_nan=False)) == figures


def test_every_model_is_loaded_once(done: Any) -> None:
    assert done[2] == ["lm-0", "lm-1", "score-2"], "the reference is the base; the judge is the scorer"


def test_loss_is_over_tokens(done: Any) -> None:
    tokens = np.array([g.completions[0].scored for g in build_groups(12, 1)])
    losses = {}
    for name, seed in (("base", 0), ("tuned", 1)):
        losses[name] = -sums(seed, 1)[:, 0].sum() / tokens.sum()
        assert pick(done[0], name, "loss", "loss")["value"] == pytest.approx(losses[name], rel=1e-6)
    assert compare(done[0], "loss", "loss")["difference"] == pytest.approx(losses["tuned"] - losses["base"], rel=1e-5)


def test_preferences_with_and_without_the_reference(done: Any) -> None:
    base, tuned = sums(0, 2), sums(1, 2)
    ranking = float(np.mean(tuned[:, 0] > tuned[:, 1]))
    margin = (tuned - base)[:, 0] - (tuned - base)[:, 1]
    assert pick(done[0], "tuned", "preferences", "ranking_accuracy")["value"] == ranking
    found = pick(done[0], "tuned", "preferences", "accuracy")
    want = compute_wilson(float((margin > 0).sum()), 12)
    assert (found["value"], found["low"], found["high"]) == (want.value, want.low, want.high)
    assert pick(done[0], "tuned", "preferences", "margin")["value"] == pytest.approx(margin.mean(), rel=1e-5)
    assert not [
        r
        for r in done[0]["table"]
        if r["subject"] == "base" and r["metric"] == "accuracy" and r["task"] == "preferences"
    ]
    assert compare(done[0], "preferences", "ranking_accuracy")["test"] == "mcnemar"


def test_s2_07_the_reward_model_is_measured_on_held_out_pairs(done: Any) -> None:
    policy = Policy(build_model("score", 2), head="score").eval()
    with torch.no_grad():
        rows = [policy(build_packed_batch([g]), frozenset({"scores"})).scores.tolist() for g in build_groups(12, 2)]
    difference = np.array(rows)[:, 0] - np.array(rows)[:, 1]
    assert pick(done[0], "scorer", "preferences", "accuracy")["value"] == pytest.approx(np.mean(difference > 0))
    report = done[0]["reward_reports"]["scorer"]
    assert report["pairs"] == 12 and report["difference"]["mean"] == pytest.approx(difference.mean(), rel=1e-5)
    assert set(report["by_source"]) == {"a", "b"} and "length_bias" in report


def test_items_are_kept_so_that_every_figure_can_be_made_again(done: Any) -> None:
    figures, folder, _ = done
    items = read(folder / "items.jsonl")
    for name in ("base", "tuned"):
        rows = [r for r in items if r["task"] == "loss" and r["subject"] == name]
        again = sum(r["nll"] for r in rows) / sum(r["tokens"] for r in rows)
        assert pick(figures, name, "loss", "loss")["value"] == pytest.approx(again)
        marks = [r["mark"] for r in items if r["task"] == "set/one" and r["subject"] == name]
        assert pick(figures, name, "set/one", "accuracy")["value"] == pytest.approx(np.mean(marks))
    scores = {
        n: {r["id"]: r["score"] for r in items if r["task"] == "win_rate" and r["subject"] == n}
        for n in ("base", "tuned")
    }
    wins = [np.sign(scores["tuned"][i] - s) / 2 + 0.5 for i, s in scores["base"].items()]
    assert pick(figures, "tuned", "win_rate", "vs_base/win_rate")["value"] == pytest.approx(np.mean(wins))
    assert json.loads((folder / "figures.json").read_text("utf-8")) == figures


def test_samples_show_the_same_items_side_by_side(done: Any) -> None:
    rows = read(done[1] / "samples.jsonl")
    assert [r["task"] for r in rows] == ["set/one"] * 3 + ["win_rate"] * 3
    for row in rows:
        assert list(row) == ["task", "id", "prompt", "reference", "answers", "marks"]
        assert set(row["answers"]) == {"base", "tuned"}
        assert set(row["marks"]) == ({"base", "tuned"} if row["task"] == "set/one" else set())


def test_t33_figures_do_not_depend_on_the_batch(done: Any, tmp_path: Path) -> None:
    for budget, batch_size in ((8, 1), (10_000, 5)):
        settings = ALL.model_copy(update={"batch_size": batch_size})
        found = evaluate_subjects(SUBJECTS, settings, data=build_data(), out_dir=tmp_path, load=Shelf(budget))
        for row, want in zip(found["table"], done[0]["table"], strict=True):
            assert row["value"] == pytest.approx(want["value"], rel=1e-5, abs=1e-6), row
        for row, want in zip(found["comparisons"], done[0]["comparisons"], strict=True):
            assert row["p_value"] == pytest.approx(want["p_value"], abs=1e-3), row


def test_the_same_evaluation_twice_writes_the_same_bytes(done: Any, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    evaluate_subjects(SUBJECTS, ALL, data=build_data(), out_dir=tmp_path, load=Shelf())
    assert torch.equal(state, torch.get_rng_state()), "T-37: the global random state is left alone"
    for name in ("figures.json", "items.jsonl", "samples.jsonl"):
        assert (tmp_path / name).read_bytes() == (done[1] / name).read_bytes()


def test_a_model_against_itself_is_a_draw(tmp_path: Path) -> None:
    subjects = [
        Subject("one", Path("lm-0")),
        Subject("two", Path("lm-0"), compare_to="one", reference_folder=Path("lm-0")),
    ]
    judge = Subject("scorer", Path("score-2"), head="score")
    found = evaluate_subjects(subjects, ALL, data=build_data(), out_dir=tmp_path, judge=judge, load=Shelf())
    assert pick(found, "two", "win_rate", "vs_one/win_rate")["value"] == 0.5
    assert pick(found, "two", "preferences", "accuracy")["value"] == 0.5, "all pairs are ties"
    assert {r["p_value"] for r in found["comparisons"]} == {1.0}
    assert {r["difference"] for r in found["comparisons"]} == {0.0}


def test_items_whose_gold_is_broken_are_left_out_and_told(tmp_path: Path) -> None:
    whole = build_data()
    assert whole.prompts is not None
    prompts = whole.prompts

    def broken(name: str, tokenizer: Any) -> Any:
        return [replace(p, reference="see above") if i < 2 else p for i, p in enumerate(prompts(name, tokenizer))]

    settings = EvaluateSettings(tasks=["set/one"], max_new_tokens=4)
    found = evaluate_subjects(
        SUBJECTS[:1], settings, data=replace(whole, prompts=broken), out_dir=tmp_path, load=Shelf()
    )
    assert pick(found, "base", "set/one", "accuracy")["n"] == 10
    assert any("2 items have no final number" in note for note in found["notes"])


def test_right_answers_are_marked_right(tmp_path: Path) -> None:
    """The gold of each prompt is what the model answers, so accuracy is the share of answers with a number."""
    settings = EvaluateSettings(tasks=["set/one"], max_new_tokens=30)
    evaluate_subjects(SUBJECTS[:1], settings, data=build_data(), out_dir=tmp_path, load=Shelf())
    answers = {r["id"]: r for r in read(tmp_path / "items.jsonl")}
    readable = [i for i, r in answers.items() if r["reason"] == ""]
    assert readable, "the tiny model writes digits"
    whole = build_data()
    assert whole.prompts is not None
    prompts = whole.prompts

    def golden(name: str, tokenizer: Any) -> Any:
        return [
            replace(p, reference=answers[p.id]["answer"] if p.id in readable else "5") for p in prompts(name, tokenizer)
        ]

    found = evaluate_subjects(
        SUBJECTS[:1], settings, data=replace(whole, prompts=golden), out_dir=tmp_path, load=Shelf()
    )
    assert pick(found, "base", "set/one", "accuracy")["value"] == pytest.approx(len(readable) / 12)
    assert pick(found, "base", "set/one", "answered_share")["value"] == pytest.approx(len(readable) / 12)


def test_max_items_takes_the_same_seeded_choice_for_all() -> None:
    assert choose_items(5, 9, 0) == [0, 1, 2, 3, 4]
    assert choose_items(100, 10, 1) == choose_items(100, 10, 1) != choose_items(100, 10, 2)
    assert len(set(choose_items(100, 10, 1))) == 10 and choose_items(100, 10, 1) == sorted(choose_items(100, 10, 1))


def test_prompts_of_pairs_are_asked_once() -> None:
    pairs = build_groups(3, 2)
    found = build_prompts([*pairs, replace(pairs[0], id="again")], build_tokenizer())
    assert [p.id for p in found] == ["row:0", "row:1", "row:2"]
    assert found[0].reference.endswith("<eos>") is False


@pytest.mark.parametrize(
    ("subjects", "changes", "data", "error", "message"),
    [
        ([SUBJECTS[0], SUBJECTS[0]], {}, None, UsageError, "one name"),
        ([SUBJECTS[1]], {}, None, UsageError, "not evaluated"),
        (SUBJECTS[:2], {"tasks": ["win_rate"]}, None, ConfigError, "needs a reward model"),
        (SUBJECTS, {"tasks": ["loss"]}, EvaluationData(), ConfigError, "task loss has no held-out items"),
        (SUBJECTS, {"tasks": ["set/two"]}, EvaluationData(), ConfigError, "task set/two"),
    ],
)
def test_what_cannot_be_measured_is_an_error(
    subjects: Any, changes: Any, data: Any, error: Any, message: str, tmp_path: Path
) -> None:
    settings = ALL.model_copy(update=changes)
    with pytest.raises(error, match=message) as caught:
        evaluate_subjects(subjects, settings, data=data or build_data(), out_dir=tmp_path, load=Shelf())
    assert caught.value.remedy


def test_t30_a_model_that_gives_nan_stops_the_evaluation_and_names_rows(tmp_path: Path) -> None:
    class Broken(Shelf):
        def __call__(self, folder: Path, head: str) -> Any:
            found = super().__call__(folder, head)
            with torch.no_grad():
                found.policy.inner.lm_head.weight.fill_(float("nan"))
            return found

    settings = EvaluateSettings(tasks=["loss"])
    with pytest.raises(NumericStop, match="row:0"):
        evaluate_subjects(SUBJECTS[:1], settings, data=build_data(), out_dir=tmp_path, load=Broken())


def test_a_judge_with_another_tokenizer_is_refused(tmp_path: Path) -> None:
    class Mixed(Shelf):
        def __call__(self, folder: Path, head: str) -> Any:
            found = super().__call__(folder, head)
            if head == "score":
                found.tokenizer = build_tokenizer(words="v")
            return found

    settings = EvaluateSettings(tasks=["win_rate"], max_new_tokens=3)
    with pytest.raises(ConfigError, match="another tokenizer"):
        evaluate_subjects(SUBJECTS, settings, data=build_data(), out_dir=tmp_path, load=Mixed())

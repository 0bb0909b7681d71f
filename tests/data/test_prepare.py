"""From settings to groups (S1-05, S4-18, T-13, T-15, T-21, R-06: D-10, D-12, D-13, D-14)."""

import json
from pathlib import Path
from typing import Any

import pytest

from burnish.config.data import DataSource
from burnish.data.prepare import prepare_data
from burnish.data.problems import DataProblems
from burnish.data.report import DataReport
from burnish.errors import ConfigError, DataError
from tests.data.toys import chat, chat_tokenizer, dpo, pair, plain_tokenizer, reward, sft, write_lines


def prompts(groups: list[Any]) -> set[tuple[int, ...]]:
    return {tuple(group.prompt.tolist()) for group in groups}


def test_sft_has_one_completion_and_pairs_have_two(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(3)])
    one, two = prepare_data(sft(file), plain_tokenizer()), prepare_data(dpo(file), plain_tokenizer())
    assert [len(g.completions) for g in one.train] == [1, 1, 1] and [len(g.completions) for g in two.train] == [2, 2, 2]
    assert one.train[0].completions[0].ids.tolist() == two.train[0].completions[0].ids.tolist(), "SFT uses chosen"
    assert two.train[0].tags == {"source": "a"} and not two.held_out
    assert "«" in one.example and "a.jsonl:1" in one.example
    assert one.fingerprint != two.fingerprint and len(one.fingerprint) == 64


def test_margins_are_columns_of_every_group(tmp_path: Path) -> None:
    plain = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(3)])
    some = write_lines(tmp_path / "b.jsonl", [pair(1, margin=1.5), pair(2), pair(3, margin=0.5)])
    assert [dict(g.columns) for g in prepare_data(dpo(plain), plain_tokenizer()).train] == [{}] * 3
    assert [dict(g.columns) for g in prepare_data(reward(plain), plain_tokenizer()).train] == [{"margin": 0.0}] * 3
    made = prepare_data(dpo(some), plain_tokenizer())
    assert [g.columns["margin"] for g in made.train] == [1.5, 0.0, 0.5]
    assert any("1 rows have no margin" in note for note in made.report.notes)


def test_s4_18_held_out_by_prompt(tmp_path: Path) -> None:
    rows = [pair(i // 3, chosen=f" answer {i}") for i in range(60)]
    made = prepare_data(dpo(write_lines(tmp_path / "a.jsonl", rows), validation_split=0.2), plain_tokenizer())
    assert len(made.held_out) == 12 and not prompts(made.train) & prompts(made.held_out)
    assert made.report.splits["train"].rows_read == 48 and made.report.splits["held_out"].rows_read == 12
    assert "validation_split 0.2" in made.report.held_out_from
    same = prepare_data(dpo(write_lines(tmp_path / "a.jsonl", rows), validation_split=0.2), plain_tokenizer())
    assert same.fingerprint == made.fingerprint


def test_s4_18_the_sources_own_test_split_comes_first(tmp_path: Path) -> None:
    write_lines(tmp_path / "train.jsonl", [pair(i) for i in range(10)])
    write_lines(tmp_path / "test.jsonl", [pair(i) for i in range(8, 14)])
    made = prepare_data(dpo(str(tmp_path), validation_split=0.5), plain_tokenizer())
    assert len(made.train) == 10 and len(made.held_out) == 4
    assert made.report.splits["held_out"].leaked.rows == [
        "test.jsonl:1 (= train.jsonl:9)",
        "test.jsonl:2 (= train.jsonl:10)",
    ]
    limited = prepare_data(dpo(str(tmp_path), max_eval_samples=2, max_samples=5), plain_tokenizer())
    assert (len(limited.train), len(limited.held_out)) == (5, 2)
    test_only = prepare_data(dpo(DataSource(source=str(tmp_path), split="test")), plain_tokenizer())
    assert len(test_only.train) == 6 and not test_only.held_out


def test_d10_leakage_into_named_evaluation_data_is_an_error(tmp_path: Path) -> None:
    train = write_lines(tmp_path / "train.jsonl", [pair(i) for i in range(5)])
    evaluation = write_lines(tmp_path / "held.jsonl", [pair(9), pair(3, chosen=" other")])
    with pytest.raises(DataProblems) as caught:
        prepare_data(dpo(train, eval_data=evaluation), plain_tokenizer())
    assert "held.jsonl:2" in str(caught.value) and "train.jsonl:4" in str(caught.value)
    skipped = prepare_data(dpo(train, eval_data=evaluation, on_error="skip"), plain_tokenizer())
    assert len(skipped.held_out) == 1 and skipped.report.splits["held_out"].leaked.count == 1
    assert skipped.report.held_out_from == "eval_data"


def test_d10_duplicate_ids_name_both_lines(tmp_path: Path) -> None:
    rows = [pair(1, id="x"), pair(2, id="y"), pair(3, id="x")]
    with pytest.raises(DataProblems) as caught:
        prepare_data(dpo(write_lines(tmp_path / "a.jsonl", rows)), plain_tokenizer())
    assert "a.jsonl:3: id: the id 'x' stands at a.jsonl:1 already" in str(caught.value)


def test_d12_identical_pairs(tmp_path: Path) -> None:
    rows = [pair(i) if i > 7 else pair(i, rejected=f" good answer {i} ") for i in range(10)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataProblems) as caught:
        prepare_data(dpo(file), plain_tokenizer())
    text = str(caught.value)
    assert (
        caught.value.total == 8 and "the same at lines 2, 3, 4, 5, and 3 more rows" in text and "drop_identical" in text
    )
    made = prepare_data(dpo(file, drop_identical=True), plain_tokenizer())
    assert len(made.train) == 2 and made.report.splits["train"].identical.count == 8
    assert made.report.splits["train"].rows_read == 10


def test_d13_long_prompts_are_named(tmp_path: Path) -> None:
    rows = [pair(1), pair(2, prompt="many words " * 40)]
    made = prepare_data(dpo(write_lines(tmp_path / "a.jsonl", rows), max_length=40), plain_tokenizer())
    (name,) = made.report.splits["train"].over_length.rows
    assert name.startswith("a.jsonl:2 (the prompt alone has") and "max_length is 40" in name


def test_t21_nothing_left_is_an_error_with_the_counts(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(5)])
    with pytest.raises(DataError, match="no training example is left") as caught:
        prepare_data(dpo(file, max_length=5), plain_tokenizer())
    assert "5 over the length limit" in str(caught.value)
    broken = write_lines(tmp_path / "b.jsonl", [{"prompt": "a"}])
    with pytest.raises(DataError):
        prepare_data(dpo(broken, on_error="skip"), plain_tokenizer())
    with pytest.raises(ConfigError, match="no training data"):
        prepare_data(dpo(None), plain_tokenizer())


def test_t14_many_pairs_made_equal_by_the_cut_stop_the_stage(tmp_path: Path) -> None:
    long = " same words" * 30
    rows = [pair(i, chosen=f"{long} {i}", rejected=f"{long} x") for i in range(9)] + [pair(9)]
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataError, match="made both answers equal in 9 of 10"):
        prepare_data(dpo(file, max_length=40, truncation="keep_start"), plain_tokenizer())
    with pytest.raises(ConfigError, match="the model takes 30 tokens"):
        prepare_data(dpo(file, max_length=40), plain_tokenizer(), context=30)


def test_all_problems_come_in_one_error(tmp_path: Path) -> None:
    rows: list[Any] = [
        pair(1),
        '{"prompt": ',
        pair(2, rejected=5),
        pair(3, chosen=""),
        {"prompt": "p"},
        pair(4, rejected=" good answer 4"),
    ]
    file = write_lines(tmp_path / "a.jsonl", rows)
    with pytest.raises(DataProblems) as caught:
        prepare_data(dpo(file), plain_tokenizer())
    assert [problem.line for problem in caught.value.problems] == [2, 3, 4, 5, 6]
    assert {problem.kind for problem in caught.value.problems} == {
        "json",
        "type",
        "empty answer",
        "missing column",
        "identical pair",
    }
    made = prepare_data(dpo(file, on_error="skip"), plain_tokenizer())
    counts = made.report.splits["train"]
    assert (counts.rows_read, counts.kept, counts.malformed.count) == (6, 1, 5)
    assert counts.malformed.rows[0].startswith("a.jsonl:2 (not valid JSON")


def test_s1_05_columns_for_all_or_one_source(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [{"q": "p", "better": " a", "worse": " b"}])
    columns = {"prompt": "q", "chosen": "better", "rejected": "worse"}
    for settings in (dpo(file, columns=columns), dpo(DataSource(source=file, columns=columns))):
        assert len(prepare_data(settings, plain_tokenizer()).train) == 1
    with pytest.raises(DataProblems, match="columns found: q, better, worse"):
        prepare_data(dpo(file), plain_tokenizer())
    bundled = write_lines(tmp_path / "b.jsonl", [{"system": "s", "question": "q", "chosen": "a", "rejected": "b"}])
    (group,) = prepare_data(dpo(bundled, columns="orca_dpo_pairs"), chat_tokenizer()).train
    assert chat_tokenizer().decode(group.prompt).startswith("<|im_start|>system\ns")


def test_s0_30_slices_and_samples_of_a_source(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(40)])
    made = prepare_data(dpo(DataSource(source=file, split="train[10%:50%]")), plain_tokenizer())
    assert [group.id for group in made.train] == [f"a.jsonl:{i}" for i in range(5, 21)]
    made = prepare_data(dpo(DataSource(source=file, max_samples=7)), plain_tokenizer())
    assert len(made.train) == 7 and made.report.splits["train"].unused == 33


def test_s2_05_sft_and_reward_slices_are_disjoint(tmp_path: Path) -> None:
    rows = [
        {"prompt": [{"role": "user", "content": f"q {i // 2}"}], "chosen": f"a {i}", "rejected": "b"}
        for i in range(200)
    ]
    file, tokenizer = write_lines(tmp_path / "a.jsonl", rows), chat_tokenizer()
    first = prepare_data(sft(file, slice_share=0.3, seed=1), tokenizer)
    second = prepare_data(reward(file, slice_share=0.7, slice_offset=0.3, seed=2), tokenizer)
    assert not prompts(first.train) & prompts(second.train)
    assert len(first.train) + len(second.train) == 200
    assert first.report.splits["train"].unused == len(second.train)


def test_mixtures_are_seeded_and_tagged(tmp_path: Path) -> None:
    a = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(30)])
    b = write_lines(tmp_path / "b.jsonl", [pair(100 + i) for i in range(10)])
    whole = prepare_data(dpo([a, b]), plain_tokenizer())
    assert whole.report.splits["train"].sources == {"a": 30, "b": 10}
    (tmp_path / "other").mkdir()
    namesake = write_lines(tmp_path / "other" / "a.jsonl", [pair(200)])
    assert prepare_data(dpo([a, namesake]), plain_tokenizer()).report.splits["train"].sources == {a: 30, namesake: 1}
    weighted = dpo([DataSource(source=a, weight=1.0, name="first"), DataSource(source=b, weight=2.0)])
    made = prepare_data(weighted, plain_tokenizer())
    assert made.report.splits["train"].sources == {"first": 5, "b": 10}
    assert [g.id for g in made.train] == [g.id for g in prepare_data(weighted, plain_tokenizer()).train]


def test_plain_rows_for_a_chat_model_are_remarked_on(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(1)])
    assert any("chat template is not used" in note for note in prepare_data(dpo(file), chat_tokenizer()).report.notes)
    (group,) = prepare_data(dpo(DataSource(source=file, format="instruct")), chat_tokenizer()).train
    assert chat_tokenizer().decode(group.prompt).startswith("<|im_start|>user\nquestion 1:")
    with pytest.raises(ConfigError, match="no row format 'instrct'"):
        prepare_data(dpo(DataSource(source=file, format="instrct")), chat_tokenizer())


def test_think_blocks_and_templates_come_from_the_settings(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [chat("q", "<think>hm</think>a")])
    made = prepare_data(sft(file, strip_think=True, chat_template_kwargs={"x": 1}), chat_tokenizer())
    assert "hm" not in made.example
    (tmp_path / "t.jinja").write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}")
    made = prepare_data(sft(file, chat_template=str(tmp_path / "t.jinja")), chat_tokenizer())
    assert "[q]" in made.example and made.report.splits["train"].without_eos.count == 1


def test_duplicates_are_counted(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(1), pair(2), pair(1)])
    counts = prepare_data(dpo(file), plain_tokenizer()).report.splits["train"]
    assert counts.duplicates.rows == ["a.jsonl:3 (= a.jsonl:1)"] and counts.kept == 3


def test_the_report_speaks_and_round_trips(tmp_path: Path) -> None:
    file = write_lines(tmp_path / "a.jsonl", [pair(i) for i in range(10)] + [pair(11, chosen=" word" * 90)])
    report = prepare_data(dpo(file, max_length=60, validation_split=0.2), plain_tokenizer()).report
    lines = report.lines()
    assert any("rows read" in line and "scored" in line for line in lines)
    assert any("1 over the length limit, left out (truncation cuts instead): a.jsonl:11" in line for line in lines)
    assert DataReport.from_json(report.to_json()) == report


def test_bundled_sets_prepare() -> None:
    from burnish.data.bundled import list_data, resolve_model
    from burnish.data.tokenizer import TextTokenizer

    if resolve_model("pocket") is None:
        pytest.skip("the bundled model is not there")
    tokenizer = TextTokenizer.load("pocket")
    for name in list_data():
        make = dpo if "preference" in name else sft
        settings = make(name, max_samples=500, max_eval_samples=100)
        made = prepare_data(settings, tokenizer)
        counts = made.report.splits["train"]
        assert made.train and made.held_out
        assert not (
            counts.malformed.count or counts.over_length.count or counts.apart.count or counts.without_eos.count
        )
        assert made.report.splits["held_out"].leaked.count == 0


def test_t15_counts_of_real_rows(shared: Path) -> None:
    made = prepare_data(sft(str(shared / "data" / "gsm8k"), max_length=300, truncation="skip"), chat_tokenizer())
    for counts in made.report.splits.values():
        assert counts.rows_read == counts.kept + counts.over_length.count + counts.leaked.count + counts.malformed.count
    assert made.report.splits["train"].rows_read == 2000 and made.report.splits["held_out"].rows_read == 600
    assert made.report.held_out_from == "the source's own test split"


def test_s0_22_the_sample_of_judged_rollouts_trains() -> None:
    """The documented file has the fields that the format promises, and becomes pairs."""
    file = Path(__file__).resolve().parents[2] / "docs" / "rollout_judged.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert set(row) == {"prompt_messages", "chosen", "rejected", "metadata"}
        assert row["prompt_messages"][-1]["role"] == "user" and len(row["chosen"]) == len(row["rejected"]) == 1
        assert set(row["metadata"]) >= {"source", "seed", "k_candidates", "generator_model", "judge", "reward_model"}
        assert set(row["metadata"]["reference_responses"]) == {"chosen", "rejected"}
    for tokenizer in (chat_tokenizer(), plain_tokenizer()):
        made = prepare_data(dpo(str(file)), tokenizer)
        assert len(made.train) == 4 and not made.report.splits["train"].malformed.count
    assert "\n\nHuman: I lost my keys" in plain_tokenizer().decode(made.train[1].prompt)

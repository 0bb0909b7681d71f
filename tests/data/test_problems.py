"""Problems are collected, listed up to 20, counted beyond, equal ones together."""

import pytest

from burnish.data.problems import DataProblems, Problem, ProblemLog, RowError


def problem(line: int, message: str = "wrong", **more: bool) -> Problem:
    return Problem("a.jsonl", line, "text", message, f"mend {message}", "type", **more)


def test_all_different_problems_are_listed_up_to_20_then_counted() -> None:
    log = ProblemLog()
    for n in range(30):
        log.add(problem(n, f"wrong {n}"))
    with pytest.raises(DataProblems) as caught:
        log.raise_if_due()
    text = str(caught.value)
    assert caught.value.total == 30 and len(caught.value.problems) == 20
    assert "a.jsonl:19: text: wrong 19" in text and "→ mend wrong 19" in text
    assert "wrong 20" not in text and "10 further problems" in text
    assert caught.value.exit_code == 2 and caught.value.found[0]["line"] == 0


def test_equal_problems_show_the_first_5_and_a_count() -> None:
    log = ProblemLog()
    for n in range(1, 101):
        log.add(problem(n))
    log.add(problem(7, "other"))
    with pytest.raises(DataProblems) as caught:
        log.raise_if_due()
    text = str(caught.value)
    assert "a.jsonl:1: text: wrong\n" in text and "the same at lines 2, 3, 4, 5, and 95 more rows" in text
    assert "a.jsonl:7: text: other" in text
    assert text.count("mend wrong") == 1


def test_skipping_raises_only_what_is_fatal() -> None:
    log = ProblemLog("skip")
    log.add(problem(1))
    log.raise_if_due()
    log.add(problem(2, "unreadable", fatal=True))
    with pytest.raises(DataProblems) as caught:
        log.raise_if_due()
    assert caught.value.total == 1


def test_refused_rows_are_told() -> None:
    log, heard = ProblemLog("skip"), []
    with log.counting(lambda p: heard.append(p.row)):
        log.add(problem(3))
        log.drop(RowError("tie", kind="tie").at("folder/b.jsonl", 4))
    log.add(problem(5))
    assert heard == ["a.jsonl:3", "b.jsonl:4"]
    assert log.total == 2 and len(log.dropped) == 1

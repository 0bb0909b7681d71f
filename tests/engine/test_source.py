"""Which examples a step trains on."""

from __future__ import annotations

from collections import Counter

import pytest

from burnish.engine.source import OfflineSource, extend_ledger
from burnish.errors import DataError
from tests.engine.tiny import build_groups


def _source(n: int = 10, **changes) -> OfflineSource:
    options = {"batch_size": 4, "epochs": 1.0, "max_steps": -1, "seed": 3, "shuffle": True} | changes
    return OfflineSource(build_groups(n), **options)


def test_each_example_once_per_epoch_and_the_rest_is_kept():
    source = _source(10, epochs=2.0)
    assert source.total_steps == 6
    for epoch in range(2):
        steps = [source.step(epoch * 3 + i) for i in range(3)]
        assert [len(s.groups) for s in steps] == [4, 4, 2]
        assert [s.ends_epoch for s in steps] == [False, False, True]
        assert Counter(g.id for s in steps for g in s.groups) == Counter(f"row:{i}" for i in range(10))


def test_the_order_is_a_function_of_seed_and_epoch_alone():
    a, b = _source(epochs=2.0), _source(epochs=2.0)
    b.step(2)
    assert [g.id for g in a.step(0).groups] == [g.id for g in b.step(0).groups]
    assert [g.id for g in a.step(0).groups] != [g.id for g in _source(seed=4).step(0).groups]
    second = a.step(a.steps_per_epoch).groups
    assert len(second) == 4 and [g.id for g in a.step(0).groups] != [g.id for g in second]


def test_without_shuffle_the_file_order_holds():
    assert [g.id for g in _source(shuffle=False).step(0).groups] == ["row:0", "row:1", "row:2", "row:3"]


def test_t21_a_run_that_would_do_no_step_is_an_error():
    """T-21: no steps must never look like a finished run."""
    with pytest.raises(DataError):
        OfflineSource([], batch_size=4, epochs=1, max_steps=-1, seed=0, shuffle=True)
    with pytest.raises(DataError):
        _source(max_steps=0)


def test_the_ledger_depends_on_order():
    groups = build_groups(3)
    assert extend_ledger("", groups) != extend_ledger("", groups[::-1])
    assert extend_ledger(extend_ledger("", groups[:1]), groups[1:]) == extend_ledger(
        extend_ledger("", groups[:1]), groups[1:]
    )

"""Errors travel between processes whole."""

from __future__ import annotations

import pickle

import pytest

from burnish.errors import BurnishError, ConfigError, InterruptedRun, UsageError


@pytest.mark.parametrize(
    "error",
    [
        UsageError("changed", where="run", found=["beta"], remedy="take it back"),
        ConfigError("wrong", remedy="mend it"),
        InterruptedRun("stopped", signum=15, remedy="again"),
    ],
)
def test_an_error_of_rank_0_is_the_same_on_every_rank(error):
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error) and str(found) == str(error)
    assert vars(found) == vars(error) and found.exit_code == error.exit_code


def test_an_error_needs_a_remedy():
    with pytest.raises(ValueError, match="remedy"):
        BurnishError("x", remedy="")

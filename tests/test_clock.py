"""The two clocks, and the hook by which tests set the second one wrong."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
from pathlib import Path

import pytest

CODE = "from burnish.clock import wall; print(wall())"


def read_wall(offset: Path, testing: str) -> float:
    """Seconds by which a process's wall clock is ahead of this one's."""
    env = os.environ | {"BURNISH_CLOCK": str(offset), "BURNISH_TESTING": testing}
    said = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True, check=True).stdout
    return (datetime.datetime.fromisoformat(said.strip()) - datetime.datetime.now().astimezone()).total_seconds()


@pytest.mark.parametrize("seconds", [-3600, 31536000])
def test_r36_wall_clock_can_be_set_wrong_in_tests_only(tmp_path: Path, seconds: int) -> None:
    """R-36: the hook moves `wall` while testing and does nothing otherwise."""
    offset = tmp_path / "clock"
    offset.write_text(str(seconds))
    assert abs(read_wall(offset, "1") - seconds) < 1800
    assert abs(read_wall(offset, "0")) < 1800

"""The record of margins: its fields, and what a crash or a resume may do to it."""

from __future__ import annotations

import numpy as np
import pytest

from burnish.errors import ResourceError
from burnish.track.margins import MARGINS, MarginLog, are_too_many_zeros, summarise_margins
from burnish.track.metrics import read_metrics


def test_s0_14_the_fields_of_a_record() -> None:
    """S0-14: by hand; std with ddof 0, quantiles interpolated, pos_frac without zeros."""
    row = summarise_margins(np.asarray([2.0, -1.0, 0.0, 3.0, 1e-6]), sample=2)
    assert row == {
        "batch_size": 5,
        "mean": pytest.approx(4.000001 / 5),
        "std": pytest.approx(1.469694, rel=1e-5),
        "min": -1.0,
        "p10": pytest.approx(-0.6),
        "median": pytest.approx(1e-6),
        "p90": pytest.approx(2.6),
        "max": 3.0,
        "pos_frac": 0.6,
        "zero_frac": 0.4,
        "sample": [2.0, -1.0],
    }


def test_zeros_are_said_only_when_the_policy_has_had_time() -> None:
    assert not are_too_many_zeros(10, 1.0) and not are_too_many_zeros(11, 0.49) and are_too_many_zeros(11, 0.5)


def test_s0_14_readable_after_a_crash_at_any_byte(tmp_path) -> None:
    """S0-14: whatever of the last row is there, all rows before it are read."""
    log = MarginLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step, "mean": 0.1 * step}, {"margin": np.arange(4.0)})
    log.close()
    raw = (tmp_path / MARGINS).read_bytes()
    start = raw.rfind(b"\n", 0, -1) + 1
    for cut in range(start, len(raw)):
        (tmp_path / MARGINS).write_bytes(raw[:cut])
        rows, _ = read_metrics(tmp_path / MARGINS)
        assert [r["step"] for r in rows][:2] == [1, 2]
        assert all(np.load(tmp_path / r["npy"]).tolist() == [0, 1, 2, 3] for r in rows)


def test_vectors_of_steps_that_will_be_done_again_go(tmp_path) -> None:
    log = MarginLog(tmp_path)
    for step in (1, 2, 3):
        log.write({"step": step}, {"margin": np.zeros(step)})
    (tmp_path / "margins" / "step-000004.part").write_bytes(b"x")
    (tmp_path / "margins" / "notes.txt").write_text("mine")
    log.drop_vectors(2)
    names = sorted(p.name for p in (tmp_path / "margins").iterdir())
    assert names == ["notes.txt", "step-000001.npy", "step-000002.npy"]


def test_a_full_disk_is_named(tmp_path, arm_fault) -> None:
    log = MarginLog(tmp_path)
    arm_fault("metrics.write:1:enospc")
    with pytest.raises(ResourceError, match=r"margins\.jsonl"):
        log.write({"step": 1}, {})
    assert read_metrics(tmp_path / MARGINS) == ([], None)

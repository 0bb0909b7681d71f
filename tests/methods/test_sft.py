"""Supervised fine-tuning: what is counted, and what only masks decide."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.config.stages import SftSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.methods.sft import Sft


def build_group(mask: list[bool], i: int = 0) -> Group:
    ids = np.arange(3, 3 + len(mask), dtype=np.int32)
    return Group(f"row:{i}", np.array([1, 2], np.int32), (Completion(ids, np.array(mask)),))


def test_the_mean_is_over_tokens_not_over_rows() -> None:
    """1 token at −5 and 4 tokens at −1: (5 + 4) / 5 = 1.8, not (5 + 1) / 2 = 3."""
    groups = [build_group([True]), build_group([True] * 4, 1)]
    method = Sft(SftSettings())
    batch = build_packed_batch(groups)
    logprobs = torch.tensor([-5.0, -1.0, -1.0, -1.0, -1.0])
    (term,) = method.compute_loss(Outputs(logprobs=logprobs), batch.table, {}).terms
    assert term.unit == "token"
    assert term.sum.item() / method.counts(groups)["sft"] == pytest.approx(1.8)


def test_t18_masked_tokens_are_not_counted() -> None:
    group = build_group([False, True, False, True])
    assert Sft(SftSettings()).counts([group]) == {"sft": 2.0}
    assert len(build_packed_batch([group]).target_ids) == 2


def test_it_says_what_it_misses() -> None:
    batch = build_packed_batch([build_group([True])])
    with pytest.raises(ValueError, match=r"Outputs\.logprobs"):
        Sft(SftSettings()).compute_loss(Outputs(), batch.table, {})

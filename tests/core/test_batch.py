"""Groups as one row: what it holds, and what it does not compute."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.concat import concat_steps
from burnish.core.group import Completion, Group


def _completion(*ids: int, mask: list[bool] | None = None, **columns: float) -> Completion:
    scored = np.array(mask if mask is not None else [True] * len(ids))
    return Completion(np.array(ids, np.int32), scored, columns, {"old": np.arange(len(ids), dtype=np.float32)})


def _pair(name: str = "a") -> Group:
    return Group(
        name,
        np.array([5, 6, 7], np.int32),
        (
            _completion(10, 11, mask=[True, True], reward=1.0),
            _completion(20, 21, 22, mask=[False, True, True], reward=2.0),
        ),
        {"margin": 0.5},
    )


def test_the_row_and_what_predicts_each_token():
    batch = build_packed_batch([_pair()])
    assert batch.input_ids.tolist() == [5, 6, 7, 10, 11, 20, 21, 22]
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 4, 3, 4, 5]
    assert batch.target_ids.tolist() == [10, 11, 21, 22]
    assert batch.source_index.tolist() == [2, 3, 5, 6]
    assert batch.last_index.tolist() == [4, 7]
    table = batch.table
    assert table.token_completion.tolist() == [0, 0, 1, 1]
    assert table.token_position.tolist() == [0, 1, 1, 2]
    assert table.token_columns["old"].tolist() == [0, 1, 1, 2]
    assert table.columns["reward"].tolist() == [1, 2]
    assert table.group_columns["margin"].tolist() == [0.5]
    assert table.sum_tokens(torch.tensor([1.0, 2.0, 4.0, 8.0])).tolist() == [3, 12]


def test_the_last_prompt_position_predicts_every_first_token():
    group = Group("g", np.array([5, 6], np.int32), (_completion(10), _completion(11)))
    assert build_packed_batch([group]).source_index.tolist() == [1, 1]


def test_t22_a_skewed_batch_is_not_padded_and_prompts_are_computed_once():
    """T-22: prompt and answers of (52; 4, 63) and (52; 63, 4): 238 tokens, where a rectangle of 4 rows computes 460."""
    lengths = [(4, 63), (63, 4)]
    groups = [
        Group(f"g{i}", np.ones(52, np.int32), tuple(_completion(*range(1, n + 1)) for n in pair))
        for i, pair in enumerate(lengths)
    ]
    packed = len(build_packed_batch(groups).input_ids)
    rectangle = 4 * (52 + 63)
    assert packed == sum(g.tokens for g in groups) == 238
    assert rectangle == 460


def test_columns_must_agree_and_nothing_may_be_empty():
    other = Group("b", np.array([1], np.int32), (_completion(3, reward=1.0), _completion(4)), {"margin": 1.0})
    with pytest.raises(ValueError, match="b has"):
        build_packed_batch([other])
    with pytest.raises(ValueError, match="empty"):
        build_packed_batch([Group("c", np.array([], np.int32), (_completion(3),))])


def test_no_groups_make_an_empty_batch():
    batch = build_packed_batch([])
    assert len(batch.input_ids) == len(batch.target_ids) == len(batch.table.group_ids) == 0


def test_outputs_survive_their_names():
    outputs = Outputs(logprobs=torch.ones(2), functionals={"kl": torch.zeros(2)})
    again = Outputs.from_named(outputs.named())
    assert again.functionals["kl"] is outputs.functionals["kl"]
    with pytest.raises(ValueError, match="unknown output"):
        Outputs.from_named({"logits": torch.ones(1)})


def test_micro_batches_join_to_the_whole_step_in_data_order():
    groups = [_pair("a"), _pair("b"), _pair("c")]
    whole = build_packed_batch(groups)
    cut = [groups[2], groups[0]]
    first = build_packed_batch(cut, order=[2, 0])
    half = [Group("b", groups[1].prompt, groups[1].completions[s : s + 1], groups[1].columns) for s in (1, 0)]
    parts = [first, *(build_packed_batch([h], order=[1], slots=[[s]]) for h, s in zip(half, (1, 0), strict=True))]
    named = [
        {
            "logprobs": p.target_ids.float()
            + 100 * p.table.group_order[p.table.completion_group][p.table.token_completion],
            "scores": p.table.columns["reward"] + 10 * p.table.group_order[p.table.completion_group],
        }
        for p in parts
    ]
    outputs, table = concat_steps([p.table for p in parts], named)
    assert table.group_ids == ("a", "b", "c")
    assert table.completion_slot.tolist() == [0, 1, 0, 1, 0, 1]
    assert outputs.scores is not None
    assert outputs.scores.tolist() == [1, 2, 11, 12, 21, 22]
    assert outputs.logprobs is not None
    expected = whole.target_ids.float() + 100 * whole.table.completion_group[whole.table.token_completion]
    assert outputs.logprobs.tolist() == expected.tolist()
    assert table.token_completion.tolist() == whole.table.token_completion.tolist()
    assert table.group_columns["margin"].tolist() == [0.5] * 3

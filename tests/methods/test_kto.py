"""KTO: partners, labels, balance, metrics, and what happens at the edges."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from burnish.config.stages import KtoSettings
from burnish.core.batch import Outputs, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.engine.method import arrange_groups
from burnish.engine.source import OfflineSource
from burnish.errors import DataError
from burnish.methods.kto import Kto
from burnish.methods.partners import NextPrompts, find_partners


def build_row(name: str, prompt: list[int], completion: list[int], label: float = 1.0) -> Group:
    ids = np.asarray(completion, np.int32)
    own = Completion(ids, np.ones(len(ids), bool))
    return Group(name, np.asarray(prompt, np.int32), (own,), columns={"label": label})


def attach(groups: list[Group], reference: float = -1.0) -> list[Group]:
    return [
        replace(
            g,
            completions=tuple(
                replace(c, token_columns={"ref_logprobs": np.full(len(c.ids), reference, np.float32)})
                for c in g.completions
            ),
        )
        for g in groups
    ]


def rows(n: int = 6, labels: list[float] | None = None) -> list[Group]:
    labels = labels or [float(i % 2 == 0) for i in range(n)]
    return [build_row(f"row:{i}", [3 + i, 5], [20 + i] * (1 + i % 3), labels[i]) for i in range(n)]


# -- partners -----------------------------------------------------------------------------------------------------------


def test_t12_a_partner_is_the_next_row_with_another_prompt_going_round() -> None:
    """TRL pairs neighbours of the file, an odd last row with itself, and both answers of a pair with each other."""
    prompts = [[1], [1], [2], [3], [3], [3], [1]]
    groups = [build_row(str(i), p, [9]) for i, p in enumerate(prompts)]
    assert find_partners(groups) == [2, 2, 3, 6, 6, 6, 2]
    by_force = []
    for i in range(len(prompts)):
        j = (i + 1) % len(prompts)
        while prompts[j] == prompts[i]:
            j = (j + 1) % len(prompts)
        by_force.append(j)
    assert find_partners(groups) == by_force


@pytest.mark.parametrize("pairs", [1, 2, 17])
@pytest.mark.parametrize("odd", [0, 1])
def test_t12_no_row_gets_its_own_answer_nor_one_to_its_own_prompt(pairs: int, odd: int) -> None:
    """Pairs taken apart, good and bad side by side or shuffled, with an odd last row: 200 orders of each."""
    groups = [
        build_row(f"{i}/{side}", [3, 4 + i], [100 + 2 * i + side], float(side == 0))
        for i in range(pairs)
        for side in (0, 1)
    ]
    groups += [build_row("odd", [3, 4 + pairs], [99])] * odd
    if pairs + odd == 1:
        with pytest.raises(DataError, match="all 2 rows have the same prompt"):
            arrange_groups(Kto(KtoSettings()), groups)
        return
    answers = {group.id: (group.prompt.tobytes(), int(group.completions[0].ids[0])) for group in groups}
    by_answer = {answer: prompt for prompt, answer in answers.values()}
    for seed in range(200):
        order = np.random.default_rng(seed).permutation(len(groups)) if seed else np.arange(len(groups))
        arranged = arrange_groups(Kto(KtoSettings()), [groups[i] for i in order])
        assert [g.id for g in arranged] == [groups[i].id for i in order]
        for group in arranged:
            own, lent = (int(c.ids[0]) for c in group.completions)
            assert own == answers[group.id][1], "a row keeps its own answer, and its label"
            assert lent != own and by_answer[lent] != group.prompt.tobytes()


@pytest.mark.parametrize("seed", range(5))
def test_partners_agree_with_a_plain_search(seed: int) -> None:
    prompts = np.random.default_rng(seed).integers(0, 3, 23).tolist()
    groups = [build_row(str(i), [p], [9]) for i, p in enumerate(prompts)]
    for i, found in enumerate(find_partners(groups)):
        away = (found - i) % len(prompts)
        assert prompts[found] != prompts[i] and all(prompts[(i + k) % len(prompts)] == prompts[i] for k in range(away))


def test_a_single_prompt_everywhere_is_a_clear_error() -> None:
    groups = [build_row(f"rows.jsonl:{i}", [4, 5], [9 + i]) for i in range(3)]
    with pytest.raises(DataError, match="all 3 rows have the same prompt") as caught:
        arrange_groups(Kto(KtoSettings()), groups)
    assert "apo_zero_unpaired" in (caught.value.remedy or "")
    assert arrange_groups(Kto(KtoSettings(loss_type="apo_zero_unpaired")), groups) == groups
    assert arrange_groups(Kto(KtoSettings()), []) == []


def test_a_partner_is_a_second_completion_and_never_longer_than_the_data() -> None:
    groups = [build_row("a", [1] * 6, [2, 3]), build_row("b", [4], [5] * 7)]
    first, second = arrange_groups(Kto(KtoSettings()), groups)
    assert [c.columns["partner"] for c in first.completions] == [0.0, 1.0]
    assert first.completions[1].ids.tolist() == [5, 5], "prompt 6 + 2 = 8, the longest row"
    assert second.completions[1].ids.tolist() == [2, 3]
    assert (first.id, first.columns, len(groups[0].completions)) == ("a", {"label": 1.0}, 1)


def test_t12_partners_follow_the_order_of_each_epoch() -> None:
    source = OfflineSource(
        rows(6), batch_size=4, epochs=2, max_steps=-1, seed=3, shuffle=True, arrange=NextPrompts().arrange
    )
    lent = []
    for epoch in range(2):
        order = source.order(epoch)
        groups = [g for step in range(2) for g in source.step(2 * epoch + step).groups]
        assert [g.id for g in groups] == [f"row:{i}" for i in order]
        for place, group in enumerate(groups):
            other = int(order[(place + 1) % 6])
            np.testing.assert_array_equal(group.completions[1].ids[:1], [20 + other])
        lent.append({g.id: g.completions[1].ids[0] for g in groups})
    assert lent[0] != lent[1], "another epoch, other partners"


# -- the loss -----------------------------------------------------------------------------------------------------------


def step(settings: KtoSettings, groups: list[Group], logprobs: list[float]):
    method = Kto(settings)
    batch = build_packed_batch(attach(arrange_groups(method, groups)))
    leaf = torch.tensor(logprobs, dtype=torch.float64).requires_grad_()
    return method, batch, leaf, method.compute_loss(Outputs(logprobs=leaf), batch.table, {})


def figures(result) -> dict[str, float]:
    return {m.name: float(m.sum) / float(m.count) for m in result.metrics if float(m.count)}


HAND = [build_row("good", [1], [7], 1.0), build_row("bad", [2], [8], 0.0)]


def test_s1_04_a_step_by_hand() -> None:
    """Rows: own, partner | own, partner; reference −1. Own ratios 1 and −2; partners 3 and −1: z = 1.

    β = ½: desirable 1 − σ(½(1 − 1)) = ½; undesirable 1 − σ(½(1 + 2)) = 0.182426.
    """
    method, _, leaf, result = step(KtoSettings(beta=0.5), HAND, [0.0, 2.0, -3.0, -2.0])
    (term,) = result.terms
    assert (term.name, term.unit, term.count, method.counts(HAND)) == ("kto", "sequence", 2.0, {"kto": 2.0})
    assert term.sum.item() == pytest.approx(0.5 + 1 / (1 + math.exp(1.5)), rel=1e-12)
    assert figures(result) == {
        "kl": 1.0,
        "rewards/chosen": 0.5,
        "rewards/rejected": -1.0,
        "logps/chosen": 0.0,
        "logps/rejected": -3.0,
    }
    term.sum.backward()
    assert leaf.grad is not None
    assert leaf.grad[1] == leaf.grad[3] == 0.0, "no gradient reaches a partner"
    assert leaf.grad[0] < 0 < leaf.grad[2]


def test_without_a_baseline_rows_stand_alone() -> None:
    method, batch, _, result = step(KtoSettings(beta=0.5, loss_type="apo_zero_unpaired"), HAND, [0.0, -3.0])
    assert not method.coupled and method.partners is None and batch.table.completion_slot.tolist() == [0, 0]
    want = 1 / (1 + math.exp(0.5)) + 1 / (1 + math.exp(1.0))
    assert result.terms[0].sum.item() == pytest.approx(want, rel=1e-12)
    assert "kl" not in figures(result)


def test_policy_equal_to_reference_starts_at_one_half() -> None:
    _, batch, _, _ = step(
        KtoSettings(),
        rows(),
        [-1.0] * build_packed_batch(arrange_groups(Kto(KtoSettings()), rows())).target_ids.shape[0],
    )
    _, _, _, result = step(KtoSettings(), rows(), [-1.0] * len(batch.target_ids))
    assert result.terms[0].sum.item() / 6 == pytest.approx(0.5, abs=1e-15)
    assert figures(result)["kl"] == 0.0


@pytest.mark.parametrize("label", [0.0, 1.0])
def test_all_labels_on_one_side_work(label: float) -> None:
    groups = rows(4, [label] * 4)
    size = len(build_packed_batch(arrange_groups(Kto(KtoSettings()), groups)).target_ids)
    _, _, leaf, result = step(KtoSettings(), groups, np.linspace(-4, 0, size).tolist())
    result.terms[0].sum.backward()
    assert leaf.grad is not None and bool(torch.isfinite(leaf.grad).all()) and bool(leaf.grad.any())
    there, gone = ("chosen", "rejected") if label else ("rejected", "chosen")
    assert f"rewards/{there}" in figures(result) and f"rewards/{gone}" not in figures(result)


def test_weights_scale_their_side() -> None:
    plain, heavy = (
        step(KtoSettings(desirable_weight=w, undesirable_weight=v), HAND, [0.0, 2.0, -3.0, -2.0])[3].terms[0].sum.item()
        for w, v in ((1.0, 1.0), (3.0, 2.0))
    )
    good = step(KtoSettings(undesirable_weight=0.0), HAND, [0.0, 2.0, -3.0, -2.0])[3].terms[0].sum.item()
    assert heavy == pytest.approx(3 * good + 2 * (plain - good), rel=1e-12)


def test_t11_a_nan_row_makes_the_loss_nan() -> None:
    """TRL's NaN-skipping mean gives a normal loss and a NaN gradient."""
    for place in range(4):
        values = [0.0, 2.0, -3.0, -2.0]
        values[place] = math.nan
        assert math.isnan(step(KtoSettings(), HAND, values)[3].terms[0].sum.item())


def test_a_row_without_a_label_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a label"):
        Kto(KtoSettings()).counts([replace(HAND[0], columns={})])


# -- balance ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("good", "bad", "weights", "warned"),
    [
        (4, 4, (1.0, 1.0), ""),
        (4, 3, (1.0, 1.0), ""),
        (3, 4, (1.0, 1.0), "0.75"),
        (1, 9, (1.0, 1.0), "between 9 and 12"),
        (1, 9, (9.0, 1.0), ""),
        (1, 9, (12.0, 1.0), ""),
        (1, 9, (13.0, 1.0), "1.44"),
        (5, 0, (1.0, 1.0), "all 5 rows are desirable"),
        (0, 5, (1.0, 1.0), "all 5 rows are undesirable"),
        (2, 2, (1.0, 0.0), "inf"),
    ],
)
def test_the_balance_that_the_paper_advises_is_checked(good: int, bad: int, weights: tuple, warned: str) -> None:
    """λ_D n_D / (λ_U n_U) in [1, 4/3], section 4.2."""
    groups = rows(good + bad, [1.0] * good + [0.0] * bad)
    notes = Kto(KtoSettings(desirable_weight=weights[0], undesirable_weight=weights[1])).examine(groups)
    assert len(notes) == bool(warned) and all(warned in note for note in notes)

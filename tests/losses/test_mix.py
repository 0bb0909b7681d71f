"""Names to functions: registered losses, functions of the user, mixes, and what is refused."""

from __future__ import annotations

import inspect
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.losses import find_entry, find_family, find_unread
from burnish.config.registry import KINDS, LOSS_TYPES, load_object
from burnish.config.stages import DpoSettings
from burnish.errors import ConfigError
from burnish.losses.dpo import compute_sigmoid_loss
from burnish.losses.mix import build_mix, load_loss_type, reads
from burnish.losses.pairs import PairLoss, Pairs
from tests.config.recipes import one, problems_of
from tests.losses.drawn import REGISTRY, draw_pairs

HERE = "tests.losses.test_mix"


def compute_capped_loss(pairs: Pairs, *, beta: float, cap: float = 2.0) -> PairLoss:
    """A loss of the user: minus the margin, capped."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(-torch.clamp(chosen - rejected, max=cap), chosen, rejected)


@reads("beta", "nowhere")
def compute_greedy_loss(pairs: Pairs, *, beta: float, nowhere: int) -> PairLoss:
    return compute_capped_loss(pairs, beta=beta)


def compute_mean_loss(pairs: Pairs, *, beta: float) -> PairLoss:
    return PairLoss(pairs.chosen_ratio.mean(), pairs.chosen_ratio, pairs.rejected_ratio)


def settings(**changes: Any) -> DpoSettings:
    return DpoSettings(**changes)


def pairs(n: int = 3) -> Pairs:
    return Pairs(*(torch.arange(1.0, n + 1) for _ in range(7)))


def test_a_name_becomes_its_function_with_the_settings_it_reads() -> None:
    (found,) = build_mix("dpo", "sigmoid", None, settings(label_smoothing=0.2))
    assert found.function is compute_sigmoid_loss and found.weight == 1.0
    plain = {"f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    assert found.settings == {"beta": 0.1, "label_smoothing": 0.2} | plain
    (hinge,) = build_mix("dpo", "hinge", None, settings())
    assert hinge.settings == {"beta": 0.1} | plain


CHANGED: dict[str, Any] = {
    "beta": 0.77,
    "label_smoothing": 0.3,
    "discopop_tau": 0.2,
    "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7,
    "simpo_gamma": 0.1,
    "tdpo_alpha": 0.9,
    "radpo_confidence": 0.7,
    "epsilon": 0.2,
}


# What has to be chosen too before a setting can matter.
BESIDE: dict[str, dict[str, Any]] = {"f_alpha_divergence_coef": {"f_divergence_type": "alpha_divergence"}}


@pytest.mark.parametrize(
    ("kind", "name", "setting"),
    [(k, n, s) for k, names in LOSS_TYPES.items() for n in names for s in sorted(find_family(k))],
)
def test_t01_a_setting_is_read_or_refused(kind: str, name: str, setting: str) -> None:
    """Every setting of the family beside every loss type of every kind: it changes the loss, or the stage is refused."""
    cls = load_object(KINDS[kind].settings)
    chosen = {"loss_type": name} if "loss_type" in cls.model_fields else {}
    changed = cls(**chosen, **{setting: CHANGED[setting]})
    if setting not in inspect.signature(load_object(LOSS_TYPES[kind][name].function)).parameters:
        with pytest.raises(ConfigError, match=f"{setting} is {CHANGED[setting]}") as caught:
            build_mix(kind, name, None, changed)
        assert caught.value.exit_code == 2
        return
    assert build_mix(kind, name, None, changed)[0].settings[setting] == CHANGED[setting]
    values = []
    for settings in (
        cls(**chosen, **BESIDE.get(setting, {})),
        cls(**chosen, **BESIDE.get(setting, {}), **{setting: CHANGED[setting]}),
    ):
        (loss_type,) = build_mix(kind, name, None, settings)
        pairs = move_up(draw_pairs(6, seed=3), loss_type.settings)
        found = loss_type.compute(pairs, loss_type.initial_state() or None)
        values.append((found.loss.sum() + found.chosen_reward.sum()).item())
    assert values[0] != pytest.approx(values[1], rel=1e-6)


def move_up(pairs: Pairs, settings: dict[str, Any]) -> Pairs:
    """Pairs with what a loss with these settings reads of the distribution; each β of ε-DPO has a reason to rise."""
    sums = dict(pairs.sums)
    if "radpo_confidence" in settings:
        c = settings["radpo_confidence"]
        sums[f"risk_{c:g}"] = (c * torch.ones_like(pairs.chosen), c * c * torch.ones_like(pairs.chosen))
    for sign in (1, -1):
        moved = (pairs.chosen + sign, pairs.rejected)
        sums[f"logprobs_{sign * settings.get('epsilon', 0.01):+g}"] = moved
    return replace(pairs, sums=sums)


@pytest.mark.parametrize("name", REGISTRY)
def test_t01_label_smoothing_is_read_or_refused_by_a_recipe(name: str) -> None:
    """Before anything is loaded, for every loss that can be trained; TRL's sigmoid takes it and changes nothing."""
    kind, _, loss_type = name.partition(" ")
    chosen = {"loss_type": loss_type} if loss_type and loss_type not in ("simpo", "orpo") else {}
    entry = LOSS_TYPES.get(kind, {}).get(loss_type)
    if entry is not None and "label_smoothing" in entry.settings:
        assert one(kind, label_smoothing=0.1, **chosen).label_smoothing == 0.1
        return
    stage = {"kind": kind, "label_smoothing": 0.1, **chosen} | ({"teacher": "pocket"} if kind == "distill" else {})
    text = problems_of({"model": "pocket", "data": "pocket/preferences", "stages": [stage]})
    assert "label_smoothing" in text and text.count("label_smoothing") <= 3


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_what_the_settings_take_for_read_is_what_the_functions_read(kind: str) -> None:
    """What is declared is what a function takes, beside a running state."""
    for name, entry in LOSS_TYPES[kind].items():
        found = inspect.signature(load_object(entry.function)).parameters.values()
        taken = {p.name for p in found if p.kind is p.KEYWORD_ONLY}
        beside = ({"state"} if entry.state else set()) | ({"evaluating"} if entry.state and entry.coupled else set())
        assert taken == {*entry.settings, *beside}, name
    assert find_family(kind) <= set(CHANGED), "add a changed value to this test"


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_defaults_of_the_registry_are_those_of_the_functions(kind: str) -> None:
    for name, entry in LOSS_TYPES[kind].items():
        parameters = inspect.signature(load_object(entry.function)).parameters
        for setting, value in entry.defaults.items():
            assert parameters[setting].default in (value, inspect.Parameter.empty), name


def test_a_mix_may_set_what_one_of_its_losses_reads() -> None:
    both = {name: find_entry("dpo", name) for name in ("ipo", "sigmoid")}
    assert not find_unread(settings(loss_type=["ipo", "sigmoid"], label_smoothing=0.1), "dpo", both)
    (unread,) = find_unread(settings(loss_type="ipo", label_smoothing=0.1), "dpo", {"ipo": both["ipo"]}).items()
    assert unread == ("label_smoothing", 0.0)


def test_a_changed_beta_reaches_a_loss_that_reads_it() -> None:
    (found,) = build_mix("dpo", "sigmoid", None, settings())
    same = found.compute(pairs(), beta=0.1, nothing=3)
    assert torch.equal(same.loss, found.compute(pairs()).loss)
    assert found.compute(pairs(), beta=0.7).chosen_reward.tolist() == pytest.approx([0.7, 1.4, 2.1])


def test_a_function_of_the_user_is_a_loss_type() -> None:
    found, other = build_mix("dpo", [f"{HERE}:compute_capped_loss", "ipo"], [2.0, 0.5], settings())
    assert (found.name, found.weight, found.settings) == ("compute_capped_loss", 2.0, {"beta": 0.1})
    assert (other.name, other.weight) == ("ipo", 0.5)
    assert found.compute(pairs()).loss.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(
    ("loss_type", "weights", "message"),
    [
        ([], None, "empty"),
        ("sigmiod", None, "no loss type"),
        (["ipo", "ipo"], None, "twice"),
        (["ipo", "hinge"], [1.0], "1 loss_weights for 2"),
        ("no_such_module_xyz:f", None, "cannot be loaded"),
        (f"{HERE}:no_such_function", None, "cannot be loaded"),
        (f"{HERE}:HERE", None, "no function"),
        (f"{HERE}:compute_greedy_loss", None, "nowhere"),
    ],
)
def test_what_is_refused_says_why_and_what_to_do(loss_type: Any, weights: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        build_mix("dpo", loss_type, weights, settings())
    assert caught.value.remedy and caught.value.exit_code == 2


@reads("beta", "label_smoothing")
def compute_declared_loss(pairs: Pairs, *, beta: float, label_smoothing: float) -> PairLoss:
    return compute_sigmoid_loss(pairs, beta=beta, label_smoothing=label_smoothing)


def test_a_function_of_the_user_declares_further_settings() -> None:
    own, plain = f"{HERE}:compute_declared_loss", f"{HERE}:compute_capped_loss"
    (found,) = build_mix("dpo", own, None, settings(loss_type=own, label_smoothing=0.2))
    assert found.settings == {"beta": 0.1, "label_smoothing": 0.2}
    (other,) = build_mix("dpo", "sigmoid", None, settings(label_smoothing=0.2))
    assert torch.equal(found.compute(pairs()).loss, other.compute(pairs()).loss)
    with pytest.raises(ConfigError, match="label_smoothing is"):
        build_mix("dpo", plain, None, settings(loss_type=plain, label_smoothing=0.2))


def test_a_function_that_averages_is_refused() -> None:
    """A mean inside the loss would change with the split into micro-batches."""
    (found,) = build_mix("dpo", f"{HERE}:compute_mean_loss", None, settings())
    with pytest.raises(ConfigError, match="one number a pair"):
        found.compute(pairs())


def test_a_module_beside_the_recipe_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_own_losses.py").write_text(
        "from burnish.losses.pairs import PairLoss\n\n"
        "def compute_loss(pairs, *, beta):\n"
        "    return PairLoss(pairs.chosen_ratio ** 2, pairs.chosen_ratio, pairs.rejected_ratio)\n"
    )
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    (found,) = build_mix("dpo", "my_own_losses:compute_loss", None, settings())
    assert found.compute(pairs()).loss.tolist() == [1.0, 4.0, 9.0]
    assert sys.path == before


def test_every_registered_path_loads() -> None:
    assert all(callable(load_loss_type(kind, name)) for kind, types in LOSS_TYPES.items() for name in types)

"""Names to functions: registered losses, functions of the user, mixes, and what is refused."""

from __future__ import annotations

import inspect
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from burnish.config.losses import find_family, find_unread, read_parameters
from burnish.config.registry import LOSS_TYPES, load_object
from burnish.config.stages import DpoSettings
from burnish.errors import ConfigError
from burnish.losses.dpo import compute_sigmoid_loss
from burnish.losses.mix import build_mix, load_loss_type
from burnish.losses.pairs import PairLoss, Pairs

HERE = "tests.losses.test_mix"


def compute_capped_loss(pairs: Pairs, *, beta: float, cap: float = 2.0) -> PairLoss:
    """A loss of the user: minus the margin, capped."""
    chosen, rejected = beta * pairs.chosen_ratio, beta * pairs.rejected_ratio
    return PairLoss(-torch.clamp(chosen - rejected, max=cap), chosen, rejected)


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
    "beta": 0.77, "label_smoothing": 0.3, "discopop_tau": 0.2, "f_divergence_type": "js_divergence",
    "f_alpha_divergence_coef": 0.7, "simpo_gamma": 0.1, "tdpo_alpha": 0.9, "radpo_confidence": 0.7,
    "epsilon": 0.2,
}  # fmt: skip


@pytest.mark.parametrize("setting", sorted(find_family("dpo") - {"state"}))
@pytest.mark.parametrize("name", LOSS_TYPES["dpo"])
def test_t01_a_setting_is_read_or_refused(name: str, setting: str) -> None:
    """Every setting of the family beside every loss type: its value changes the loss, or the stage is refused."""
    function = load_object(LOSS_TYPES["dpo"][name].function)
    changed = DpoSettings(loss_type=name, **{setting: CHANGED[setting]})
    if setting in inspect.signature(function).parameters:
        assert build_mix("dpo", name, None, changed)[0].settings[setting] == CHANGED[setting]
    else:
        with pytest.raises(ConfigError, match=f"{setting} is {CHANGED[setting]}") as caught:
            build_mix("dpo", name, None, changed)
        assert caught.value.exit_code == 2


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_what_the_settings_take_for_read_is_what_the_functions_read(kind: str) -> None:
    """The source is read without torch; a signature of the loaded function says the same."""
    for name, entry in LOSS_TYPES[kind].items():
        found = inspect.signature(load_object(entry.function)).parameters.values()
        assert read_parameters(entry.function) == {p.name for p in found if p.kind is p.KEYWORD_ONLY}, name
    assert find_family(kind) <= {*CHANGED, "state"}, "add a changed value to this test"


@pytest.mark.parametrize("kind", LOSS_TYPES)
def test_defaults_of_the_registry_are_those_of_the_functions(kind: str) -> None:
    for name, entry in LOSS_TYPES[kind].items():
        parameters = inspect.signature(load_object(entry.function)).parameters
        for setting, value in entry.defaults.items():
            assert parameters[setting].default in (value, inspect.Parameter.empty), name


def test_a_mix_may_set_what_one_of_its_losses_reads() -> None:
    assert not find_unread(settings(loss_type=["ipo", "sigmoid"], label_smoothing=0.1), "dpo", ["ipo", "sigmoid"])
    (unread,) = find_unread(settings(loss_type="ipo", label_smoothing=0.1), "dpo", ["ipo"]).items()
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

"""Names to functions: registered losses, functions of the user, mixes, and what is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from burnish.config.checks import SMOOTHED_LOSSES
from burnish.config.registry import LOSS_TYPES
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


def settings(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**({"beta": 0.1, "label_smoothing": 0.0} | changes))


def pairs(n: int = 3) -> Pairs:
    return Pairs(*(torch.arange(1.0, n + 1) for _ in range(6)))


def test_a_name_becomes_its_function_with_the_settings_it_reads() -> None:
    (found,) = build_mix("sigmoid", None, settings(label_smoothing=0.2))
    assert found.function is compute_sigmoid_loss and found.weight == 1.0
    assert found.settings == {"beta": 0.1, "label_smoothing": 0.2}
    (hinge,) = build_mix("hinge", None, settings())
    assert hinge.settings == {"beta": 0.1}


@pytest.mark.parametrize("name", LOSS_TYPES)
def test_t01_label_smoothing_is_refused_where_it_does_nothing(name: str) -> None:
    """The function's own parameters say whether it reads ε, and the settings' table agrees with them."""
    if name in SMOOTHED_LOSSES:
        assert "label_smoothing" in build_mix(name, None, settings(label_smoothing=0.3))[0].settings
    else:
        with pytest.raises(ConfigError, match=r"label_smoothing is 0\.3"):
            build_mix(name, None, settings(label_smoothing=0.3))


def test_a_function_of_the_user_is_a_loss_type() -> None:
    found, other = build_mix([f"{HERE}:compute_capped_loss", "ipo"], [2.0, 0.5], settings())
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
        build_mix(loss_type, weights, settings())
    assert caught.value.remedy and caught.value.exit_code == 2


def test_a_function_that_averages_is_refused() -> None:
    """A mean inside the loss would change with the split into micro-batches."""
    (found,) = build_mix(f"{HERE}:compute_mean_loss", None, settings())
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
    (found,) = build_mix("my_own_losses:compute_loss", None, settings())
    assert found.compute(pairs()).loss.tolist() == [1.0, 4.0, 9.0]
    assert sys.path == before


def test_every_registered_path_loads() -> None:
    assert all(callable(load_loss_type(name)) for name in LOSS_TYPES)

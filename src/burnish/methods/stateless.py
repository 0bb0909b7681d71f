"""What most methods are: a sum over groups, without a state of their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.core.logits import Functional
from burnish.engine.observe import Observed, StepRecord


class Stateless:
    """Defaults of a method whose loss is a sum over groups and that has no state."""

    functionals: tuple[Functional, ...] = ()
    needs_reference = False
    needs_reference_head = False
    coupled = False
    stateful = False
    arranges = False
    observes = False
    records = False
    best_metric = ("eval_loss", False)

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Each example stands alone."""
        return list(groups)

    def examine(self, groups: Sequence[Group]) -> list[str]:
        """Nothing to say."""
        return []

    def initial_state(self) -> dict[str, Any]:
        """No state."""
        return {}

    def next_state(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
        """No state."""
        return {}

    def observe(self, outputs: Outputs, table: Table) -> dict[str, Tensor]:
        """Nothing."""
        return {}

    def describe_step(self, step: Observed, state: Mapping[str, Any]) -> StepRecord:
        """Nothing."""
        return StepRecord()

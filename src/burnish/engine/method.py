"""What the engine asks of a training method."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

from torch import Tensor

from burnish.core.batch import Outputs, Table
from burnish.core.group import Group
from burnish.core.logits import Functional
from burnish.engine.observe import Observed, StepRecord
from burnish.losses.terms import LossResult


class Method(Protocol):
    """A training method: pure functions and constants; whatever changes while training is in the state it returns.

    Attributes:
        name: The kind of stage.
        head: "lm" for a language model, "score" for a scalar per completion.
        want: Which fields of Outputs the policy must compute: "logprobs", "entropy", "scores", "values".
        functionals: Further numbers a token from the distribution over the vocabulary; read as `outputs.functionals`.
        needs_reference_head: Functionals read a second model's logits: the reference (or teacher) runs live, in each step.
        needs_reference: The table carries `token_columns["ref_logprobs"]`, (S,), from the reference model.
        coupled: The loss is no sum over groups (batch quantiles, sorts); the engine then runs a step in two passes and
            takes the counts that the one call on the whole step reports.
        stateful: The method has a state that moves with each step (controllers, running moments).
        arranges: `arrange` gives the examples something of one another.
        observes: The method looks at each step after it: `observe` and `describe_step`.
        records: It then writes a row for each step, to margins.jsonl.
        best_metric: (name, greater_is_better) by default for the best checkpoint.
    """

    name: str
    head: Literal["lm", "score"]
    want: frozenset[str]
    functionals: tuple[Functional, ...]
    needs_reference: bool
    needs_reference_head: bool
    coupled: bool
    stateful: bool
    arranges: bool
    observes: bool
    records: bool
    best_metric: tuple[str, bool]

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """The examples of an epoch (or all held-out ones), in their order, with what each takes of others.

        A pure function that keeps number, ids and order; a partner is a further completion of the group. Without use for
        one another (`arranges` is False) the groups as they are.

        Raises:
            DataError: The examples cannot serve one another.
        """
        ...

    def examine(self, groups: Sequence[Group]) -> list[str]:
        """What is odd about the training examples, as sentences for the log; called once, before the first step."""
        ...

    def initial_state(self) -> dict[str, Any]:
        """State before the first step: JSON values only."""
        ...

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Units per term in these groups, from masks and columns alone; sums over any split to the same number."""
        ...

    def compute_loss(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> LossResult:
        """The loss of these groups as named sums; must work with zero groups (sum 0 that keeps the graph).

        In evaluation, `state` has `frozen: True` beside what `initial_state` and `next_state` put there.
        """
        ...

    def next_state(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state after a step.

        Called once per step if `stateful`, with the whole step's rows in data order (detached), on every rank;
        committed only if the step's numbers were finite. Evaluation never calls it; it hands `compute_loss` the state
        with `frozen: True`: running statistics are then read, not moved.
        """
        ...

    def observe(self, outputs: Outputs, table: Table) -> dict[str, Tensor]:
        """name → (G,) numbers of these groups; stays on the device. Called if `observes`, in training only."""
        ...

    def describe_step(self, step: Observed, state: Mapping[str, Any]) -> StepRecord:
        """What is worth recording of a finite step, given all its groups in data order and the state after it."""
        ...

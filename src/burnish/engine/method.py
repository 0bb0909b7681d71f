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

Reads = frozenset[Literal["logprobs", "logits"]]


class MethodState(Protocol):
    """A state of the method's own that moves with each step (controllers, running moments); JSON values only."""

    def initial(self) -> dict[str, Any]:
        """The state before the first step."""
        ...

    def advance(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
        """The state after a step.

        Called once a step with the whole step's rows in data order (detached), on every rank; committed only if the
        step's numbers were finite. Evaluation never calls it.
        """
        ...


class Partners(Protocol):
    """Gives examples something of one another: a partner is a further completion of the group."""

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """The examples of an epoch (or all held-out ones), in their order, with what each takes of others.

        A pure function that keeps number, ids and order.

        Raises:
            DataError: The examples cannot serve one another.
        """
        ...


class Observer(Protocol):
    """Looks at each training step after it.

    Attributes:
        records: It gives a row for each step, which goes to margins.jsonl.
    """

    records: bool

    def observe(self, outputs: Outputs, table: Table) -> dict[str, Tensor]:
        """name → (G,) numbers of these groups; they stay on the device until the step's one fetch."""
        ...

    def describe(self, step: Observed, state: Mapping[str, Any]) -> StepRecord:
        """What is worth recording of a finite step, given all its groups in data order and the state after it."""
        ...


class Method(Protocol):
    """A training method: pure functions and constants; whatever changes while training is in the state it returns.

    Attributes:
        name: The kind of stage.
        want: Model name → the fields of Outputs that it must compute: "logprobs", "entropy", "scores", "values".
        functionals: Further numbers a token from the policy's distribution; read as `outputs.functionals`.
        reference: What the method reads of a reference model. "logprobs": the table carries
            `token_columns["ref_logprobs"]`, (S,). "logits": functionals read the logits of a reference (or teacher) that
            runs live in each step.
        coupled: The loss is no sum over groups (batch quantiles, sorts); the engine then runs a step in two passes and
            takes the counts that the one call on the whole step reports.
        state, partners, observer: The optional parts of a method; None = it has none.
    """

    @property
    def name(self) -> str: ...
    @property
    def want(self) -> Mapping[str, frozenset[str]]: ...
    @property
    def functionals(self) -> tuple[Functional, ...]: ...
    @property
    def reference(self) -> Reads: ...
    @property
    def coupled(self) -> bool: ...
    @property
    def state(self) -> MethodState | None: ...
    @property
    def partners(self) -> Partners | None: ...
    @property
    def observer(self) -> Observer | None: ...

    def examine(self, groups: Sequence[Group]) -> list[str]:
        """What is odd about the training examples, as sentences for the log; called once, before the first step."""
        ...

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        """Units per term in these groups, from masks and columns alone; sums over any split to the same number."""
        ...

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        """The loss of these groups as named sums; must work with zero groups (sum 0 that keeps the graph).

        Args:
            outputs: What `want` names, of all models, in one.
            state: The method's state; {} without one.
            evaluating: Held-out rows: running statistics are read, not moved.
        """
        ...


def arrange_groups(method: Method, groups: Sequence[Group]) -> list[Group]:
    """The examples with their partners, or as they are where the method has none."""
    return list(groups) if method.partners is None else method.partners.arrange(groups)


def build_initial_state(method: Method) -> dict[str, Any]:
    """The method's state before the first step."""
    return {} if method.state is None else method.state.initial()

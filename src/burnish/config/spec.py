"""What a kind of stage is, declared once and in plain strings, so that listing kinds loads nothing.

A kind that trains is a `MethodSpec`. Everything else asks it: how rows are read, which models are trained and exported, what
may change on resume, help and documentation. A kind of your own is one more: `kind: my_module:SPEC`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Head = Literal["lm", "score"]
RowShape = Literal["completion", "pair", "label", "prompt"]
Reading = Literal["none", "logprobs", "logits"]
Coupling = Literal["sum", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """A model that a kind trains.

    Attributes:
        head: "lm": a language model; "score": a scalar a completion or a token.
        start: The setting that names the model it starts from; None, or where it is not set: the stage's own model.
        learning_rate: The setting with its own peak learning rate; None, or where it is not set: `learning_rate`.
    """

    head: Head = "lm"
    start: str | None = None
    learning_rate: str | None = None


@dataclass(frozen=True, slots=True)
class LossEntry:
    """A loss type of a kind.

    Attributes:
        function: "module:name" of `f(pairs, *, settings…) -> PairLoss`.
        settings: Settings of the stage that it reads; they are passed by name.
        coupled: It needs the whole optimizer step at once: it sorts, or moves a statistic before it uses it.
        state: "module:name" of its running state (`initial()`, `advance(pairs, state, …)`), or None. The function gets it as
            `state`, and, if it is coupled too, `evaluating`: a state that it moves itself then stands still.
        aligned: Its number g belongs to pair g; False where it sorts, so that weights of single pairs have no meaning.
        unit: What its sum is divided by: pairs, or scored tokens of the chosen completions.
        defaults: Settings whose default is another with this loss, from its paper.
        positive: Settings that must not be 0 with it.
        functionals: "module:name" of `build(settings) -> tuple[Functional, …]`: what it reads of the distribution over the
            vocabulary; the function finds the sums over an answer's tokens in `pairs.sums`.
        live: It reads the reference's distribution, so the reference model runs in each step.
        metrics: Figures that it logs beside rewards and margins, the names in `PairLoss.figures`.
    """

    function: str
    settings: tuple[str, ...] = ()
    coupled: bool = False
    state: str | None = None
    aligned: bool = True
    unit: Literal["pair", "token"] = "pair"
    defaults: Mapping[str, Any] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    functionals: str | None = None
    live: bool = False
    metrics: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSpec:
    """A kind of stage.

    Attributes:
        name: What recipes call it, and the default name of such a stage.
        settings: "module:Class" of its settings.
        runner: "module:name" of what does it: a function, or the class of the method.
        summary: One phrase for help and documentation.
    """

    name: str
    settings: str
    runner: str
    summary: str

    @property
    def trains(self) -> bool:
        """Whether it trains models."""
        return isinstance(self, MethodSpec)


@dataclass(frozen=True, slots=True, kw_only=True)
class MethodSpec(StageSpec):
    """A kind of stage that trains.

    Attributes:
        rows: What it needs of a row of data.
        models: Name → model that it trains; the first is the stage's result, further ones lie beside it.
        columns: Columns that every example has; 0 where its row gives none.
        reference: What each such stage reads of a reference or teacher: nothing, log-probs, or whole distributions (logits).
            A loss type may read more (`LossEntry.live`).
        coupling: "step": each such stage needs the whole optimizer step at once; "sum": its loss is a sum over groups, unless
            a loss type or a moving β says otherwise.
        loss_types: Name → what `loss_type` may be, beside functions of the user's.
        trains_tokens: Its rows may be conversations whose tokens `train_on` chooses; else whole answers are scored.
        source: "module:function" that builds the stage's source of examples from (settings, groups, batch_size=…);
            None: the data, permuted in each epoch.
        model_settings: Settings that may name a model or an earlier stage, beside `model` and `init_from`, and the head that it
            must have ("lm": gives text and distributions, "score": gives scores); None: any.
        required: Those of them that must be given.
        harmless: Settings that may change on resume, beside those of every kind.
        metrics: Figures of its loss, beside "loss" and those of its loss types; of held-out data with "eval_" before. Each may
            also be written for a part, as "name/part": a loss type of a mix, a source of the data.
        step_metrics: Further figures of training steps, which evaluations do not have.
        best_metric: (name, greater is better) by default for the best checkpoint.
    """

    rows: RowShape
    columns: tuple[str, ...] = ()
    models: Mapping[str, ModelSpec] = field(default_factory=lambda: {"policy": ModelSpec()})
    reference: Reading = "none"
    coupling: Coupling = "sum"
    loss_types: Mapping[str, LossEntry] = field(default_factory=dict)
    trains_tokens: bool = False
    source: str | None = None
    model_settings: Mapping[str, Head | None] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    harmless: frozenset[str] = frozenset()
    metrics: tuple[str, ...] = ()
    step_metrics: tuple[str, ...] = ()
    best_metric: tuple[str, bool] = ("eval_loss", False)

    def __post_init__(self) -> None:
        """Refuse words that mean nothing.

        Raises:
            ValueError: Naming the field and what it may be.
        """
        for name, words in (
            ("rows", get_args(RowShape)),
            ("reference", get_args(Reading)),
            ("coupling", get_args(Coupling)),
        ):
            if getattr(self, name) not in words:
                raise ValueError(f"{name} is {getattr(self, name)!r}, not one of {', '.join(words)}")
        if not self.models:
            raise ValueError("models is empty: the first is the stage's result")

    @property
    def named_settings(self) -> frozenset[str]:
        """The settings that the declaration itself names."""
        of_models = {name for m in self.models.values() for name in (m.start, m.learning_rate) if name is not None}
        return frozenset({*self.model_settings, *self.required, *self.harmless, *of_models})

    @property
    def result(self) -> ModelSpec:
        """The model that is the stage's result."""
        return next(iter(self.models.values()))


def may_resume_with(spec: StageSpec) -> frozenset[str]:
    """Settings that change neither a parameter nor a figure of the result: an interrupted stage may go on with other values.

    Of models and data the content counts, which is among a stage's inputs, not the path.
    """
    return HARMLESS | (spec.harmless | frozenset(spec.model_settings) if isinstance(spec, MethodSpec) else frozenset())


HARMLESS = frozenset(
    {
        "logging_steps",
        "report_to",
        "wandb_project",
        "save_steps",
        "save_total_limit",
        "devices",
        "name",
        "model",
        "data",
        "eval_data",
        "samples",
    }
)

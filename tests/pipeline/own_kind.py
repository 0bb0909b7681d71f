"""A kind of a user's own: a policy and a value model, samples made while training, a loss of the whole step.

Rewarded is the share of even tokens. The sampler draws among a few tokens by the policy's own log-probs, so that it runs on any
strategy. Nothing in burnish knows this file; recipes name it as `kind: own_kind:SPEC`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from burnish.config.base import setting
from burnish.config.spec import MethodSpec, ModelSpec
from burnish.config.train import TrainSettings
from burnish.core.batch import Outputs, Table, build_packed_batch
from burnish.core.group import Completion, Group
from burnish.engine.source import StepData, Window
from burnish.engine.streams import build_numpy_generator
from burnish.losses.terms import LossResult, Metric, Term
from burnish.methods.base import BaseMethod

CHOICES = np.arange(40, 48, dtype=np.int32)


class EvenSettings(TrainSettings):
    """Settings of the kind."""

    kind: str = setting("own_kind:SPEC", "Prefer even tokens.")
    value_model: str | None = setting(None, "Where the value model starts; default: the stage's own model.")
    value_learning_rate: float | None = setting(None, "Peak learning rate of the value model.", gt=0)
    answer_tokens: int = setting(3, "Tokens of a sample.", ge=1)
    samples: int = setting(2, "Samples of a prompt.", ge=1)
    window_steps: int = setting(2, "Optimizer steps that a window of samples serves.", ge=1)


class Seen:
    """How many samples were trained on."""

    def initial(self) -> dict[str, Any]:
        return {"samples": 0}

    def advance(self, outputs: Outputs, table: Table, state: Mapping[str, Any]) -> dict[str, Any]:
        return {"samples": state["samples"] + len(table.completion_group)}


class Even(BaseMethod):
    """REINFORCE with a value model; the advantages of a step are centred over the whole step."""

    name = "even"
    want: Mapping[str, frozenset[str]] = {"policy": frozenset({"logprobs"}), "value": frozenset({"values"})}
    coupled = True

    def __init__(self, settings: EvenSettings) -> None:
        self.state = Seen()

    def counts(self, groups: Sequence[Group]) -> dict[str, float]:
        tokens = float(sum(c.scored for g in groups for c in g.completions))
        return {"policy": tokens, "value": tokens}

    def compute_loss(
        self, outputs: Outputs, table: Table, state: Mapping[str, Any], *, evaluating: bool = False
    ) -> LossResult:
        logprobs, values = outputs.logprobs, outputs.values
        assert logprobs is not None and values is not None
        rewards = table.columns.get("reward", table.completion_group.new_zeros(len(table.completion_group)))
        reward = rewards.to(values.dtype)[table.token_completion]
        advantage = (reward - values).detach()
        advantage = advantage - (advantage.mean() if len(advantage) else 0.0)
        count = float(len(logprobs))
        terms = (
            Term("policy", -(advantage * logprobs).sum(), count, "token"),
            Term("value", ((values - reward) ** 2).sum(), count, "token", 0.5),
        )
        return LossResult(terms, (Metric("reward", reward.sum(), count),))


class Samples:
    """Windows of samples, made with the models of their first step."""

    has_windows = True

    def __init__(self, settings: EvenSettings, prompts: Sequence[Group], batch_size: int) -> None:
        self.settings, self.prompts, self.batch_size = settings, prompts, batch_size
        self.steps_per_epoch = -(-len(prompts) // batch_size)
        self.total_steps = settings.max_steps
        self.window: Window | None = None
        self.made: list[int] = []

    def ends_epoch(self, n: int) -> bool:
        return n % self.steps_per_epoch == self.steps_per_epoch - 1

    def prepare(self, n: int, models: Mapping[str, Any]) -> Window:
        self.made.append(n)
        policy = models["policy"]
        modes = policy.training
        policy.train(False)
        last = min(n + self.settings.window_steps, self.total_steps) - 1
        groups = []
        for step in range(n, last + 1):
            for i in range(self.batch_size):
                prompt = self.prompts[(step * self.batch_size + i) % len(self.prompts)]
                groups.append(self._sample(policy, prompt, step, i))
        policy.train(modes)
        return Window(n, last, tuple(groups), {"made_at": n})

    def _sample(self, policy: Any, prompt: Group, step: int, row: int) -> Group:
        completions = []
        for sample in range(self.settings.samples):
            rng = build_numpy_generator(self.settings.seed, "sampling", step, row, sample)
            ids: list[int] = []
            for _ in range(self.settings.answer_tokens):
                so_far = np.concatenate([prompt.prompt, np.asarray(ids, np.int32)])
                options = tuple(Completion(CHOICES[i : i + 1], np.ones(1, bool)) for i in range(len(CHOICES)))
                batch = build_packed_batch([Group("", so_far, options)]).to(policy.device)
                with torch.no_grad():
                    found = policy(batch, frozenset({"logprobs"})).logprobs
                shares = torch.softmax(found.double().cpu(), 0).cumsum(0).numpy()
                ids.append(int(CHOICES[min(int(np.searchsorted(shares, rng.random())), len(CHOICES) - 1)]))
            tokens = np.asarray(ids, np.int32)
            reward = float((tokens % 2 == 0).mean())
            completions.append(Completion(tokens, np.ones(len(tokens), bool), {"reward": reward}))
        return Group(f"{prompt.id}@{step}.{row}", prompt.prompt, tuple(completions), tags=prompt.tags)

    def use(self, window: Window) -> None:
        self.window = window

    def step(self, n: int) -> StepData:
        assert self.window is not None and self.window.first <= n <= self.window.last
        start = (n - self.window.first) * self.batch_size
        groups = list(self.window.groups[start : start + self.batch_size])
        return StepData(groups, n // self.steps_per_epoch, self.ends_epoch(n))


def build_samples(settings: EvenSettings, prompts: Sequence[Group], *, batch_size: int) -> Samples:
    return Samples(settings, prompts, batch_size)


SPEC = MethodSpec(
    name="even",
    settings=f"{__name__}:EvenSettings",
    runner=f"{__name__}:Even",
    summary="prefers even tokens",
    rows="completion",
    models={
        "policy": ModelSpec(),
        "value": ModelSpec(head="score", start="value_model", learning_rate="value_learning_rate"),
    },
    coupling="step",
    source=f"{__name__}:build_samples",
    model_settings={"value_model": None},
    metrics=("reward",),
)

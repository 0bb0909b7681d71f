"""What stages say of each other: who starts from whom, who judges, what is evaluated."""

from __future__ import annotations

from collections.abc import Sequence

from burnish.config.base import Settings
from burnish.config.problems import Problem
from burnish.config.registry import find_method_spec
from burnish.config.spec import Head
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.stages import EvaluateSettings
from burnish.config.train import TrainSettings

BASE = "base"


def check_stages(stages: Sequence[Settings], names: Sequence[str]) -> list[Problem]:
    """Problems between the stages of a recipe."""
    problems: list[Problem] = []
    order = {name: i for i, name in enumerate(names)}
    by_name = {str(getattr(stage, "name", "")): stage for stage in stages}
    for stage in stages:
        if isinstance(stage, TrainSettings):
            problems += _check_training(stage, order, by_name)
        elif isinstance(stage, EvaluateSettings):
            problems += _check_evaluation(stage, order, by_name)
    return problems


def _check_training(stage: TrainSettings, order: dict[str, int], by_name: dict[str, Settings]) -> list[Problem]:
    path = f"stages.{stage.name}"
    problems = []
    if stage.init_from is not None:
        problem = _check_earlier(f"{path}.init_from", stage.init_from, str(stage.name), order, by_name)
        if problem is None and _is_reward(by_name.get(stage.init_from)) and not _is_reward(stage):
            problem = Problem(
                f"{path}.init_from",
                f"is {stage.init_from!r}, a reward model: it gives scores, not text, and cannot become a policy",
                _list_choices(
                    "start from", [n for n in _earlier(str(stage.name), order, by_name) if not _is_reward(by_name[n])]
                ),
            )
        if problem is not None:
            problems.append(problem)
        elif stage.model is not None:
            problems.append(
                Problem(
                    f"{path}.model",
                    f"is {stage.model!r}, but init_from is {stage.init_from!r}: the stage can start from one only",
                    "remove one of the two",
                )
            )
    for key, head in find_method_spec(stage.kind).model_settings.items():
        target = getattr(stage, key)
        if target not in (None, type(stage).model_fields[key].default):
            problem = _check_model(stage, key, head, str(target), order, by_name)
            problems += [problem] if problem is not None else []
    if stage.data is None:
        problems.append(
            Problem(
                f"{path}.data",
                "the stage has no data",
                "set data: a file, a folder, pocket/… or a hub id, here or at the top",
            )
        )
    return problems


def _check_model(
    stage: TrainSettings,
    setting: str,
    head: Head | None,
    target: str,
    order: dict[str, int],
    by_name: dict[str, Settings],
) -> Problem | None:
    """A setting that may name an earlier stage, which must come before and give what is read of it."""
    key, name = f"stages.{stage.name}.{setting}", str(stage.name)
    if head == "score":
        return _check_reward_model(key, name, target, order, by_name)
    if target not in order:
        return None
    problem = _check_earlier(key, target, name, order, by_name)
    if problem is None and head == "lm" and _is_reward(by_name[target]):
        choices = [n for n in _earlier(name, order, by_name) if not _is_reward(by_name[n])]
        problem = Problem(
            key,
            f"is {target!r}, a reward model: it gives scores, and no distribution over tokens",
            _list_choices("take one of", choices),
        )
    return problem


def _check_reward_model(
    key: str, name: str, target: str, order: dict[str, int], by_name: dict[str, Settings]
) -> Problem | None:
    """A plain word is the name of a stage; folders and hub ids have a mark in them."""
    if target not in order and any(mark in target for mark in "/\\~."):
        return None
    rewards = [n for n in _earlier(name, order, by_name) if _is_reward(by_name[n])]
    problem = _check_earlier(key, target, name, order, by_name)
    if problem is not None and target not in order:
        near = describe_suggestions(suggest(target, rewards))
        choices = (
            f"the reward stages before it are {', '.join(rewards)}" if rewards else "no reward stage comes before it"
        )
        remedy = f"{near or choices}; a folder is written ./{target}, a hub id owner/name"
        problem = Problem(key, problem.message, remedy)
    if problem is None and not _is_reward(by_name[target]):
        add = "add a stage {kind: reward, …} before it, or give a reward model's folder or hub id"
        problem = Problem(
            key, f"is {target!r}, which is no reward stage", _list_choices("weigh by", rewards) if rewards else add
        )
    return problem


def check_models(stages: Sequence[Settings], has_models: bool) -> list[Problem]:
    """Stages that nothing tells what to start from."""
    return [
        Problem(
            f"stages.{stage.name}.model",
            "the stage has no model to start from",
            "set model: (here or at the top), or init_from: an earlier stage",
        )
        for stage in stages
        if isinstance(stage, TrainSettings) and stage.model is None and stage.init_from is None and not has_models
    ]


def _check_evaluation(stage: EvaluateSettings, order: dict[str, int], by_name: dict[str, Settings]) -> list[Problem]:
    path = f"stages.{stage.name}"
    problems = []
    for target in stage.of:
        if target != BASE:
            problem = _check_earlier(f"{path}.of", target, str(stage.name), order, by_name, extra=[BASE])
            if problem is not None:
                problems.append(problem)
    rewards = [name for name in _earlier(str(stage.name), order, by_name) if _is_reward(by_name[name])]
    if stage.judge is not None:
        problem = _check_earlier(f"{path}.judge", stage.judge, str(stage.name), order, by_name)
        judge = by_name.get(stage.judge)
        if problem is None and not _is_reward(judge):
            problem = Problem(
                f"{path}.judge", f"is {stage.judge!r}, which is no reward stage", _list_choices("judge with", rewards)
            )
        if problem is not None:
            problems.append(problem)
    elif "win_rate" in stage.tasks and not rewards:
        problems.append(
            Problem(
                f"{path}.tasks",
                "win_rate needs a judge, but no reward stage comes before",
                "add a stage {kind: reward, …} before it, or take win_rate out of tasks",
            )
        )
    return problems


def _check_earlier(
    key: str,
    target: str,
    name: str,
    order: dict[str, int],
    by_name: dict[str, Settings],
    extra: Sequence[str] = (),
) -> Problem | None:
    """The problem of a reference to a stage that is unknown, later, the stage itself, or trains nothing."""
    choices = [*extra, *_earlier(name, order, by_name)]
    if target not in order:
        near = describe_suggestions(suggest(target, choices))
        if target == BASE:
            near = "leave init_from out to start from the base model"
        return Problem(key, f"there is no stage {target!r}", near or _list_choices("stages before it:", choices))
    if target == name:
        return Problem(key, f"is {target!r}, the stage itself", _list_choices("stages before it:", choices))
    if order[target] > order[name]:
        return Problem(key, f"is {target!r}, which comes later", f"move {target} before {name}")
    if target in by_name and not isinstance(by_name[target], TrainSettings):
        return Problem(
            key, f"is {target!r}, which trains nothing", _list_choices("training stages before it:", choices)
        )
    return None


def _earlier(name: str, order: dict[str, int], by_name: dict[str, Settings]) -> list[str]:
    """Training stages before a stage."""
    return [n for n in order if order[n] < order[name] and isinstance(by_name.get(n), TrainSettings)]


def _is_reward(stage: Settings | None) -> bool:
    """Whether the result of a stage gives scores."""
    return isinstance(stage, TrainSettings) and find_method_spec(stage.kind).result.head == "score"


def _list_choices(verb: str, choices: Sequence[str]) -> str:
    return f"{verb} {', '.join(choices)}" if choices else "no training stage comes before it; add one"

"""Settings of one stage that contradict each other.

Every check is a function from settings to problems, registered for a class; it reads values only, so that a resolved
recipe, where everything is written out, passes the checks that its origin passed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from burnish.config.base import Settings
from burnish.config.data import DataSettings
from burnish.config.distributed import find_contradictions as find_distributed_contradictions
from burnish.config.dynamic_beta import find_contradictions
from burnish.config.losses import find_entry, find_readers, find_unread, get_loss_names, is_registered
from burnish.config.needs import find_entries, find_needs, is_among, list_metrics
from burnish.config.problems import Problem
from burnish.config.registry import ALIASES, KINDS, LOSS_TYPES, find_method_spec
from burnish.config.spelling import describe_suggestions, suggest
from burnish.config.stages import (
    CpoSettings,
    DistillSettings,
    DpoSettings,
    EvaluateSettings,
    KtoSettings,
    ReferenceSettings,
)
from burnish.config.train import TrainSettings

Found = Iterator[tuple[str, str, str]]  # setting, what is wrong, what to do
Check = Callable[[Any], Found]

CHECKS: list[tuple[type[Settings], Check]] = []
EVALUATION_TASKS = ("loss", "preferences", "win_rate")
MADPO = ("madpo_c_max", "madpo_c_min", "madpo_lambda", "madpo_tau")


def check_stage(settings: Settings, path: str, *, processes: int = 1) -> list[Problem]:
    """All contradictions within a stage."""
    found: list[tuple[str, str, str]] = []
    for cls, check in CHECKS:
        if isinstance(settings, cls):
            found.extend(check(settings))
    if isinstance(settings, TrainSettings):
        found.extend(_check_batch(settings, processes))
    return [Problem(f"{path}.{key}", message, remedy) for key, message, remedy in found]


def _check(cls: type[Settings]) -> Callable[[Check], Check]:
    def register(check: Check) -> Check:
        CHECKS.append((cls, check))
        return check

    return register


def _is_changed(settings: Settings, name: str) -> bool:
    return getattr(settings, name) != type(settings).model_fields[name].default


def _check_batch(s: TrainSettings, processes: int) -> Found:
    total, device, steps = s.batch_size, s.per_device_train_batch_size, s.gradient_accumulation_steps
    if total is None:
        return
    people = f"{processes} processes" if processes > 1 else "1 process"
    if device is not None and steps is not None:
        product = device * steps * processes
        if product != total:
            yield (
                "batch_size",
                f"is {total}, but per_device_train_batch_size {device} × gradient_accumulation_steps {steps} "
                f"× {people} = {product}",
                f"set batch_size: {product}, or leave one of the three out",
            )
    elif steps is not None and total % (steps * processes):
        unit = steps * processes
        low = total - total % unit
        nearest = f"{low} or {low + unit}" if low else str(unit)
        yield (
            "batch_size",
            f"is {total}, not divisible by gradient_accumulation_steps {steps} × {people}",
            f"the nearest valid values are {nearest}; or leave gradient_accumulation_steps out",
        )


@_check(DataSettings)
def _check_data(s: DataSettings) -> Found:
    if s.eval_data is not None and s.validation_split:
        yield "validation_split", f"is {s.validation_split:g}, but eval_data is given too", "keep one of the two"
    if s.slice_offset and s.slice_share is None:
        yield "slice_offset", f"is {s.slice_offset:g} without slice_share", "set slice_share too"
    if s.slice_share is not None and s.slice_share + s.slice_offset > 1 + 1e-9:
        yield (
            "slice_share",
            f"is {s.slice_share:g} from offset {s.slice_offset:g}, which ends beyond the data",
            f"slice_share may be {1 - s.slice_offset:g} at most there",
        )
    for name in ("max_prompt_length", "max_completion_length"):
        value = getattr(s, name)
        if value is not None and s.max_length is not None and value >= s.max_length:
            rest = "completion" if name == "max_prompt_length" else "prompt"
            yield (
                name,
                f"is {value}, which leaves nothing of max_length {s.max_length} for the {rest}",
                f"the largest valid value is {s.max_length - 1}; or raise max_length",
            )
    if isinstance(s.data, list) and not s.data:
        yield "data", "is an empty list", "name at least one source"


@_check(TrainSettings)
def _check_steps(s: TrainSettings) -> Found:
    if isinstance(s.micro_batch_tokens, int) and s.micro_batch_tokens < 1:
        yield "micro_batch_tokens", f"is {s.micro_batch_tokens}; it must be ≥ 1 or auto", "write auto"
    if s.max_steps == 0:
        yield "max_steps", "is 0, which trains nothing", "write -1 (by epochs) or at least 1"
    if s.warmup_steps and s.warmup_ratio:
        yield "warmup_ratio", f"is {s.warmup_ratio:g}, but warmup_steps is {s.warmup_steps}", "keep one of the two"
    if s.max_steps > 0 and s.warmup_steps >= s.max_steps:
        yield (
            "warmup_steps",
            f"is {s.warmup_steps}, so that the peak is never reached in max_steps {s.max_steps}",
            f"the largest valid value is {s.max_steps - 1}",
        )
    if s.lr_scheduler_type == "wsd" and s.warmup_ratio + s.decay_ratio > 1:
        yield (
            "decay_ratio",
            f"is {s.decay_ratio:g}, which with warmup_ratio {s.warmup_ratio:g} is more than all steps",
            f"decay_ratio may be {1 - s.warmup_ratio:g} at most there",
        )
    if s.lr_scheduler_type != "wsd" and _is_changed(s, "decay_ratio"):
        yield (
            "decay_ratio",
            f"has no effect with lr_scheduler_type {s.lr_scheduler_type}",
            "set lr_scheduler_type: wsd, or remove it",
        )
    if s.lr_scheduler_type == "constant" and s.min_lr_ratio:
        yield (
            "min_lr_ratio",
            "has no effect with lr_scheduler_type constant",
            "choose linear, cosine or wsd, or remove it",
        )


@_check(TrainSettings)
def _check_required(s: TrainSettings) -> Found:
    for name in find_method_spec(s.kind).required:
        if getattr(s, name) is None:
            yield (
                name,
                f"is missing: a stage of kind {s.kind} cannot do without",
                "name an earlier stage, a folder or a hub id",
            )


@_check(TrainSettings)
def _check_optimizer(s: TrainSettings) -> Found:
    if s.optim in ("adafactor", "sgd"):
        for name in ("adam_beta1", "adam_beta2", "adam_epsilon"):
            if _is_changed(s, name):
                yield name, f"has no effect with optim {s.optim}", "remove it, or set optim: adamw"
    if s.head_learning_rate is not None and all(m.head == "lm" for m in find_method_spec(s.kind).models.values()):
        yield "head_learning_rate", f"is given, but a stage of kind {s.kind} makes no new head", "remove it"


@_check(TrainSettings)
def _check_trainable(s: TrainSettings) -> Found:
    if s.lora is not None and s.lora.dropout > 0 and getattr(s, "disable_dropout", False):
        yield (
            "lora.dropout",
            f"is {s.lora.dropout:g}, but disable_dropout is on",
            "set lora.dropout: 0, or disable_dropout: false",
        )
    if s.lora is not None and s.top_k:
        yield "top_k", f"is {s.top_k}, but lora is on, which freezes the whole base", "remove one of the two"
    if s.quantize != "none" and s.lora is None:
        yield (
            "quantize",
            f"is {s.quantize}, which freezes the base, but the stage trains no adapter on top of it",
            "add lora: {}, or set quantize: none",
        )
    if _is_changed(s, "bnb_4bit_use_double_quant") and s.quantize not in ("nf4", "fp4"):
        yield (
            "bnb_4bit_use_double_quant",
            f"has no effect with quantize {s.quantize}",
            "set quantize: nf4, or remove it",
        )
    if s.untie_embeddings and not s.top_k:
        yield "untie_embeddings", "is on without top_k, where it changes nothing", "set top_k: K, or remove it"
    if s.lora is not None and s.lora.use_dora and s.lora.bias != "none":
        yield "lora.bias", f"is {s.lora.bias}, which use_dora does not allow", "set lora.bias: none"
    if s.devices is not None and (not s.devices or len(set(s.devices)) < len(s.devices) or min(s.devices) < 0):
        yield "devices", f"is {s.devices}", "list different device numbers from 0, e.g. [0, 1]"


@_check(TrainSettings)
def _check_distributed(s: TrainSettings) -> Found:
    for name, message, remedy in find_distributed_contradictions(s.distributed, s.quantize, s.optim):
        yield f"distributed.{name}", message, remedy


@_check(TrainSettings)
def _check_evaluation(s: TrainSettings) -> Found:
    at_end_only = s.eval_steps == -1
    if s.load_best_model_at_end and at_end_only:
        yield (
            "load_best_model_at_end",
            "is on, but eval_steps -1 evaluates only at the end, so that there is nothing to choose from",
            "set eval_steps: N, or 0 for each epoch",
        )
    if s.early_stopping_patience is not None and at_end_only:
        yield (
            "early_stopping_patience",
            f"is {s.early_stopping_patience}, but eval_steps -1 evaluates only at the end",
            "set eval_steps: N, or 0 for each epoch",
        )
    metric, known = (s.metric_for_best_model or "").removeprefix("eval_"), list_metrics(s)
    if metric and known is not None and not is_among(metric, known):
        yield "metric_for_best_model", *_refuse_metric(metric, known, s)
    if s.greater_is_better is not None and s.metric_for_best_model is None:
        yield "greater_is_better", "is given without metric_for_best_model", "name the metric, or remove it"


def _refuse_metric(metric: str, known: list[str], s: TrainSettings) -> tuple[str, str]:
    """What is wrong with a metric that evaluations do not have, and what to do."""
    names = [f"eval_{name}" for name in known]
    near = describe_suggestions(suggest(f"eval_{metric}", names))
    allowed = f"evaluations of this stage have {', '.join(names)}"
    if is_among(metric, find_method_spec(s.kind).step_metrics):
        return f"is {s.metric_for_best_model}, which training steps have, but not evaluations", allowed
    found = f"is {s.metric_for_best_model}, which no evaluation of this stage has"
    return found, f"{near} ({allowed})" if near else allowed


@_check(TrainSettings)
def _check_rows(s: TrainSettings) -> Found:
    spec = find_method_spec(s.kind)
    if s.drop_identical and spec.rows in ("completion", "prompt"):
        yield "drop_identical", f"is on, but {s.kind} reads no pairs", "remove it"
    if s.flip_share and spec.rows in ("completion", "prompt"):
        yield "flip_share", f"is {s.flip_share:g}, but {s.kind} reads neither pairs nor labels", "remove it"

    if s.train_on != "auto" and not spec.trains_tokens:
        yield (
            "train_on",
            f"is {s.train_on}, but only SFT and distillation choose its tokens; {s.kind} scores whole answers",
            "remove it",
        )


@_check(DpoSettings)
@_check(CpoSettings)
def _check_losses(s: DpoSettings | CpoSettings) -> Found:
    types, known = get_loss_names(s.loss_type), find_method_spec(s.kind).loss_types
    if not types:
        yield "loss_type", "is an empty list", f"name at least one of {', '.join(known)}"
        return
    for word in types:
        if word not in known and not _is_object_path(word):
            yield "loss_type", f"{s.kind} has no loss {word!r}", _suggest_loss(word, s.kind)
    if len(set(types)) < len(types):
        yield "loss_type", f"names a loss twice: {', '.join(types)}", "name each once, and weigh it by loss_weights"
    if s.loss_weights is not None:
        yield from _check_weights(s.loss_weights, types, isinstance(s.loss_type, list))
    entries = [find_entry(s.kind, word) for word in types]
    if all(entry.unit == "token" for entry in entries):
        yield "loss_type", f"is {types[0]} alone, which compares nothing", "write kind: sft, or add a loss on pairs"
    if any(word not in known and not _is_object_path(word) for word in types):
        return
    own = [word for word in types if not is_registered(s.kind, word)]  # what these read is known once they are loaded
    unread = {} if own else find_unread(s, s.kind, dict(zip(types, entries, strict=True)))
    for name, default in unread.items():
        yield (
            name,
            f"is {_show(getattr(s, name))}, but loss_type {', '.join(types)} does not use it",
            f"remove it (default {_show(default)}), or set loss_type: {', '.join(find_readers(s.kind, name))}",
        )
    for word, entry in zip(types, entries, strict=True):
        for name in entry.positive:
            if not getattr(s, name):
                yield (
                    name,
                    f"is 0, but loss_type {word} needs a value above 0",
                    f"set {name} > 0, or loss_type: sigmoid",
                )


def _suggest_loss(word: str, kind: str) -> str:
    """What to write in place of a loss type that a kind does not have."""
    if word in KINDS and KINDS[word].trains:
        return f"write kind: {word}"
    alias = ALIASES.get(word)
    if alias is not None and alias.kind == kind:
        return f"write kind: {word}, or loss_type: {_show(alias.fixed['loss_type'])}"
    known = find_method_spec(kind).loss_types
    near = describe_suggestions(suggest(word, known))
    elsewhere = [k for k, found in LOSS_TYPES.items() if word in found]
    hint = near or (f"kind {', '.join(elsewhere)} has it" if elsewhere else "")
    allowed = f"the types are {', '.join(known)}, or module:function"
    return f"{hint} ({allowed})" if hint else allowed


def _show(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return f"[{', '.join(value)}]" if isinstance(value, list) else str(value)


@_check(DpoSettings)
def _check_pair_weights(s: DpoSettings) -> Found:
    if s.f_divergence_type != "alpha_divergence" and _is_changed(s, "f_alpha_divergence_coef"):
        yield (
            "f_alpha_divergence_coef",
            f"is {s.f_alpha_divergence_coef:g}, but f_divergence_type is {s.f_divergence_type}",
            "set f_divergence_type: alpha_divergence, or remove it",
        )
    for name in MADPO:
        if s.reward_model is None and _is_changed(s, name):
            yield (
                name,
                f"is {getattr(s, name):g}, but no reward_model gives the margins that it is about",
                "set reward_model: an earlier reward stage, a folder or a hub id, or remove it",
            )
    sorting = [name for name, entry in find_entries(s).items() if not entry.aligned]
    for name, given in (("use_weighting", "on" if s.use_weighting else ""), ("reward_model", s.reward_model)):
        if given and sorting:
            yield (
                name,
                f"is {given}, but loss_type {', '.join(sorting)} compares answers of different pairs, which have no weight",
                "remove it, or choose another loss_type",
            )


def _check_weights(weights: list[float], types: list[str], is_list: bool) -> Found:
    if not is_list:
        yield (
            "loss_weights",
            "is given, but loss_type is a single loss",
            "write loss_type: [..], or remove loss_weights",
        )
    elif len(weights) != len(types):
        yield (
            "loss_weights",
            f"has {len(weights)} weight{'s' * (len(weights) != 1)} for {len(types)} loss types ({', '.join(types)})",
            "give one weight for each",
        )
    if any(weight < 0 for weight in weights) or not any(weights):
        yield "loss_weights", f"is {weights}", "weights may not be negative, nor all be zero"


@_check(DistillSettings)
def _check_teacher(s: DistillSettings) -> Found:
    if s.loss_type != "jsd" and _is_changed(s, "jsd_beta"):
        yield "jsd_beta", f"is {s.jsd_beta:g}, but loss_type is {s.loss_type}", "set loss_type: jsd, or remove it"


@_check(KtoSettings)
def _check_label_weights(s: KtoSettings) -> Found:
    if not s.desirable_weight and not s.undesirable_weight:
        yield "desirable_weight", "is 0, and undesirable_weight too: nothing would be learnt", "set one of them above 0"


@_check(DpoSettings)
def _check_live_reference(s: DpoSettings) -> Found:
    if s.reference_mode == "cached" and "logits" in find_needs(s).reference:
        live = [name for name, entry in find_entries(s).items() if entry.live]
        yield (
            "reference_mode",
            f"is cached, but loss_type {', '.join(live)} reads the reference's whole distribution, which is not stored",
            "set reference_mode: auto, copy or adapter",
        )


@_check(ReferenceSettings)
def _check_reference(s: ReferenceSettings) -> Found:
    if s.reference_mode == "adapter" and s.lora is None:
        yield (
            "reference_mode",
            "is adapter, but the stage trains no adapter whose base could serve as reference",
            "add lora: {}, or set reference_mode: auto",
        )
    if s.reference_mode == "adapter" and s.reference != "same":
        yield (
            "reference_mode",
            f"is adapter, but reference names another model ({s.reference})",
            "set reference_mode: cached or copy, or reference: same",
        )


@_check(TrainSettings)
def _check_dynamic_beta(s: Any) -> Found:
    section = getattr(s, "dynamic_beta", None)
    if section is None:
        return
    for name, message, remedy in find_contradictions(section, s.beta):
        yield f"dynamic_beta.{name}", message, remedy
    entries = find_entries(s) if section.type != "constant" else {}
    if "epsilon" in entries:
        yield "dynamic_beta", f"is {section.type}, but loss_type epsilon moves beta by itself", "remove one of the two"
    apart = [name for name, entry in entries.items() if not entry.aligned]
    if apart and section.coupled:
        yield (
            "dynamic_beta",
            f"gives pairs a beta of their own, but loss_type {', '.join(apart)} compares sorted answers, not pairs",
            "set type: risk with unit: step, or another loss_type",
        )


@_check(EvaluateSettings)
def _check_tasks(s: EvaluateSettings) -> Found:
    if not s.tasks:
        yield "tasks", "is empty", f"name at least one of {', '.join(EVALUATION_TASKS)}, or a checkable set"
    for task in s.tasks:
        if task not in EVALUATION_TASKS and not any(mark in task for mark in "/.:"):
            near = describe_suggestions(suggest(task, EVALUATION_TASKS))
            allowed = f"tasks are {', '.join(EVALUATION_TASKS)}, or a checkable set such as pocket/maths"
            yield "tasks", f"there is no task {task!r}", f"{near} ({allowed})" if near else allowed
    for name in ("tasks", "of"):
        values = getattr(s, name)
        double = sorted({value for value in values if values.count(value) > 1})
        if double:
            yield name, f"names {double[0]!r} twice", "name each once"
    if s.judge is not None and "win_rate" not in s.tasks:
        yield "judge", f"is {s.judge}, but no task needs a judge", "add win_rate to tasks, or remove judge"


def _is_object_path(word: str) -> bool:
    module, separator, name = word.partition(":")
    return bool(separator) and name.isidentifier() and all(part.isidentifier() for part in module.split("."))

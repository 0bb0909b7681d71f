"""DeepSpeed's JSON: what each line is here.

ZeRO 1 and 2 keep the weights between forward and backward and shard the rest, as fsdp2 without resharding after forward
does; ZeRO 3 frees them in between, as fsdp2 with it does (Rajbhandari et al. 2020, arXiv 1910.02054).
"""

from __future__ import annotations

from functools import partial
from typing import Any

from burnish.config.distributed_lines import (
    AUTO,
    Handler,
    Reading,
    agrees,
    as_choice,
    as_setting,
    find_value,
    gives,
    read_flag,
    read_lines,
    show,
    skips,
    skips_unless,
)
from burnish.config.tree import Node

SECTIONS = frozenset(
    {
        "optimizer",
        "optimizer.params",
        "scheduler",
        "scheduler.params",
        "fp16",
        "bf16",
        "zero_optimization",
        "zero_optimization.offload_optimizer",
        "zero_optimization.offload_param",
        "data_types",
    }
)
OPTIMIZERS = {"adam": "adamw", "adamw": "adamw", "fusedadam": "adamw", "sgd": "sgd", "adafactor": "adafactor"}
SCHEDULERS = {"warmuplr": "constant", "warmupdecaylr": "linear", "warmupcosinelr": "cosine"}

_TUNING = "DeepSpeed's buffers and streams; fsdp2 sizes and overlaps its own"
_SCALER = "the loss scale starts at 65536, halves at an overflow, doubles after 2000 clean steps"
_MONITOR = "set report_to: [tensorboard] or [wandb]"


def set_zero_stage(reading: Reading, key: str, node: Node) -> None:
    """Stage 0: replicated; 1 and 2: fsdp2 that keeps gathered weights until backward; 3: fsdp2 that frees them."""
    stage = node.value
    if stage == AUTO:
        reading.leave(key, node, "distributed.strategy")
    elif isinstance(stage, bool) or stage not in (0, 1, 2, 3):
        reading.fail(key, node, f"is {show(node)}", "the stages are 0, 1, 2 and 3")
    elif stage == 0:
        reading.take(key, node, "distributed.strategy", "replicated")
    else:
        reading.take(key, node, "distributed.strategy", "fsdp2")
        reading.take(key, node, "distributed.reshard_after_forward", stage == 3)


def set_offload(reading: Reading, key: str, node: Node, *, least_stage: int = 1, stage: Any = None) -> None:
    """cpu: the shards live on the CPU; fsdp2 moves weights and the optimizer's state there together."""
    word = node.value if isinstance(node.value, str) else "none" if node.value is None else ""
    if word == AUTO or word == "none":
        reading.agree(key, node, "nothing is kept on the CPU")
    elif word == "nvme":
        reading.skip(key, node, "nothing is kept on NVMe disks; distributed.cpu_offload: true keeps it on the CPU")
    elif word != "cpu":
        reading.fail(key, node, f"is {show(node)}", "write cpu, nvme or none")
    elif isinstance(stage, int) and stage < least_stage:
        reading.skip(key, node, f"DeepSpeed reads it from ZeRO stage {least_stage} on, and the stage is {stage}")
    else:
        reading.take(key, node, "distributed.cpu_offload", True)


def _set_precision(reading: Reading, key: str, node: Node, root: Node) -> None:
    """fp16 or bf16, or fp32 where neither is on."""
    mine = key.partition(".")[0]
    other = "fp16" if mine == "bf16" else "bf16"
    beside = find_value(root, f"{other}.enabled")
    if node.value == AUTO:
        reading.leave(key, node, "precision")
        return
    flag = read_flag(reading, key, node)
    if flag:
        reading.take(key, node, "precision", mine)
    elif flag is False and beside in (True, AUTO):
        reading.agree(key, node, f"{other} decides the precision")
    elif flag is False:
        reading.take(key, node, "precision", "fp32")


def _set_optimizer(reading: Reading, key: str, node: Node) -> None:
    word = str(node.value).lower()
    if isinstance(node.value, dict | list):
        reading.fail(key, node, f"is {show(node)}", "write the name of an optimizer, such as AdamW")
    elif word == AUTO:
        reading.leave(key, node, "optim")
    elif word in OPTIMIZERS:
        reading.take(key, node, "optim", OPTIMIZERS[word])
    else:
        reading.skip(key, node, "burnish has adamw, adamw_8bit, adafactor and sgd; set optim to one of them")


def _set_betas(reading: Reading, key: str, node: Node) -> None:
    if node.value == AUTO:
        reading.leave(key, node, "adam_beta1 and adam_beta2")
    elif not isinstance(node.value, list) or len(node.value) != 2:
        reading.fail(key, node, f"is {show(node)}", "write two numbers, such as [0.9, 0.999]")
    else:
        for setting, child in zip(("adam_beta1", "adam_beta2"), node.value, strict=True):
            if child.value == AUTO:
                reading.leave(key, child, setting)
            else:
                reading.take(key, child, setting, child.plain())


def _set_schedule(reading: Reading, key: str, node: Node) -> None:
    word = str(node.value).lower()
    if isinstance(node.value, dict | list):
        reading.fail(key, node, f"is {show(node)}", "write the name of a schedule, such as WarmupDecayLR")
    elif word == AUTO:
        reading.leave(key, node, "lr_scheduler_type")
    elif word in SCHEDULERS:
        reading.take(key, node, "lr_scheduler_type", SCHEDULERS[word])
    else:
        reading.skip(key, node, "burnish has constant, linear, cosine and wsd; set lr_scheduler_type to one of them")


def _only_with(root: Node, section: str, known: dict[str, str], handler: Handler) -> Handler:
    """Parameters of an optimizer or schedule that is not taken are not taken either."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        name = find_value(root, f"{section}.type")
        if name is None or str(name).lower() in (*known, AUTO):
            handler(reading, key, node)
        else:
            reading.skip(key, node, f"it belongs to {section}.type {name}, which is not taken")

    return handle


_BATCH: dict[str, Handler] = {
    "train_batch_size": as_setting("batch_size"),
    "train_micro_batch_size_per_gpu": as_setting("per_device_train_batch_size"),
    "gradient_accumulation_steps": as_setting("gradient_accumulation_steps"),
    "gradient_clipping": as_setting("max_grad_norm"),
}
_OPTIMIZER: dict[str, Handler] = {
    "optimizer.params.lr": as_setting("learning_rate"),
    "optimizer.params.betas": _set_betas,
    "optimizer.params.eps": as_setting("adam_epsilon"),
    "optimizer.params.weight_decay": as_setting("weight_decay"),
    "optimizer.params.torch_adam": agrees("it is torch's AdamW, fused"),
    "optimizer.params.adam_w_mode": skips_unless(True, "weight decay is always AdamW's, decoupled from the gradient"),
    "optimizer.params.bias_correction": skips_unless(True, "moments are always corrected for their start at 0"),
    "optimizer.params.amsgrad": skips_unless(False, "the maximum of past second moments is not kept"),
    "optimizer.params.momentum": skips_unless(0, "sgd has no momentum here"),
    "optimizer.params.nesterov": skips_unless(False, "sgd has no momentum here"),
    "optimizer.params.*": skips("no setting of the optimizer here"),
}
_SCHEDULER: dict[str, Handler] = {
    "scheduler.params.warmup_max_lr": as_setting("learning_rate"),
    "scheduler.params.warmup_num_steps": as_setting("warmup_steps"),
    "scheduler.params.cos_min_ratio": as_setting("min_lr_ratio"),
    "scheduler.params.warmup_min_lr": skips_unless(0, "warm-up begins near 0"),
    "scheduler.params.warmup_min_ratio": skips_unless(0, "warm-up begins near 0"),
    "scheduler.params.warmup_type": skips_unless("linear", "warm-up is linear"),
    "scheduler.params.total_num_steps": skips("the schedule ends with the stage; set max_steps or num_train_epochs"),
    "scheduler.params.last_batch_iteration": skips("a resumed run goes on where it was"),
    "scheduler.params.*": skips("no setting of the schedule here"),
}
_PRECISION: dict[str, Handler] = {
    "fp16.loss_scale": skips_unless(0, f"the loss scale is never fixed: {_SCALER}"),
    "fp16.initial_scale_power": skips_unless(16, _SCALER),
    "fp16.loss_scale_window": skips_unless(2000, _SCALER),
    "fp16.hysteresis": skips_unless(1, _SCALER),
    "fp16.consecutive_hysteresis": skips_unless(False, _SCALER),
    "fp16.min_loss_scale": skips_unless(1, "the loss scale's floor is 1"),
    "fp16.auto_cast": agrees("tensors are cast where a product wants it"),
    "fp16.fp16_master_weights_and_grads": skips_unless(False, "trained weights and gradients are fp32"),
    "bf16.immediate_grad_update": skips(_TUNING),
    "bf16.check_grad_overflow": agrees("every gradient's norm is checked; a step with a bad one changes nothing"),
    "data_types.grad_accum_dtype": skips_unless("fp32", "gradients are added in fp32"),
    "amp": skips("Apex is not used; set precision"),
    "torch_autocast": skips("set precision: bf16 or fp16"),
    "communication_data_type": skips_unless("fp32", "gradients are reduced in fp32"),
    "seq_parallel_communication_data_type": skips("rows are not cut over processes"),
}
_ZERO: dict[str, Handler] = {
    "zero_optimization.stage": set_zero_stage,
    "zero_optimization.cpu_offload": as_choice(
        {"true": gives("distributed.cpu_offload", True), "false": agrees("nothing is kept on the CPU")}
    ),
    "zero_optimization.cpu_offload_params": as_choice(
        {"true": gives("distributed.cpu_offload", True), "false": agrees("nothing is kept on the CPU")}
    ),
    "zero_optimization.offload_optimizer.ratio": skips_unless(1, "all of the optimizer's state is kept on the CPU"),
    "zero_optimization.offload_optimizer.*": skips(_TUNING),
    "zero_optimization.offload_param.*": skips(_TUNING),
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": skips(
        "final/ always holds whole weights; their type is save_dtype"
    ),
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": skips(
        "final/ always holds whole weights; their type is save_dtype"
    ),
    "zero_optimization.zero_hpz_partition_size": skips_unless(1, "shards lie over all processes, not within machines"),
    "zero_optimization.mics_shard_size": skips_unless(-1, "shards lie over all processes, not within machines"),
    "zero_optimization.zero_quantized_weights": skips_unless(False, "weights are gathered as they are"),
    "zero_optimization.zero_quantized_nontrainable_weights": skips_unless(False, "weights are gathered as they are"),
    "zero_optimization.zero_quantized_gradients": skips_unless(False, "gradients are reduced in fp32"),
    "zero_optimization.elastic_checkpoint": agrees("checkpoints load at any number of processes"),
    "zero_optimization.load_from_fp32_weights": agrees("checkpoints hold fp32 weights"),
    "zero_optimization.ignore_unused_parameters": agrees("parameters without a gradient stay as they are"),
    "zero_optimization.*": skips(_TUNING),
}
_REST: dict[str, Handler] = {
    "activation_checkpointing": skips("it sets how, not whether; set gradient_checkpointing: true"),
    "steps_per_print": skips("metrics are written every logging_steps steps"),
    "wall_clock_breakdown": skips_unless(False, "the seconds of each step are always kept, those of its parts are not"),
    "memory_breakdown": skips_unless(False, "memory is in the log"),
    "dump_state": skips_unless(False, "`burnish config show --all` prints every setting"),
    "zero_allow_untested_optimizer": agrees("any optimizer may be used"),
    "zero_force_ds_cpu_optimizer": skips("the optimizer is torch's"),
    "prescale_gradients": skips_unless(False, "the sum over all processes is divided once"),
    "gradient_predivide_factor": skips_unless(1, "the sum over all processes is divided once"),
    "sparse_gradients": skips_unless(False, "gradients are dense"),
    "disable_allgather": skips(_TUNING),
    "tensorboard": skips(_MONITOR),
    "wandb": skips(_MONITOR),
    "comet": skips(_MONITOR),
    "csv_monitor": skips("metrics.jsonl holds every metric"),
    "comms_logger": skips("it is DeepSpeed's own"),
    "flops_profiler": skips("use `make bench` or torch's profiler"),
    "autotuning": skips("micro_batch_tokens: auto sizes micro-batches"),
    "elasticity": skips("a run resumes at any number of processes; batch_size stays"),
    "checkpoint": skips("checkpoints are burnish's own; see save_steps"),
    "nebula": skips("checkpoints are burnish's own; see save_steps"),
    "aio": skips("nothing is kept on NVMe disks"),
    "compression_training": skips("see quantize"),
    "sparse_attention": skips("see attention"),
    "data_efficiency": skips("data is what the recipe says"),
    "curriculum_learning": skips("data is what the recipe says"),
    "pipeline": skips("a model is not cut by layers"),
    "tensor_parallel": skips("a model is not cut within layers"),
    "hybrid_engine": skips("it is DeepSpeed's own"),
    "compile": skips("nothing is compiled"),
    "seed": as_setting("seed"),
}


def build_handlers(root: Node) -> dict[str, Handler]:
    """Path → what becomes of the line; some depend on others of the file."""
    stage = find_value(root, "zero_optimization.stage")
    handlers = _BATCH | _PRECISION | _ZERO | _REST | {"optimizer.type": _set_optimizer, "scheduler.type": _set_schedule}
    handlers |= {key: _only_with(root, "optimizer", OPTIMIZERS, handler) for key, handler in _OPTIMIZER.items()}
    handlers |= {key: _only_with(root, "scheduler", SCHEDULERS, handler) for key, handler in _SCHEDULER.items()}
    for block in ("fp16", "bf16"):
        handlers[f"{block}.enabled"] = partial(_set_precision, root=root)
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        handlers[f"zero_optimization.{name}.device"] = partial(set_offload, least_stage=least, stage=stage)
    return handlers


def read_deepspeed(reading: Reading, root: Node) -> None:
    """Reads every line of a DeepSpeed configuration."""
    read_lines(reading, root, build_handlers(root), SECTIONS)

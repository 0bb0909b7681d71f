"""accelerate's YAML: what each line is here."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from burnish.config.deepspeed_file import read_deepspeed, set_offload, set_zero_stage
from burnish.config.distributed_lines import (
    AUTO,
    Handler,
    Reading,
    agrees,
    as_choice,
    as_setting,
    as_switch,
    find_value,
    gives,
    read_lines,
    show,
    skips,
    skips_unless,
)
from burnish.config.tree import Node

SECTIONS = frozenset({"fsdp_config", "deepspeed_config"})
# Keys that only a file of accelerate has at its top.
MARKS = frozenset({"compute_environment", "distributed_type", "mixed_precision", "num_machines", *SECTIONS})

_LAUNCHER = "that is the launcher's: torchrun, accelerate launch, or the text of `burnish launch`"
_BLOCKS = "each block of the model is a unit"
_WHOLE = "fsdp2 writes its checkpoints in shards; final/ holds whole weights"
_LOADING = "every process gets the weights when the model is loaded"
_TUNING = "fsdp2 overlaps communication by itself"


def _set_processes(reading: Reading, key: str, node: Node) -> None:
    reading.skip(key, node, f"give --num-processes {show(node)}, or start with torchrun or accelerate launch")


def _set_devices(reading: Reading, key: str, node: Node) -> None:
    """ "0,1" is devices: [0, 1]; all is the default."""
    text = str(node.raw if node.raw is not None else node.value).strip().lower()
    words = [word.strip() for word in text.split(",")]
    if node.value is None or text == "all":
        reading.agree(key, node, "all devices are used")
    elif isinstance(node.value, dict | list) or not all(word.isascii() and word.isdigit() for word in words):
        reading.fail(key, node, f"is {show(node)}", "write all, or numbers such as 0,1")
    else:
        reading.take(key, node, "devices", [int(word) for word in words])


def _shard(reshard: bool, text: str = "") -> Handler:
    def handle(reading: Reading, key: str, node: Node) -> None:
        reading.take(key, node, "distributed.reshard_after_forward", reshard)
        if text:
            reading.skip(key, node, text)

    return handle


def _replicate(reading: Reading, key: str, node: Node) -> None:
    reading.take(key, node, "distributed.strategy", "replicated")


_HYBRID = "copies of the shards on each machine: shards lie over all processes"
_SHARDING: dict[str, Handler] = {
    "full_shard": _shard(True),
    "1": _shard(True),
    "true": _shard(True),
    "shard_grad_op": _shard(False),
    "2": _shard(False),
    "false": _shard(False),
    "no_shard": _replicate,
    "3": _replicate,
    "hybrid_shard": _shard(True, _HYBRID),
    "4": _shard(True, _HYBRID),
    "hybrid_shard_zero2": _shard(False, _HYBRID),
    "5": _shard(False, _HYBRID),
}


def _set_type(reading: Reading, key: str, node: Node, root: Node) -> None:
    """FSDP is fsdp2, unless its sharding strategy shards nothing; DEEPSPEED says more in its own lines."""
    word = str(node.value).upper()
    unsharded = str(find_value(root, "fsdp_config.fsdp_sharding_strategy")).upper() in ("3", "NO_SHARD")
    if word == "FSDP":
        reading.take(key, node, "distributed.strategy", "replicated" if unsharded else "fsdp2")
    elif word == "DEEPSPEED":
        reading.agree(key, node, "the lines of deepspeed_config say how")
    elif word == "NO":
        reading.agree(key, node, "one process has nothing to share")
    elif word.startswith("MULTI_"):
        reading.take(key, node, "distributed.strategy", "replicated")
    elif word in ("MEGATRON_LM", "XLA", "TPU", "FP8", "SDAA", "MLU"):
        reading.skip(key, node, "burnish has replicated and fsdp2; set distributed.strategy")
    else:
        reading.fail(key, node, f"is {show(node)}", "write NO, MULTI_GPU, MULTI_CPU, FSDP or DEEPSPEED")


def _set_precision(reading: Reading, key: str, node: Node, root: Node) -> None:
    word = str(node.value).lower()
    beside = find_value(root, "deepspeed_config.deepspeed_config_file")
    if word in ("no", "false") and not isinstance(node.value, dict | list):
        if beside is not None:
            reading.agree(key, node, "the file of deepspeed_config decides the precision")
        else:
            reading.take(key, node, "precision", "fp32")
    elif word in ("bf16", "fp16"):
        reading.take(key, node, "precision", word)
    elif word == "fp8":
        reading.skip(key, node, "burnish computes in fp32, bf16 or fp16; set precision")
    elif node.value is None or word == AUTO:
        reading.leave(key, node, "precision")
    else:
        reading.fail(key, node, f"is {show(node)}", "write no, bf16 or fp16")


_FSDP: dict[str, Handler] = {
    "fsdp_version": as_choice({"1": agrees("torch's fully_shard does the same"), "2": agrees("it is fully_shard")}),
    "fsdp_sharding_strategy": as_choice(_SHARDING),
    "fsdp_reshard_after_forward": as_choice(_SHARDING),
    "fsdp_offload_params": as_switch("distributed.cpu_offload"),
    "fsdp_cpu_offload": as_switch("distributed.cpu_offload"),
    "fsdp_activation_checkpointing": as_switch("gradient_checkpointing"),
    "fsdp_activation_checkpointing_offload": skips_unless(False, "activations stay on the device"),
    "fsdp_auto_wrap_policy": skips_unless("transformer_based_wrap", _BLOCKS, _BLOCKS),
    "fsdp_transformer_layer_cls_to_wrap": agrees(f"{_BLOCKS}; its class is found"),
    "fsdp_min_num_params": skips(_BLOCKS),
    "fsdp_ignored_modules": skips("all modules are sharded"),
    "fsdp_state_dict_type": skips(_WHOLE),
    "fsdp_cpu_ram_efficient_loading": agrees(_LOADING),
    "fsdp_sync_module_states": agrees(_LOADING),
    "fsdp_use_orig_params": agrees("fully_shard keeps the parameters"),
    "fsdp_backward_prefetch": skips(_TUNING),
    "fsdp_backward_prefetch_policy": skips(_TUNING),
    "fsdp_forward_prefetch": skips(_TUNING),
    "fsdp_limit_all_gathers": skips(_TUNING),
    "fsdp_mixed_precision_policy": skips("set precision; gradients are reduced in fp32"),
}
_DEEPSPEED: dict[str, Handler] = {
    "zero_stage": set_zero_stage,
    "gradient_accumulation_steps": as_setting("gradient_accumulation_steps"),
    "gradient_clipping": as_setting("max_grad_norm"),
    "offload_optimizer_nvme_path": skips("nothing is kept on NVMe disks"),
    "offload_param_nvme_path": skips("nothing is kept on NVMe disks"),
    "zero3_init_flag": agrees(_LOADING),
    "zero3_save_16bit_model": skips("final/ always holds whole weights; their type is save_dtype"),
    "deepspeed_multinode_launcher": skips(_LAUNCHER),
    "deepspeed_hostfile": skips(_LAUNCHER),
    "deepspeed_exclusion_filter": skips(_LAUNCHER),
    "deepspeed_inclusion_filter": skips(_LAUNCHER),
    "deepspeed_moe_layer_cls_names": skips("experts are sharded like all weights"),
    "auto_cast": agrees("tensors are cast where a product wants it"),
}
_TOP: dict[str, Handler] = {
    "compute_environment": skips_unless("local_machine", "burnish starts on machines, not on SageMaker"),
    "num_processes": _set_processes,
    "gpu_ids": _set_devices,
    "fp16": as_choice({"true": gives("precision", "fp16"), "false": agrees("mixed_precision decides")}),
    "gradient_accumulation_steps": as_setting("gradient_accumulation_steps"),
    "machine_rank": skips(_LAUNCHER),
    "num_machines": skips(_LAUNCHER),
    "main_process_ip": skips(_LAUNCHER),
    "main_process_port": skips(_LAUNCHER),
    "rdzv_backend": skips(_LAUNCHER),
    "same_network": skips(_LAUNCHER),
    "main_training_function": skips("the training function is burnish's"),
    "mpirun_config": skips(_LAUNCHER),
    "use_cpu": skips_unless(False, "set the environment variable BURNISH_DEVICE=cpu"),
    "debug": skips_unless(False, "shapes of collectives are not checked one by one"),
    "enable_cpu_affinity": skips_unless(False, "processes are not bound to cores; use numactl or Slurm"),
    "dynamo_backend": skips_unless("no", "nothing is compiled"),
    "dynamo_config": skips_unless(None, "nothing is compiled"),
    "fp8_config": skips_unless(None, "burnish computes in fp32, bf16 or fp16"),
    "megatron_lm_config": skips_unless(None, "models are sharded by fsdp2, not by Megatron-LM"),
    "parallelism_config": skips_unless(None, "shards lie over all processes; see distributed"),
    **dict.fromkeys(
        (
            "downcast_bf16",
            "tpu_name",
            "tpu_zone",
            "tpu_use_cluster",
            "tpu_use_sudo",
            "tpu_vm",
            "tpu_env",
            "command_file",
            "commands",
        ),
        skips("burnish does not run on TPUs"),
    ),
}


def _only_for(wanted: str, root: Node, handler: Handler) -> Handler:
    """A line of a section that accelerate reads for one distributed_type only."""

    def handle(reading: Reading, key: str, node: Node) -> None:
        given = find_value(root, "distributed_type")
        if given is None or str(given).upper() == wanted:
            handler(reading, key, node)
        else:
            reading.skip(key, node, f"distributed_type is not {wanted}")

    return handle


def build_handlers(root: Node, read_nested: Callable[[str, Node], Node | None]) -> dict[str, Handler]:
    """Path → what becomes of the line; some depend on others of the file."""
    stage = find_value(root, "deepspeed_config.zero_stage")

    def read_file(reading: Reading, key: str, node: Node) -> None:
        if node.value is None or node.value == "none":
            reading.agree(key, node, "no value is given")
            return
        nested = read_nested(key, node)
        if nested is not None:
            reading.agree(key, node, "its lines follow")
            read_deepspeed(reading, nested)

    deepspeed = {**_DEEPSPEED, "deepspeed_config_file": read_file}
    for name, least in (("offload_optimizer_device", 1), ("offload_param_device", 3)):
        deepspeed[name] = partial(set_offload, least_stage=least, stage=stage)
    return {
        **_TOP,
        "distributed_type": partial(_set_type, root=root),
        "mixed_precision": partial(_set_precision, root=root),
        **{f"fsdp_config.{key}": _only_for("FSDP", root, handler) for key, handler in _FSDP.items()},
        **{f"deepspeed_config.{key}": _only_for("DEEPSPEED", root, handler) for key, handler in deepspeed.items()},
    }


def read_accelerate(reading: Reading, root: Node, read_nested: Callable[[str, Node], Node | None]) -> None:
    """Reads every line of an accelerate configuration.

    Args:
        read_nested: Reads the DeepSpeed file that a line names; None, with a problem, where it cannot be read.
    """
    read_lines(reading, root, build_handlers(root, read_nested), SECTIONS)

"""How processes share a stage, and what the files of DeepSpeed and accelerate become (S3-19)."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from burnish.config import accelerate_file, deepspeed_file
from burnish.config.distributed_file import read_file
from burnish.config.load import LoadedRecipe
from burnish.config.tree import Layer, Node, Place, build_node
from burnish.errors import ConfigError
from tests.config.recipes import PAIRS, load, problems_of

DOCS = Path(__file__).resolve().parents[2] / "docs" / "distributed-config.md"
# What seed 003 trains with: ZeRO 2 without offloading, the rest left to the trainer's arguments.
ZERO2 = {
    "fp16": {
        "enabled": "auto",
        "loss_scale": 0,
        "loss_scale_window": 100,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1e-10,
    },
    "zero_optimization": {
        "stage": 2,
        "allgather_partitions": True,
        "allgather_bucket_size": 1e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 1e8,
        "contiguous_gradients": True,
    },
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "steps_per_print": 2000,
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "wall_clock_breakdown": False,
}
FULL = {
    "bf16": {"enabled": True},
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "none"},
    },
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 0.5,
    "train_micro_batch_size_per_gpu": 2,
    "optimizer": {
        "type": "AdamW",
        "params": {"lr": 3e-5, "betas": [0.8, 0.95], "eps": 1e-7, "weight_decay": 0.1},
    },
    "scheduler": {"type": "WarmupCosineLR", "params": {"warmup_num_steps": 7, "cos_min_ratio": 0.2}},
}
FSDP = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "FSDP",
    "mixed_precision": "bf16",
    "num_processes": 8,
    "fsdp_config": {
        "fsdp_version": 2,
        "fsdp_reshard_after_forward": False,
        "fsdp_offload_params": True,
        "fsdp_activation_checkpointing": True,
        "fsdp_state_dict_type": "SHARDED_STATE_DICT",
    },
}


@pytest.fixture(autouse=True)
def _stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(config: Any, *overrides: str, kind: str = "sft", name: str = "engine.json", **stage: Any) -> LoadedRecipe:
    """A recipe of one stage whose `distributed.config` is this."""
    Path(name).write_text(json.dumps(config) if not isinstance(config, str) else config, encoding="utf-8")
    return load({**PAIRS, "stages": [{"kind": kind, "distributed": {"config": name}, **stage}]}, *overrides)


def stage_of(config: Any, *overrides: str, **stage: Any) -> Any:
    return read(config, *overrides, **stage).recipe.stages[0]


def row_of(loaded: LoadedRecipe, key: str) -> str:
    """The row of the table that is about a line of the file."""
    (table,) = loaded.tables
    (row,) = [row for row in table.splitlines() if f" {key} " in row]
    return row


def refuse(config: Any, **stage: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(config, **stage)
    return str(caught.value)


def test_the_file_of_seed_003_is_zero_2():
    loaded = read(ZERO2)
    stage = loaded.recipe.stages[0]
    assert (stage.distributed.strategy, stage.distributed.reshard_after_forward) == ("fsdp2", False)
    plain = load({**PAIRS, "stages": ["sft"]}).recipe.stages[0]
    assert stage.model_copy(update={"distributed": plain.distributed}) == plain, "nothing else changes"
    assert "the recipe's precision" in row_of(loaded, "fp16.enabled")
    assert "not taken" in row_of(loaded, "steps_per_print")
    lines = {row.split()[1] for row in loaded.tables[0].splitlines()[1:]}
    assert lines == {path for path, node in build_node(ZERO2, PLACE).walk() if not isinstance(node.value, dict)}


PLACE = Place(Layer.FILE, "engine.json")


def test_every_line_of_a_full_file_becomes_its_setting():
    stage = stage_of(FULL)
    assert stage.distributed.model_dump() == {
        "strategy": "fsdp2",
        "reshard_after_forward": True,
        "cpu_offload": True,
        "config": None,
    }
    assert (stage.precision, stage.max_grad_norm, stage.gradient_accumulation_steps) == ("bf16", 0.5, 4)
    assert (stage.per_device_train_batch_size, stage.optim, stage.learning_rate) == (2, "adamw", 3e-5)
    assert (stage.adam_beta1, stage.adam_beta2, stage.adam_epsilon, stage.weight_decay) == (0.8, 0.95, 1e-7, 0.1)
    assert (stage.lr_scheduler_type, stage.warmup_steps, stage.min_lr_ratio) == ("cosine", 7, 0.2)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"zero_optimization": {"stage": 0}}, {"strategy": "replicated"}),
        ({"zero_optimization": {"stage": 1}}, {"strategy": "fsdp2", "reshard_after_forward": False}),
        ({"zero_optimization": {"stage": 2}}, {"strategy": "fsdp2", "reshard_after_forward": False}),
        ({"zero_optimization": {"stage": 3}}, {"strategy": "fsdp2", "reshard_after_forward": True}),
        ({"zero_optimization": {"stage": "auto"}}, {}),
        (
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            {"strategy": "fsdp2", "reshard_after_forward": False},
        ),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True}},
            {"strategy": "fsdp2", "reshard_after_forward": False, "cpu_offload": True},
        ),
        ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, {"strategy": "replicated"}),
        ({"distributed_type": "NO"}, {}),
        ({"distributed_type": "MULTI_GPU"}, {"strategy": "replicated"}),
        ({"distributed_type": "MULTI_GPU", "fsdp_config": {"fsdp_sharding_strategy": 1}}, {"strategy": "replicated"}),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "SHARD_GRAD_OP"}},
            {"strategy": "fsdp2", "reshard_after_forward": False},
        ),
        (
            {"distributed_type": "FSDP", "fsdp_config": {"fsdp_sharding_strategy": "NO_SHARD"}},
            {"strategy": "replicated"},
        ),
        (
            {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 3, "offload_param_device": "cpu"}},
            {"strategy": "fsdp2", "reshard_after_forward": True, "cpu_offload": True},
        ),
    ],
)
def test_strategies(config: dict[str, Any], expected: dict[str, Any]):
    section = stage_of(config).distributed
    defaults = {"strategy": "auto", "reshard_after_forward": True, "cpu_offload": False, "config": None}
    assert section.model_dump() == defaults | expected


@pytest.mark.parametrize(
    ("config", "precision"),
    [
        ({"bf16": {"enabled": True}, "fp16": {"enabled": False}}, "bf16"),
        ({"fp16": {"enabled": True}}, "fp16"),
        ({"fp16": {"enabled": False}, "bf16": {"enabled": False}}, "fp32"),
        ({"fp16": {"enabled": "auto"}, "bf16": {"enabled": False}}, "auto"),
        ({"distributed_type": "NO", "mixed_precision": "no"}, "fp32"),
        ({"distributed_type": "NO", "mixed_precision": "fp16"}, "fp16"),
        ({"distributed_type": "NO", "mixed_precision": "fp8"}, "auto"),
    ],
)
def test_precisions(config: dict[str, Any], precision: str):
    assert stage_of(config).precision == precision


def test_accelerates_yaml():
    loaded = read(yaml.safe_dump(FSDP), name="acc.yaml")
    stage = loaded.recipe.stages[0]
    assert stage.distributed.model_dump() == {
        "strategy": "fsdp2",
        "reshard_after_forward": False,
        "cpu_offload": True,
        "config": None,
    }
    assert (stage.precision, stage.gradient_checkpointing) == ("bf16", True)
    assert "--num-processes 8" in row_of(loaded, "num_processes")
    assert loaded.source_of("stages.sft.precision") == "acc.yaml:9"


def test_devices_of_accelerate():
    assert stage_of({"distributed_type": "NO", "gpu_ids": "1, 3"}).devices == [1, 3]
    assert stage_of({"distributed_type": "NO", "gpu_ids": "all"}).devices is None
    assert "gpu_ids" in refuse({"distributed_type": "NO", "gpu_ids": "0;1"})


def test_accelerates_file_may_name_deepspeeds():
    Path("ds.json").write_text(json.dumps(FULL), encoding="utf-8")
    outer = {
        "distributed_type": "DEEPSPEED",
        "mixed_precision": "no",
        "deepspeed_config": {"deepspeed_config_file": "ds.json"},
    }
    loaded = read(outer)
    assert loaded.recipe.stages[0] == stage_of(FULL)
    assert row_of(loaded, "gradient_clipping").split()[0].startswith("ds.json:")


def test_the_recipe_is_stronger_and_the_table_says_so():
    loaded = read(FULL, "max_grad_norm=2", precision="bfloat16", learning_rate=1e-6)
    stage = loaded.recipe.stages[0]
    assert (stage.max_grad_norm, stage.precision, stage.learning_rate) == (2.0, "bf16", 1e-6)
    assert "max_grad_norm: 2 (command line) is stronger" in row_of(loaded, "gradient_clipping")
    assert "as the recipe" in row_of(loaded, "bf16.enabled")
    assert stage.adam_beta1 == 0.8, "what the recipe leaves open is still the file's"


@pytest.mark.parametrize(
    ("recipe", "line", "setting", "value"),
    [
        ({"batch_size": 64}, "gradient_accumulation_steps", "gradient_accumulation_steps", None),
        ({"warmup_ratio": 0.1}, "scheduler.params.warmup_num_steps", "warmup_steps", 0),
        ({"optim": "sgd"}, "optimizer.params.eps", "adam_epsilon", 1e-8),
        ({"lr_scheduler_type": "constant"}, "scheduler.params.cos_min_ratio", "min_lr_ratio", 0.0),
        (
            {"distributed": {"strategy": "replicated"}},
            "zero_optimization.offload_optimizer.device",
            "distributed",
            None,
        ),
    ],
)
def test_a_line_gives_way_to_related_settings_of_the_recipe(recipe: dict, line: str, setting: str, value: Any):
    recipe = {**recipe, "distributed": {"config": "engine.json", **recipe.get("distributed", {})}}
    loaded = read(FULL, **recipe)
    assert "not taken" in row_of(loaded, line)
    found = getattr(loaded.recipe.stages[0], setting)
    assert found == value if setting != "distributed" else not found.cpu_offload


@pytest.mark.parametrize("recipe", [{"quantize": "nf4", "lora": {}}, {"optim": "adamw_8bit"}])
def test_what_cannot_be_sharded_stays_replicated(recipe: dict[str, Any]):
    section = stage_of({**ZERO2, "zero_optimization": {"stage": 3, "cpu_offload": True}}, **recipe).distributed
    assert (section.strategy, section.reshard_after_forward, section.cpu_offload) == ("auto", True, False)


@pytest.mark.parametrize(
    "recipe",
    [
        {"distributed": {"cpu_offload": True}},
        {"distributed": {"strategy": "replicated", "reshard_after_forward": False}},
        {"distributed": {"strategy": "fsdp2"}, "quantize": "nf4", "lora": {}},
        {"distributed": {"strategy": "fsdp2"}, "optim": "adamw_8bit"},
        {"distributed": {"strategy": "fsdp"}},
        {"distributed": {"strateg": "fsdp2"}},
        {"distributed": "fsdp2"},
    ],
)
def test_contradictions_in_the_recipe_are_errors(recipe: dict[str, Any]):
    assert "distributed" in problems_of({**PAIRS, "stages": [{"kind": "sft", **recipe}]})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", ["engine.json", "empty"]),
        ("[1]", ["engine.json", "no mapping"]),
        ("{}", ["empty"]),
        ('{"zero_optimization": {"stage": 2,}, "x": [}', ["engine.json:1"]),
        ('{"bf16": {"enabled": true},\n "bf16": {"enabled": true}}', ["engine.json:2", "twice"]),
        ('{\n"zero_optimization": {"stage": 7}}', ["engine.json:2", "zero_optimization.stage", "7"]),
        ('{"zero_optimization": 2}', ["engine.json:1", "zero_optimization", "mapping"]),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', ["fp16.enabled", "bf16.enabled", "precision"]),
        ('{"gradient_clipping": "1.0"}', ["engine.json:1", "max_grad_norm"]),
        ('{"gradient_clipping": -1}', ["engine.json:1", "max_grad_norm", "-1"]),
        ('{"train_batch_size": [8]}', ["engine.json:1", "batch_size", "a list"]),
        ('{"fruit": 1}', ["engine.json", "neither"]),
        ('{"zero_optimization": {"offload_param": {"device": "tape"}}}', ["tape", "nvme"]),
        ('{"wandb": {"api_key": "0123456789abcdef"}}', ["engine.json:1", "secret"]),
        ("distributed_type: FDSP", ["engine.json:1", "FDSP", "FSDP"]),
        ("distributed_type: FSDP\nfsdp_config: {fsdp_offload_params: perhaps}", ["engine.json:2", "true or false"]),
        (
            "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: no.json}",
            ["engine.json:2", "no.json"],
        ),
    ],
)
def test_a_wrong_file_gives_one_clear_message_with_its_place(text: str, words: list[str]):
    message = refuse(text)
    assert all(word in message for word in words), message


def test_files_that_are_not_there_or_cannot_be_read(tmp_path: Path):
    def ask(name: Any) -> str:
        return problems_of({**PAIRS, "stages": [{"kind": "sft", "distributed": {"config": name}}]})

    assert "there is no file 'ds.json'" in ask("ds.json")
    (tmp_path / "folder").mkdir()
    assert "is a folder" in ask("folder")
    (tmp_path / "latin.json").write_bytes(b'{"a": "\xff"}')
    assert "UTF-8" in ask("latin.json")
    assert "name a file" in ask(3) and "name a file" in ask(["a"])


def test_unknown_keys_are_named_with_the_nearest():
    loaded = read({"zero_optimization": {"stage": 2}, "gradient_cliping": 1.0})
    assert "gradient_clipping" in row_of(loaded, "gradient_cliping")
    assert loaded.recipe.stages[0].max_grad_norm == 1.0


def test_the_command_line_and_every_stage_may_name_a_file():
    Path("ds.json").write_text(json.dumps({"gradient_clipping": 0.25}), encoding="utf-8")
    source = {**PAIRS, "stages": ["sft", "dpo", {"kind": "evaluate"}]}
    both = load(source, "distributed.config=ds.json")
    assert [getattr(stage, "max_grad_norm", None) for stage in both.recipe.stages] == [0.25, 0.25, None]
    assert both.tables[0].startswith("distributed.config of sft, dpo:") and both.tables[0] in both.notes
    one = load(source, "dpo.distributed.config=ds.json")
    assert [stage.max_grad_norm for stage in one.recipe.stages[:2]] == [1.0, 0.25]
    assert load(source, "deepspeed=ds.json").recipe.stages == both.recipe.stages


def test_a_resolved_recipe_needs_the_file_no_more():
    loaded = read(FULL)
    Path("engine.json").unlink()
    assert load(loaded.recipe.resolved()).recipe.stages == loaded.recipe.stages


def test_cells_of_a_grid_keep_their_own_table():
    for name, norm in (("a.json", 0.1), ("b.json", 0.2)):
        Path(name).write_text(json.dumps({"gradient_clipping": norm}), encoding="utf-8")
    loaded = load({**PAIRS, "grid": {"distributed.config": ["a.json", "b.json"]}, "stages": ["sft"]})
    assert loaded.grid is not None
    for cell, norm in zip(loaded.grid.cells, (0.1, 0.2), strict=True):
        assert cell.recipe.stages[0].max_grad_norm == norm  # pyright: ignore[reportAttributeAccessIssue]
        assert f"max_grad_norm: {norm}" in loaded.for_cell(cell).tables[0]


KNOWN = sorted({*deepspeed_file.build_handlers(Node({}, PLACE)), *deepspeed_file.SECTIONS})
OUTER = sorted({*accelerate_file.build_handlers(Node({}, PLACE), lambda key, node: None), *accelerate_file.SECTIONS})
WORDS = [
    "auto",
    "cpu",
    "nvme",
    "none",
    "true",
    "no",
    "AdamW",
    "Lamb",
    "OneCycle",
    "FSDP",
    "DEEPSPEED",
    "FULL_SHARD",
    "1",
    "",
]
LEAVES = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 10**12), st.floats(), st.sampled_from(WORDS), st.text(max_size=8)
)
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=6,
)


def nest(paths: dict[str, Any]) -> dict[str, Any]:
    """A tree from its paths; where two cross, the later wins."""
    tree: dict[str, Any] = {}
    for path, value in paths.items():
        at = tree
        *above, last = path.split(".")
        for part in above:
            below = at.get(part)
            at[part] = at = below if isinstance(below, dict) else {}
        at[last] = value
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from([*KNOWN, *OUTER]), TREES, max_size=8), TREES, st.booleans())
def test_any_tree_gives_settings_lines_or_a_clear_error(known: dict[str, Any], other: Any, alone: bool):
    """No tree is answered with another exception, and no line goes without a word."""
    tree = other if alone else {**(other if isinstance(other, dict) else {}), **nest(known)}
    try:
        loaded = read(tree)
    except ConfigError as error:
        assert "engine.json" in str(error) or "batch_size" in str(error) or "steps" in str(error), str(error)
        return
    reading = read_file(Node("engine.json", PLACE), "distributed.config", Path())
    assert bool(reading.lines) == bool(loaded.tables)
    told = {line.key for line in reading.lines}
    for path, node in build_node(tree, PLACE).walk():
        if not isinstance(node.value, dict | list):
            parts = path.split(".")
            assert any(".".join(parts[:n]) in told for n in range(1, len(parts) + 1)), f"nothing is said of {path}"


def test_the_page_lists_every_key_that_is_known():
    page = DOCS.read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.*]+)`", page))
    missing = [key for key in (*KNOWN, *OUTER) if key not in named and not key.endswith("*")]
    assert not [key for key in missing if key not in {*deepspeed_file.SECTIONS, *accelerate_file.SECTIONS}]

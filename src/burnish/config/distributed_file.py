"""`distributed.config`: DeepSpeed's JSON or accelerate's YAML as settings of a stage.

What the recipe, the environment or the command line gives is stronger; where that differs, the table says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from burnish.config.accelerate_file import MARKS, read_accelerate
from burnish.config.aliases import VALUE_ALIASES
from burnish.config.deepspeed_file import build_handlers, read_deepspeed
from burnish.config.distributed_lines import Line, Reading, render_lines
from burnish.config.problems import Problem, format_value
from burnish.config.secrets import find_secrets
from burnish.config.tree import Node, build_node, parse_text
from burnish.errors import ConfigError

MAX_BYTES = 1_000_000
SECTION, FILE = "distributed", "config"


def apply_file(
    nodes: Mapping[str, Node], path: str, folder: Path, problems: list[Problem]
) -> tuple[dict[str, Node], str]:
    """The nodes of a stage with what its `distributed.config` gives, and the table of the file's lines.

    Args:
        nodes: Settings of the stage from all layers, by name.
        path: Where the stage is ("stages.sft").
        folder: Folder of the recipe, to say so if the file lies there.
        problems: What is wrong with the file is appended here.
    """
    section = nodes.get(SECTION)
    named = section.value.get(FILE) if section is not None and isinstance(section.value, dict) else None
    if section is None or named is None or named.value is None:
        return dict(nodes), ""
    rest = {key: node for key, node in section.value.items() if key != FILE}
    result = {**nodes, SECTION: Node(rest, section.place)}
    if not isinstance(named.value, str):
        message = f"is {format_value(named.plain())}"
        problems.append(Problem(f"{path}.{SECTION}.{FILE}", message, "name a file", str(named.place)))
        return result, ""
    reading = read_file(named, f"{path}.{SECTION}.{FILE}", folder)
    problems.extend(reading.problems)
    return result, "" if reading.problems else _merge(reading, result)


def read_file(named: Node, key: str, folder: Path) -> Reading:
    """Every line of a file; what is wrong with it is in the reading's problems.

    Args:
        named: The setting that names the file, and its place.
        key: That setting, for messages.
        folder: Folder of the recipe.
    """
    reading = Reading(str(named.value))
    root = _parse(reading, named, key, folder)
    if root is None:
        return reading
    if MARKS & root.value.keys():
        beside = Path(reading.origin).expanduser().parent
        read_accelerate(reading, root, lambda line, node: _parse_nested(reading, node, line, beside))
    elif any(key.partition(".")[0] in root.value for key in build_handlers(root)):
        read_deepspeed(reading, root)
    else:
        reading.fail(
            key,
            named,
            f"names {reading.origin}, which is neither DeepSpeed's JSON nor accelerate's YAML",
            "a file of DeepSpeed has keys such as zero_optimization, one of accelerate distributed_type",
        )
    return reading


def _parse_nested(reading: Reading, node: Node, key: str, folder: Path) -> Node | None:
    if not isinstance(node.value, str):
        reading.fail(key, node, f"is {format_value(node.plain())}", "name DeepSpeed's JSON file")
        return None
    return _parse(reading, node, key, folder)


def _parse(reading: Reading, named: Node, key: str, folder: Path) -> Node | None:
    """The file's tree, a mapping; None, with a problem, where it is none."""
    name = str(named.value)
    path = Path(name).expanduser()
    try:
        if not path.is_file():
            beside = folder / name
            hint = (
                f"paths are relative to the current folder; it lies at {beside}"
                if beside.is_file()
                else "check the path"
            )
            what = "is a folder" if path.is_dir() else "there is no file"
            reading.fail(key, named, f"{what} {name!r}", hint)
            return None
        if path.stat().st_size > MAX_BYTES:
            reading.fail(
                key, named, f"{name} is too large for a configuration", "name DeepSpeed's or accelerate's file"
            )
            return None
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        what = "is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else f"cannot be read: {error}"
        reading.fail(key, named, f"{name!r} {what}", "check the path, and save the file as UTF-8")
        return None
    secrets = find_secrets(text, name)
    if secrets:
        reading.problems.extend(secrets)
        return None
    try:
        root = parse_text(text, name)
    except ConfigError as error:
        reading.problems.append(Problem(key, error.message, error.remedy, error.where or name))
        return None
    if root is None or not isinstance(root.value, dict) or not root.value:
        what = "is empty" if root is None or not root.value else "is no mapping"
        reading.fail(key, named, f"{name} {what}", "name a file of DeepSpeed or accelerate")
        return None
    return root


def _merge(reading: Reading, nodes: dict[str, Node]) -> str:
    """Puts what the file gives below what is there already; returns the table."""
    own = {line.setting: find_given(nodes, line.setting) for line in reading.lines if line.setting}
    effective = {name: line.value for name, line in reading.taken.items()}
    effective |= {name: node.plain() for name, node in own.items() if node is not None}
    rows: list[tuple[Line, str]] = []
    for line in reading.lines:
        if line.setting is None:
            rows.append((line, line.text))
            continue
        given = own[line.setting]
        wanted = f"{line.setting}: {_show(line.value)}"
        if given is not None:
            same = _is_same(line.setting, given.plain(), line.value)
            text = f"{wanted}, as the recipe" if same else f"not taken: {_describe(line.setting, given)} is stronger"
            rows.append((line, text))
        elif obstacle := find_obstacle(line.setting, line.value, nodes, effective):
            rows.append((line, f"not taken: {obstacle}"))
        else:
            _put(nodes, line)
            rows.append((line, wanted))
    return "\n".join(render_lines(iter(rows)))


def find_obstacle(setting: str, value: Any, nodes: Mapping[str, Node], effective: Mapping[str, Any]) -> str:
    """Why a line must give way to what the recipe says of other settings; empty if nothing is in its way.

    Args:
        nodes: What the recipe gives.
        effective: What recipe and file give together, by setting.
    """

    def given(*names: str) -> str:
        found = [(name, find_given(nodes, name)) for name in names]
        return next((_describe(name, node) for name, node in found if node is not None and node.value), "")

    sharded = effective.get("distributed.strategy") == "fsdp2" and not find_unshardable(nodes)
    if setting == "distributed.strategy" and value == "fsdp2":
        return find_unshardable(nodes)
    if setting in ("distributed.reshard_after_forward", "distributed.cpu_offload") and not sharded:
        return "the strategy is not fsdp2"
    if setting == "gradient_accumulation_steps":
        return _follows(given("batch_size"))
    if setting == "batch_size":
        return _follows(given("per_device_train_batch_size", "gradient_accumulation_steps"))
    if setting == "warmup_steps":
        return _follows(given("warmup_ratio"))
    if setting.startswith("adam_") and effective.get("optim", "adamw") in ("sgd", "adafactor"):
        return f"optim is {effective['optim']}"
    if setting == "min_lr_ratio" and effective.get("lr_scheduler_type") == "constant":
        return "lr_scheduler_type is constant"
    return ""


def find_unshardable(nodes: Mapping[str, Node]) -> str:
    """What the recipe gives that fsdp2 cannot shard; empty if nothing."""
    quantize, optim = find_given(nodes, "quantize"), find_given(nodes, "optim")
    if quantize is not None and quantize.plain() != "none":
        return f"{_describe('quantize', quantize)} keeps weights that cannot be sharded"
    if optim is not None and _is_same("optim", optim.plain(), "adamw_8bit"):
        return f"{_describe('optim', optim)} has a state that cannot be sharded"
    return ""


def find_given(nodes: Mapping[str, Node], setting: str) -> Node | None:
    """The node of a setting that is given, by its path; None where it is not, or is null."""
    head, _, below = setting.partition(".")
    node = nodes.get(head)
    if node is not None and below:
        node = node.value.get(below) if isinstance(node.value, dict) else None
    return node if node is not None and node.value is not None else None


def _put(nodes: dict[str, Node], line: Line) -> None:
    assert line.setting is not None
    head, _, below = line.setting.partition(".")
    leaf = build_node(line.value, line.node.place)
    leaf.raw = line.node.raw if line.node.value == line.value else None
    if not below:
        nodes[head] = leaf
        return
    section = nodes[head]
    nodes[head] = Node({**section.value, below: leaf}, section.place)


def _is_same(setting: str, written: Any, value: Any) -> bool:
    table = VALUE_ALIASES.get(setting, {})
    return written == value or (isinstance(written, str) and table.get(written.lower(), written.lower()) == value)


def _follows(given: str) -> str:
    return f"it follows from {given}" if given else ""


def _describe(setting: str, node: Node) -> str:
    return f"{setting}: {_show(node.plain())} ({node.place})"


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else format_value(value).strip("'")


def describe_tables(tables: Mapping[str, list[str]]) -> Iterator[str]:
    """Each table below the stages that have it."""
    for table, stages in tables.items():
        yield f"{SECTION}.{FILE} of {', '.join(stages)}:\n" + "\n".join(f"  {row}" for row in table.splitlines())

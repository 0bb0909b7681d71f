"""Which keys exist where, and how aliases become canonical names."""

from __future__ import annotations

from functools import cache

from burnish.config.aliases import KEY_ALIASES
from burnish.config.base import Settings
from burnish.config.problems import Problem
from burnish.config.recipe import Recipe
from burnish.config.registry import ALIASES, KINDS, SECTIONS, find_spec, load_object, load_user_object
from burnish.config.spec import MethodSpec
from burnish.config.train import TrainSettings
from burnish.config.tree import Layer, Node, merge_nodes
from burnish.errors import ConfigError

RECIPE_KEYS = tuple(Recipe.model_fields)
# Settings that make sense in one stage only, and those whose meaning differs in a kind.
STAGE_ONLY = frozenset({"kind", "name", "init_from", "of", "judge"})
NOT_INHERITED = {"evaluate": frozenset({"data", "batch_size"})}
# Mappings whose items are settings of their own: they are merged item by item over the layers.
DEEP_KEYS = frozenset(SECTIONS)
BIT_FLAGS = {"load_in_4bit": "nf4", "load_in_8bit": "int8"}


@cache
def settings_class(kind: str) -> type[Settings]:
    """The settings class of a kind (canonical name)."""
    spec = find_spec(kind)
    try:
        found = load_user_object(spec.settings)
    except (ImportError, AttributeError) as error:
        raise ConfigError(
            f"the settings of kind {kind} cannot be loaded: {error}",
            where=spec.settings,
            remedy="name the class as module:Class in the MethodSpec's settings",
        ) from error
    if spec.trains and not (isinstance(found, type) and issubclass(found, TrainSettings)):
        raise ConfigError(
            f"the settings of kind {kind} are no TrainSettings",
            where=spec.settings,
            remedy="derive the class from burnish.config.train.TrainSettings",
        )
    if isinstance(spec, MethodSpec):
        strange = sorted(spec.named_settings - found.model_fields.keys())
        if strange:
            raise ConfigError(
                f"kind {kind} names settings that it does not have: {', '.join(strange)}",
                where=spec.settings,
                remedy="declare them in the settings class, or mend the MethodSpec",
            )
    return found


@cache
def section_class(name: str) -> type[Settings]:
    """The settings class of a section within a stage (`lora`, `dynamic_beta` …)."""
    return load_object(SECTIONS[name])


@cache
def all_setting_names() -> frozenset[str]:
    """Names of the settings of all kinds."""
    return frozenset(name for kind in KINDS for name in settings_class(kind).model_fields)


def kinds_with(name: str) -> list[str]:
    """Kinds that have a setting of this name."""
    return [kind for kind in KINDS if name in settings_class(kind).model_fields]


def kind_names() -> list[str]:
    """Kinds and their aliases."""
    return [*KINDS, *ALIASES]


def inherits(kind: str, name: str) -> bool:
    """Whether stages of this kind take the top-level value of a setting."""
    return (
        name in settings_class(kind).model_fields
        and name not in STAGE_ONLY
        and name not in NOT_INHERITED.get(kind, frozenset())
    )


def canonicalise(nodes: dict[str, Node], path: str, problems: list[Problem], notes: list[str]) -> dict[str, Node]:
    """The same mapping under canonical names."""
    result: dict[str, Node] = {}
    nodes = _read_bit_flags(_read_precision_flags(nodes, path, problems, notes), path, problems, notes)
    for key, node in nodes.items():
        name = key.replace("-", "_")
        known = name in all_setting_names() or name in RECIPE_KEYS
        if node.place.layer in (Layer.FILE, Layer.CHECKPOINT, Layer.GRID) and name != key and known:
            notes.append(f"{key} ({node.place}) is the setting {name}")
        target = name if known else KEY_ALIASES.get(name, name if node.place.layer > Layer.FILE else key)
        if not known and target != key:
            notes.append(f"{key} ({node.place}) is the setting {target}")
            node.key = key
        head, _, below = target.partition(".")
        if below:
            node = Node({below: node}, node.place, key=key, partial=True)
        if head in result and not node.partial and not result[head].partial:
            problems.append(
                Problem(
                    f"{path}.{head}".strip("."),
                    f"is given twice, as {result[head].key or head!r} and as {key!r}",
                    "remove one",
                    str(node.place),
                )
            )
            continue
        if head in result and result[head].partial and not node.partial:
            result[head] = merge_nodes(node, result[head])
        else:
            result[head] = merge_nodes(result.get(head), node)
    return result


def _read_precision_flags(
    nodes: dict[str, Node], path: str, problems: list[Problem], notes: list[str]
) -> dict[str, Node]:
    """`bf16: true`, `fp16: true` as precision; `bf16: false` alone asks for fp32; `use_peft: true` for adapters."""
    flags = {
        key: node for key, node in nodes.items() if key in ("bf16", "fp16", "use_peft") and _as_bool(node) is not None
    }
    if not flags:
        return nodes
    rest = {key: node for key, node in nodes.items() if key not in flags}
    peft = flags.pop("use_peft", None)
    if peft is not None and _as_bool(peft) and "lora" not in rest:
        rest["lora"] = Node({}, peft.place, partial=True)
    chosen = [key for key, node in flags.items() if _as_bool(node)]
    if not flags:
        return rest
    if len(chosen) > 1 or ("precision" in rest and chosen):
        other = "precision" if "precision" in rest else chosen[1]
        problems.append(
            Problem(
                f"{path}.{chosen[0]}".strip("."),
                f"contradicts {other}: both choose the compute type",
                "keep one; precision: bf16 says it all",
                str(flags[chosen[0]].place),
            )
        )
        return rest
    place = flags[chosen[0]].place if chosen else next(iter(flags.values())).place
    value = chosen[0] if chosen else "fp32" if "bf16" in flags else None
    if value is not None and "precision" not in rest:
        rest["precision"] = Node(value, place, raw=value, key=chosen[0] if chosen else "bf16")
        notes.append(f"{', '.join(flags)} ({place}) is the setting precision: {value}")
    return rest


def _read_bit_flags(nodes: dict[str, Node], path: str, problems: list[Problem], notes: list[str]) -> dict[str, Node]:
    """`load_in_4bit: true` as quantize: nf4 (or the 4-bit type that is given), `load_in_8bit: true` as quantize: int8."""
    flags = {key: node for key, node in nodes.items() if key in BIT_FLAGS and _as_bool(node) is not None}
    rest = {key: node for key, node in nodes.items() if key not in flags}
    chosen = [key for key, node in flags.items() if _as_bool(node)]
    given = next((key for key in ("quantize", "bnb_4bit_quant_type") if key in rest), None)
    bits = {str(rest[given].value): "load_in_4bit"} if given and str(rest[given].value) in ("nf4", "fp4") else {}
    for key in flags:
        clash = next((other for other in chosen if other != key and key in chosen), None)
        if given and (key in chosen) != (key in bits.values()):
            clash = given
        if clash:
            problems.append(
                Problem(
                    f"{path}.{key}".strip("."),
                    f"contradicts {clash}: both choose how the base is stored",
                    "keep one; quantize: nf4 or int8 says it all",
                    str(flags[key].place),
                )
            )
            return rest
    if chosen and given is None:
        value, place = BIT_FLAGS[chosen[0]], flags[chosen[0]].place
        rest["quantize"] = Node(value, place, raw=value, key=chosen[0])
        notes.append(f"{chosen[0]} ({place}) is the setting quantize: {value}")
    return rest


def _as_bool(node: Node) -> bool | None:
    if isinstance(node.value, bool):
        return node.value
    words = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}
    return words.get(str(node.raw if node.raw is not None else node.value).strip().lower())

"""Finding and switching off every dropout of a model.

Dropout lives in modules (`nn.Dropout`, LoRA's), in plain numbers that modules pass to functional dropout
(`attention_dropout`, `attn_pdrop`, `layerdrop` …), and in configurations that some modules read at each forward.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

_NAME = re.compile(r"drop(out|path|_?rate|_?prob|_?p)?s?$|pdrop$|dropout|layer_?drop", re.IGNORECASE)


def disable_dropout(model: nn.Module) -> list[str]:
    """Set every dropout to 0, also functional ones and those of adapters.

    Returns:
        What was changed, as "where: p → 0".
    """
    changed = []
    for where, value, owner, name in list(_each(model)):
        setattr(owner, name, 0.0)
        changed.append(f"{where}: {value:g} → 0")
    return changed


def _each(model: nn.Module) -> Iterator[tuple[str, float, Any, str]]:
    """(where, p, owner, attribute) of every non-zero dropout."""
    configs: dict[int, tuple[str, Any]] = {}
    for path, module in model.named_modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict"):
            configs.setdefault(id(config), (path, config))
        if isinstance(module, nn.modules.dropout._DropoutNd):
            if module.p > 0:
                yield f"{path}.p", float(module.p), module, "p"
            continue
        for name, value in vars(module).items():
            if _is_rate(name, value):
                yield f"{path}.{name}", float(value), module, name
    for path, config in configs.values():
        for where, owner in _nested(f"{path}.config" if path else "config", config):
            for name, value in list(vars(owner).items()):
                if _is_rate(name, value):
                    yield f"{where}.{name}", float(value), owner, name


def _nested(where: str, config: Any) -> Iterator[tuple[str, Any]]:
    """A configuration and those inside it."""
    yield where, config
    for name in getattr(config, "sub_configs", {}):
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            yield from _nested(f"{where}.{name}", inner)


def _is_rate(name: str, value: object) -> bool:
    return isinstance(value, float) and value > 0 and _NAME.search(name) is not None

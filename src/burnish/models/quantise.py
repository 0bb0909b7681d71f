"""Frozen bases in few bits: which layers, what it saves, and how a folder says so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from burnish.config.train import TrainSettings
from burnish.disk import format_bytes
from burnish.errors import ConfigError
from burnish.models.adapters import find_linears, read_low_rank
from burnish.models.bnb import count_elements, freeze_linear, is_frozen, list_storage, put_beneath, reads_alike

FILE = "quantization_config.json"


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a frozen base is stored.

    Attributes:
        kind: "nf4", "fp4" (4 bits, a scale for 64 weights) or "int8" (a scale for each row).
        double: 4 bits: the scales are stored in 8 bits (0.127 bits a weight for scales instead of 0.5).
    """

    kind: str
    double: bool = True

    @property
    def four(self) -> bool:
        return self.kind != "int8"

    def __str__(self) -> str:
        return f"{self.kind}{', double quantisation' if self.four and self.double else ''}"

    def to_config(self) -> dict[str, Any]:
        """What transformers' BitsAndBytesConfig takes."""
        if not self.four:
            return {"quant_method": "bitsandbytes", "load_in_8bit": True}
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": self.kind,
            "bnb_4bit_use_double_quant": self.double,
        }


def choose_quantization(settings: TrainSettings) -> Quantization | None:
    """What a stage's settings ask for; None: the base stays as it is."""
    if settings.quantize == "none":
        return None
    return Quantization(settings.quantize, settings.bnb_4bit_use_double_quant if settings.quantize != "int8" else False)


def save_quantization(quantization: Quantization, folder: Path) -> None:
    """Say beside an adapter over which base it was trained; `BitsAndBytesConfig.from_dict` reads it."""
    text = json.dumps(quantization.to_config(), indent=2, sort_keys=True) + "\n"
    (folder / FILE).write_text(text, encoding="utf-8")


def read_quantization(folder: Path) -> Quantization | None:
    """How the base of an adapter's folder was stored when it was trained; None where the folder does not say.

    Raises:
        ConfigError: The file says what burnish does not know.
    """
    file = folder / FILE
    if not file.is_file() or not (folder / "adapter_config.json").is_file():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found.get("load_in_8bit"):
            return Quantization("int8", False)
        kind = found["bnb_4bit_quant_type"]
        if found["load_in_4bit"] is True and kind in ("nf4", "fp4"):
            return Quantization(kind, bool(found["bnb_4bit_use_double_quant"]))
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ConfigError(
        f"{FILE} does not say how the base of this adapter was stored",
        where=str(folder),
        remedy="write load_in_4bit with bnb_4bit_quant_type and bnb_4bit_use_double_quant, or load_in_8bit; or remove it",
    )


def quantise_base(model: PreTrainedModel, quantization: Quantization, *, earlier: Path | None = None) -> None:
    """Store every linear layer of the model but its head in few bits, one after the other, in place.

    Args:
        earlier: Folder of a LoRA adapter that the model is to carry beneath the one that will be trained: the layers
            become Q(W) + s B A, exactly what the joined adapter over the quantised base is.

    Raises:
        ConfigError: Nothing to quantise, Conv1D layers, bitsandbytes missing, or an adapter that is no plain LoRA.
    """
    linears = find_linears(model)
    conv = next((n for n, m in linears.items() if isinstance(m, Conv1D)), None)
    if conv is not None or not linears:
        what = f"keeps its weights in Conv1D layers ({conv})" if conv else "has no linear layer beside its head"
        raise ConfigError(
            f"{type(model).__name__} {what}, so quantize: {quantization.kind} cannot store it in few bits",
            where="quantize",
            found=quantization.kind,
            remedy="set quantize: none, or use an architecture of linear layers such as Llama, Qwen or Mistral",
        )
    beneath = read_low_rank(earlier, model) if earlier is not None else {}
    for name, linear in linears.items():
        assert isinstance(linear, nn.Linear)
        frozen = freeze_linear(linear, kind=quantization.kind, double=quantization.double)
        if name in beneath:
            put_beneath(frozen, *beneath[name])
        model.set_submodule(name, frozen)
    setattr(model, "is_loaded_in_4bit" if quantization.four else "is_loaded_in_8bit", True)  # what PEFT looks for


def check_dora(model: nn.Module) -> None:
    """DoRA needs the norms of the base's weights, which PEFT reads by bitsandbytes.

    Raises:
        ConfigError: A layer that bitsandbytes reads wrongly here.
    """
    for name, module in model.named_modules():
        if is_frozen(module) and not reads_alike(module):
            raise ConfigError(
                f"bitsandbytes cannot give use_dora the weights of {name}: its {module.in_features} inputs are no "
                "multiple of 64",
                where="lora.use_dora",
                remedy="set use_dora: false, or quantize: none (or int8)",
            )


def describe_storage(model: nn.Module) -> str:
    """How the quantised layers are stored, in one word for a cache's key; "" where there are none."""
    states = [getattr(m.weight, "quant_state", None) for m in model.modules() if is_frozen(m)]
    return ",".join(sorted({f"{s.quant_type}{'+' if s.nested else ''}" if s is not None else "int8" for s in states}))


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a model's weights take in memory.

    Attributes:
        quantised: Weights in few bits. bits: Bits that each of them takes, scales included; 0 without any.
        bytes: All weights, trainable ones included. plain: What they would take with the quantised ones in fp32.
    """

    quantised: int
    bits: float
    bytes: int
    plain: int

    def describe(self, quantization: Quantization) -> str:
        """One line for the log."""
        return (
            f"base: {quantization}, {self.quantised:,} weights of {self.bits:.3f} bits; "
            f"all weights take {format_bytes(self.bytes)} instead of {format_bytes(self.plain)}"
        )


def measure_footprint(model: nn.Module) -> Footprint:
    """Bytes of the loaded parameters, each storage once."""
    frozen = [m for m in model.modules() if is_frozen(m)]
    packed = _sum_bytes([t for m in frozen for t in list_storage(m)])
    count = sum(count_elements(m.weight) for m in frozen)  # pyright: ignore[reportArgumentType]
    inside = {id(m.weight) for m in frozen}
    others: list[Tensor] = [p for p in model.parameters() if id(p) not in inside]
    others += [
        t for m in frozen for t in (getattr(m, "earlier_a", None), getattr(m, "earlier_b", None)) if t is not None
    ]
    rest = _sum_bytes(others)
    return Footprint(count, 8 * packed / count if count else 0.0, packed + rest, 4 * count + rest)


def _sum_bytes(tensors: Iterable[Tensor]) -> int:
    storages: dict[int, int] = {}
    for t in tensors:
        place = t.untyped_storage().data_ptr() or id(t)  # one that is laid over the ranks later has none yet
        storages[place] = t.untyped_storage().nbytes() if t.numel() else 0
    return sum(storages.values())

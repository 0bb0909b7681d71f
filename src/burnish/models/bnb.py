"""bitsandbytes: the only file that imports it. Its layers hold the weights; the products are made here.

bitsandbytes 0.50 is not used for more than storage, because on a CPU with AVX-512 its own products go wrong in silence:
its 4-bit kernel takes the scale of a wrong block where a layer's inputs are no multiple of the block (64), and its layers
repack themselves at the first evaluation, after which they pass no gradient and compute in bf16. So the weights are read as
a row of whole blocks, the same way in training and evaluation and on every device, and what was read is compared with the
weights when they are quantised.
"""

from __future__ import annotations

import copy
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from burnish.errors import ConfigError

BLOCK = 64  # weights that share a scale
_MISSING = "pip install 'burnish[quant]'"


def load_bitsandbytes() -> Any:
    """The module.

    It says on import what it could not fetch from the hub, and fetches a kernel from there where the package `kernels` is
    installed; neither happens here.

    Raises:
        ImportError: It is not installed.
    """
    if sys.modules.get("bitsandbytes") is None:
        with _hidden("kernels"), _still("bitsandbytes.backends.cpu.ops"):
            return import_module("bitsandbytes")
    return sys.modules["bitsandbytes"]


def prepare_bitsandbytes() -> None:
    """Import it if it is there: PEFT would otherwise do so in its own way."""
    if find_spec("bitsandbytes") is not None:
        load_bitsandbytes()


@contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Importing `name` fails within the block."""
    before = sys.modules.get(name)
    sys.modules[name] = None  # pyright: ignore[reportArgumentType] (how an import is made to fail)
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextmanager
def _still(logger: str) -> Iterator[None]:
    found = logging.getLogger(logger)
    level = found.level
    found.setLevel(logging.ERROR)
    try:
        yield
    finally:
        found.setLevel(level)


def build_adamw_8bit(groups: list[dict], *, betas: tuple[float, float], eps: float) -> Any:
    """AdamW with 8-bit moments (Dettmers et al., arXiv 2110.02861); CUDA only.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    try:
        bitsandbytes = load_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            "optim: adamw_8bit needs bitsandbytes", where="optim", remedy=f"{_MISSING}, or use adafactor"
        ) from error
    return bitsandbytes.optim.AdamW8bit(groups, betas=betas, eps=eps)


# ---- frozen layers ------------------------------------------------------------------------------------------------


class _FrozenProduct(torch.autograd.Function):
    """x (…, in) → x Wᵀ (…, out) with a frozen W that is read from its few bits again in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, read: Callable[[torch.dtype], Tensor]) -> Tensor:
        ctx.read = read
        return x @ read(x.dtype).t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (grad,) = grads
        return grad @ ctx.read(grad.dtype), None


class _Kinds(NamedTuple):
    four: Any
    eight: Any


def _multiply(layer: Any, x: Tensor) -> Tensor:
    """The forward of both kinds of layers: product, bias, and an adapter of an earlier stage beneath the one in training."""
    out_dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        out_dtype = torch.get_autocast_dtype(x.device.type)
    y = _FrozenProduct.apply(x.to(out_dtype), layer.read)
    if layer.bias is not None:
        y = y + layer.bias.to(out_dtype)
    if layer.earlier_a is not None:
        y = y + F.linear(F.linear(x, layer.earlier_a.to(x.dtype)), layer.earlier_b.to(x.dtype)).to(out_dtype)
    return y


@cache
def _kinds() -> _Kinds:
    """The classes of frozen layers; PEFT tells them by bitsandbytes' own, which they are made from."""
    bnb = load_bitsandbytes()

    class Frozen4bit(bnb.nn.Linear4bit):
        """A frozen linear layer in 4 bits (Dettmers et al., arXiv 2305.14314)."""

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            super()._apply(fn, recurse)
            if (state := getattr(self.weight, "quant_state", None)) is not None:
                _share_tables(state)  # each layer moved a copy of its own
            return self

        def read(self, dtype: torch.dtype) -> Tensor:
            """(out, in) weights."""
            return _read_4bit(bnb, self.weight, dtype)

        def forward(self, x: Tensor) -> Tensor:
            return _multiply(self, x)

    class Frozen8bit(bnb.nn.Linear8bitLt):
        """A frozen linear layer in 8 bits, a scale for each row (arXiv 2208.07339, without rounding the inputs)."""

        def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
            scale: Tensor | None = self.weight.SCB
            super()._apply(fn, recurse)
            if scale is not None:  # no buffers, so they would stay where they were
                self.weight.SCB, self.weight.CB = scale.to(self.weight.device), self.weight.data
            return self

        def read(self, dtype: torch.dtype) -> Tensor:
            """(out, in) weights."""
            return (self.weight.data.float() * (self.weight.SCB.float() / 127)[:, None]).to(dtype)

        def forward(self, x: Tensor) -> Tensor:
            return _multiply(self, x)

    return _Kinds(Frozen4bit, Frozen8bit)


def _read_scales(bnb: Any, state: Any) -> Tensor:
    """(blocks,) the largest magnitude of each block, as it is stored."""
    if not state.nested:
        return state.absmax.float()
    return bnb.functional.dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _read_4bit(bnb: Any, weight: Any, dtype: torch.dtype) -> Tensor:
    """The weights behind a 4-bit parameter, in the shape of the layer."""
    state, shape = weight.quant_state, tuple(weight.quant_state.shape)
    count = math.prod(shape)
    if count % state.blocksize:  # the last block is cut: no kernel is trusted with it
        packed = weight.data.view(torch.uint8).reshape(-1)
        places = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[:count].int()
        scales = _read_scales(bnb, state).repeat_interleave(state.blocksize)[:count]
        return (state.code.float()[places] * scales).to(dtype).reshape(shape)
    row = copy.copy(state)
    row.shape = torch.Size((count // state.blocksize, state.blocksize))
    known = dtype in (torch.float32, torch.bfloat16, torch.float16)
    row.dtype = dtype if known else torch.float32
    return bnb.functional.dequantize_4bit(weight.data, row).to(dtype).reshape(shape)


def freeze_linear(linear: nn.Linear, *, kind: str, double: bool) -> nn.Linear:
    """A layer with the weights of `linear` in few bits, and its bias as it is.

    Args:
        kind: "nf4", "fp4" or "int8".
        double: 4 bits: the scales of the blocks are quantised too.

    Raises:
        ConfigError: bitsandbytes is missing, or what it stored is not what was given (a defect of its build).
    """
    try:
        bnb = load_bitsandbytes()
    except ImportError as error:
        raise ConfigError(
            f"quantize: {kind} needs bitsandbytes", where="quantize", remedy=f"{_MISSING}, or set quantize: none"
        ) from error
    weight = linear.weight.detach().to(torch.float32).contiguous()
    with torch.device("meta"):  # neither storage nor random numbers for weights that are replaced
        if kind == "int8":
            layer = _kinds().eight(linear.in_features, linear.out_features, bias=False, has_fp16_weights=False)
        else:
            layer = _kinds().four(linear.in_features, linear.out_features, bias=False)
    if kind == "int8":
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False).to(weight.device)
    else:
        layer.weight = bnb.nn.Params4bit(
            weight, requires_grad=False, blocksize=BLOCK, compress_statistics=double, quant_type=kind
        ).to(weight.device)
        _share_tables(layer.weight.quant_state)
    layer.bias = linear.bias
    for name in ("earlier_a", "earlier_b"):
        layer.register_buffer(name, None, persistent=False)
    _check_stored(bnb, layer, weight, kind)
    return layer


_TABLES: dict[tuple[str, str], Tensor] = {}


def _share_tables(state: Any) -> None:
    """All layers read the same tables of codes (64 bytes and 1 kB); bitsandbytes keeps a copy in each."""
    for owner, name in ((state, state.quant_type), (state.state2 if state.nested else None, "scales")):
        if owner is not None:
            table = _TABLES.setdefault((name, str(owner.code.device)), owner.code)
            if torch.equal(table, owner.code):
                owner.code = table


def _check_stored(bnb: Any, layer: Any, weight: Tensor, kind: str) -> None:
    """No weight may be further from what it was than the coarsest step of its block, whatever kernel read it."""
    gap = (layer.read(torch.float32) - weight).abs()
    if kind == "int8":
        limit = weight.abs().amax(1, keepdim=True) * (0.51 / 127 + 2e-3)  # rounding, and bitsandbytes' way through fp16
        good = bool((gap <= limit + 1e-7).all())
    else:
        state = layer.weight.quant_state
        steps = state.code.float().sort().values.diff().max() / 2
        flat = F.pad(weight.reshape(-1), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
        true = flat.abs().amax(1, keepdim=True)
        kept = _read_scales(bnb, state)[:, None].to(true)
        limit = steps * true + (kept - true).abs() + 1e-3 * true
        gaps = F.pad(gap.reshape(-1), (0, -weight.numel() % BLOCK)).reshape(-1, BLOCK)
        good = bool((gaps <= limit + 1e-7).all()) and bool(((kept - true).abs() <= 0.1 * true.max() + 1e-7).all())
    if not good:
        raise ConfigError(
            f"bitsandbytes {bnb.__version__} reads back other weights than it was given (layer {tuple(weight.shape)})",
            where="quantize",
            remedy="set quantize: none, or install another version of bitsandbytes",
        )


def is_frozen(module: nn.Module) -> bool:
    """Whether a layer was made by `freeze_linear`."""
    return sys.modules.get("bitsandbytes") is not None and isinstance(module, tuple(_kinds()))


def reads_alike(module: Any) -> bool:
    """Whether bitsandbytes' own reading of the layer, which PEFT uses for DoRA, gives its weights."""
    bnb = load_bitsandbytes()
    state = getattr(module.weight, "quant_state", None)
    if state is None:
        return True
    return torch.allclose(bnb.functional.dequantize_4bit(module.weight.data, state).float(), module.read(torch.float32))


def put_beneath(module: Any, a: Tensor, b: Tensor) -> None:
    """Add the product of an earlier adapter to a frozen layer: W + b a, with a (r, in) and b (out, r), scale included."""
    for name, value in (("earlier_a", a), ("earlier_b", b)):
        setattr(module, name, value.to(module.weight.device))


def count_elements(parameter: Tensor) -> int:
    """Weights that a parameter stands for; packed ones have several in a byte."""
    state = getattr(parameter, "quant_state", None)
    return math.prod(state.shape) if state is not None else parameter.numel()


def list_storage(module: nn.Module) -> list[Tensor]:
    """The tensors that hold a layer's weight: codes and scales."""
    weight: Any = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        scale = getattr(weight, "SCB", None)
        return [weight.data] + ([scale] if scale is not None else [])
    parts = [weight.data, state.absmax, state.code]
    if state.nested:
        parts += [state.state2.absmax, state.state2.code, state.offset]
    return parts

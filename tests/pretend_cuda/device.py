"""Tensors on the pretended device, and the modes that compute with them.

Every operation is computed by the CPU on the tensors within; an operation that takes tensors of both devices raises `Mixed`, as
CUDA would, and whatever would make the host wait for the device is counted with its place in the package.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

DEVICE = torch.device("cuda", 0)
FREE_BYTES, TOTAL_BYTES = 60 << 30, 80 << 30  # what the pretended device has
PACKAGE = "/src/burnish/"

# Operations whose result (or its size) the host has to know before it can go on.
_READS = frozenset(
    {
        "_local_scalar_dense",
        "nonzero",
        "masked_select",
        "equal",
        "is_nonzero",
        "_unique2",
        "unique_dim",
        "unique_consecutive",
        "bincount",
        "histc",
    }
)
_BY_INDEX = frozenset({"index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"})
_HOST_RESULTS = frozenset({"_local_scalar_dense", "equal", "is_nonzero"})


class Mixed(RuntimeError):
    """An operation took tensors of both devices."""


class Waits:
    """Where the host waited for the device: (stage, phase, steps done, operation, "file:function" in the package) → times."""

    def __init__(self) -> None:
        self.found: Counter[tuple[str, str, int, str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, operation: str) -> None:
        from burnish.track.whereabouts import here

        place = here()
        with self._lock:
            self.found[place.stage, place.phase, place.step, operation, find_place()] += 1


def find_place() -> str:
    """The innermost function of the package on the stack, as "engine/fetch.py:fetch_numbers"; else of what called."""
    frame: Any = sys._getframe(1)
    other = ""
    while frame is not None:
        file = frame.f_code.co_filename
        if PACKAGE in file:
            return f"{file.rpartition(PACKAGE)[2]}:{frame.f_code.co_name}"
        if not other and "pretend_cuda" not in file:
            other = f"{file.rpartition('site-packages/')[2]}:{frame.f_code.co_name}"
        frame = frame.f_back
    return other


class OnDevice(Tensor):
    """A tensor that says that it lies on the pretended device; `held` has its numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool = False) -> OnDevice:
        return Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            layout=held.layout,
            device=DEVICE,
            requires_grad=requires_grad,
        )

    def __init__(self, held: Tensor, requires_grad: bool = False) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnDevice({self.held!r})"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> OnDevice:
        if id(self) not in memo:
            copied = OnDevice(self.held.clone(), self.requires_grad)
            if getattr(self, "_is_param", False):
                copied._is_param = True  # pyright: ignore[reportAttributeAccessIssue] (how torch marks parameters of subclasses)
            memo[id(self)] = copied
        return memo[id(self)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], *_: Any) -> OnDevice:
        return OnDevice(inner["held"])

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _STATE.compute(func, args, kwargs or {})


class _State:
    """The waits of the process, and how an operation is computed."""

    def __init__(self) -> None:
        self.waits = Waits()

    def compute(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        name = func.overloadpacket.__name__
        tensors = list(_find_tensors((*args, *kwargs.values())))
        on = [t for t in tensors if isinstance(t, OnDevice)]
        off = [t for t in tensors if not isinstance(t, OnDevice)]
        inner_args = tuple(_unwrap(a) for a in args)
        inner = {name: _unwrap(value) for name, value in kwargs.items()}
        asked = inner.get("device")
        if asked is not None:
            inner["device"] = torch.device("cpu")
            inner.pop("pin_memory", None)
        goes = bool(on) if asked is None else torch.device(asked).type == "cuda"
        if name == "_to_copy":
            return self._copy(func, inner_args, inner, kwargs, on, goes)
        if name == "copy_":
            self._note_copy(args[0], args[1], bool(args[2]) if len(args) > 2 else False)
            func(*inner_args, **inner)
            return args[0]
        if name in ("pin_memory", "_pin_memory", "is_pinned"):
            return False if name == "is_pinned" else args[0]
        if on:
            self._note_read(name, args, kwargs)
            _refuse_mixing(name, off)
        result = func(*inner_args, **inner)
        if not goes or name in _HOST_RESULTS:
            return result
        wrapped = _wrap(result)
        return return_and_correct_aliasing(func, args, kwargs, wrapped) if on and _has_aliases(func) else wrapped

    def _copy(
        self, func: Any, args: Any, inner: dict[str, Any], kwargs: dict[str, Any], on: Sequence[Tensor], goes: bool
    ) -> Tensor:
        if on and not goes:
            self.waits.add("copy to the host")
        if goes and not on and not (kwargs.get("non_blocking") and getattr(args[0], "_pretended_pinned", False)):
            self.waits.add("copy to the device")
        result = func(*args, **inner)
        result = result.clone() if result is args[0] else result
        return OnDevice(result) if goes else result

    def _note_copy(self, target: Tensor, source: Tensor, non_blocking: bool) -> None:
        if isinstance(source, OnDevice) and not isinstance(target, OnDevice):
            self.waits.add("copy to the host")
        pinned = non_blocking and getattr(source, "_pretended_pinned", False)
        if isinstance(target, OnDevice) and not isinstance(source, OnDevice) and source.dim() and not pinned:
            self.waits.add("copy to the device")

    def _note_read(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if name in _READS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits.add(name)
        if name in _BY_INDEX:
            places = [i for i in (args[1] or ()) if isinstance(i, Tensor)]
            if any(i.dtype in (torch.bool, torch.uint8) for i in places):
                self.waits.add(f"{name} by a mask")
            if any(not isinstance(i, OnDevice) and i.dim() for i in places):
                self.waits.add("copy to the device")


def _refuse_mixing(name: str, off: Sequence[Tensor]) -> None:
    """Numbers without dimensions may lie on the CPU, indices too; a fused optimizer takes nothing from there."""
    if name in _BY_INDEX or name == "set_":
        return
    bad = [tuple(t.shape) for t in off if t.dim() or name.startswith("_fused_")]
    if bad:
        raise Mixed(f"aten.{name}: tensors of shape {bad} on the CPU beside tensors on cuda, in {find_place()}")


def _find_tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _find_tensors(value)


def _unwrap(value: Any) -> Any:
    if isinstance(value, OnDevice):
        return value.held
    return type(value)(_unwrap(v) for v in value) if type(value) in (list, tuple) else value


def _wrap(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value if isinstance(value, OnDevice) else OnDevice(value)
    return type(value)(_wrap(v) for v in value) if type(value) in (list, tuple) else value


@functools.cache
def _has_aliases(func: Any) -> bool:
    """Whether the operation returns views of its arguments, or writes into them."""
    return any(a.alias_info is not None for a in func._schema.arguments)


_STATE = _State()


class _Operations(TorchDispatchMode):
    """Operations without a tensor on the device: factories, copies to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _STATE.compute(func, args, kwargs or {})


class _Calls(TorchFunctionMode):
    """Calls that never become operations: numbers to and from Python, pinned memory, storages."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        first = args[0] if args else None
        if name == "pin_memory" and not isinstance(first, OnDevice):
            pinned = first.view_as(first)
            pinned._pretended_pinned = True
            return pinned
        if name in ("tensor", "as_tensor") and kwargs.get("device") is not None and not isinstance(first, OnDevice):
            return _build(func, args, kwargs)
        if not isinstance(first, OnDevice):
            return func(*args, **kwargs)
        if name == "numpy":
            raise Mixed("numpy() of a tensor on cuda")
        if name == "tolist":
            _STATE.waits.add("tolist")
            return first.held.tolist()
        if name == "untyped_storage" and _called_by_package():
            return first.held.untyped_storage()
        if name == "data_ptr":
            return first.held.data_ptr()
        if name == "__deepcopy__":
            return OnDevice.__deepcopy__(first, args[1])
        return func(*args, **kwargs)


def _build(func: Callable[..., Tensor], args: Sequence[Any], kwargs: dict[str, Any]) -> Tensor:
    """torch.tensor(…, device=…), which copies from the host."""
    if torch.device(kwargs["device"]).type != "cuda":
        return func(*args, **kwargs)
    grad = bool(kwargs.get("requires_grad"))
    made = func(*args, **{k: v for k, v in kwargs.items() if k not in ("device", "requires_grad")})
    return made.to("cuda").requires_grad_(grad)


def _called_by_package() -> bool:
    frame: Any = sys._getframe(2)
    return any(PACKAGE in f.f_code.co_filename for f in (frame, frame.f_back) if f is not None)


@contextlib.contextmanager
def pretend_cuda() -> Iterator[Waits]:
    """Within the block torch has one CUDA device; the guard's library must have been loaded before torch was imported."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    answers: dict[str, Any] = {
        "torch.cuda.is_available": lambda: True,
        "torch.cuda.device_count": lambda: 1,
        "torch.cuda.current_device": lambda: 0,
        "torch.cuda.set_device": lambda device: None,
        "torch.cuda._lazy_init": lambda: None,
        "torch.cuda.empty_cache": lambda: None,
        "torch.cuda.synchronize": lambda device=None: None,
        "torch.cuda.mem_get_info": lambda device=None: (FREE_BYTES, TOTAL_BYTES),
        "torch.cuda.memory_reserved": lambda device=None: 0,
        "torch.cuda.memory_allocated": lambda device=None: 0,
        "torch.cuda.is_bf16_supported": lambda *args, **kwargs: True,
        "torch.cuda.is_current_stream_capturing": lambda: False,
        "torch.cuda.amp.common.amp_definitely_not_available": lambda: False,
        "torch.cuda.get_rng_state": lambda device="cuda": torch.get_rng_state(),
        "torch.cuda.set_rng_state": lambda state, device="cuda": torch.set_rng_state(state),
        "torch.cuda.default_generators": (torch.default_generator,),  # the CPU's draws for the device
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            stack.enter_context(mock.patch(name, answer))
        stack.enter_context(_Calls())
        stack.enter_context(_Operations())
        yield _STATE.waits

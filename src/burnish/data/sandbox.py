"""A jinja2 sandbox for chat templates: renders as transformers does, bounded in size and time.

Templates are untrusted files. The immutable sandbox keeps them from attributes and mutation; every loop and macro
step passes a meter that stops endless work, and the operations that can make huge texts are measured.
"""

from __future__ import annotations

import datetime
import json
import re
import time
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SOURCE = 1_000_000
MAX_OUTPUT = 64_000_000
MAX_STEPS = 1_000_000
MAX_SECONDS = 5.0
MAX_NUMBER = 1_000_000

_TICK, _CONCAT = "__burnish_tick", "__burnish_concat"
_SIZED_FILTERS = ("center", "indent", "batch", "slice", "wordwrap", "format", "round", "join", "replace", "xmlattr")
_WIDTH = re.compile(r"\d{6}|\*|\{[^}]*\{")


class TemplateLimit(SecurityError):
    """The template does more than any chat template needs."""


class _Generation(Extension):
    """Accepts `{% generation %} … {% endgeneration %}` and renders what is inside; masks come from prefixes."""

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


_Generation.tags = {"generation"}


class _Meter:
    """Counts the steps of one rendering."""

    __slots__ = ("deadline", "steps")

    def __init__(self) -> None:
        self.start()

    def start(self) -> None:
        self.steps = 0
        self.deadline = time.monotonic() + MAX_SECONDS

    def tick(self) -> str:
        self.steps += 1
        if self.steps > MAX_STEPS or (self.steps % 256 == 0 and time.monotonic() > self.deadline):
            raise TemplateLimit(f"the template runs for more than {MAX_STEPS} steps or {MAX_SECONDS:g} seconds")
        return ""


def _size(value: Any) -> int:
    """Roughly the bytes that a value takes."""
    if isinstance(value, str | bytes):
        return len(value)
    return 64 * len(value) if isinstance(value, list | tuple | dict) else 0


def _check_size(size: float) -> None:
    if size > MAX_OUTPUT:
        raise TemplateLimit(f"the template builds a text of more than {MAX_OUTPUT} characters")


def _check_numbers(values: Any) -> None:
    for value in values:
        if isinstance(value, int) and abs(value) > MAX_NUMBER:
            raise TemplateLimit(f"the template asks for {value} repetitions or columns")


def _check_width(form: str) -> None:
    if _WIDTH.search(form):
        raise TemplateLimit("the template formats with a huge or variable width")


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox with a meter in every loop and macro, and size checks on operators, filters and methods."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.meter = _Meter()

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            call = nodes.Call(nodes.Name(_TICK, "load"), [], [], None, None)
            loop.body.insert(0, nodes.ExprStmt(call).set_lineno(getattr(loop, "lineno", 1)))
        return _MeterConcat().visit(tree)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "+" and type(left) is str and type(right) is str:
            _check_size(len(left) + len(right))
            return left + right
        if operator == "*":
            for text, times in ((left, right), (right, left)):
                if isinstance(times, int) and _size(text):
                    _check_size(_size(text) * max(times, 0))
            _check_numbers(v for v in (left, right) if isinstance(v, int) and abs(v) > 10**18)
        elif operator == "**":
            if isinstance(right, int) and isinstance(left, int) and abs(right) * max(left.bit_length(), 1) > 4096:
                raise TemplateLimit("the template computes a huge power")
        elif operator == "%" and isinstance(left, str):
            raise TemplateLimit("the % operator on texts is not available in chat templates")
        elif operator == "+":
            _check_size(_size(left) + _size(right))
        return super().call_binop(context, operator, left, right)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_width(str(value.__self__))
        return wrapped

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        self.meter.tick()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str | bytes):
            _check_numbers([*args, *kwargs.values()])
            if getattr(obj, "__name__", "") in ("replace", "join") and args:
                _check_size((_size(owner) + 1) * (max(map(_size, args)) + 1) if _size(owner) > 10_000 else 0)
        return super().call(context, obj, *args, **kwargs)


class _MeterConcat:
    """Replaces `a ~ b` by a measured call."""

    def visit(self, tree: nodes.Template) -> nodes.Template:
        for parent in [tree, *tree.find_all(nodes.Node)]:
            for name in parent.fields:
                value = getattr(parent, name)
                if isinstance(value, nodes.Concat):
                    setattr(parent, name, self._call(value))
                elif isinstance(value, list):
                    setattr(parent, name, [self._call(v) if isinstance(v, nodes.Concat) else v for v in value])
        return tree

    def _call(self, concat: nodes.Concat) -> nodes.Node:
        call = nodes.Call(nodes.Name(_CONCAT, "load"), list(concat.nodes), [], None, None)
        return call.set_lineno(concat.lineno)


def _concat(*values: Any) -> str:
    texts = [str(value) for value in values]
    _check_size(sum(map(len, texts)))
    return "".join(texts)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON without HTML escapes, as chat templates expect it."""
    if indent is not None:
        _check_numbers([indent])
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    return datetime.datetime.now().strftime(form)


def _sized(function: Callable[..., Any]) -> Callable[..., Any]:
    def checked(*args: Any, **kwargs: Any) -> Any:
        if function.__name__ == "do_format":
            _check_width(str(args[0]))
        _check_numbers(v for v in (*args, *kwargs.values()) if isinstance(v, int))
        return function(*args, **kwargs)

    for mark in ("jinja_pass_arg",):
        if hasattr(function, mark):
            setattr(checked, mark, getattr(function, mark))
    return checked


class Sandbox:
    """A compiled template.

    Args:
        source: The template's text.

    Raises:
        TemplateError: The template is not valid, or too long.
    """

    def __init__(self, source: str) -> None:
        if len(source) > MAX_SOURCE:
            raise TemplateLimit(f"the template has {len(source)} characters, at most {MAX_SOURCE} are allowed")
        env = _Environment()
        env.filters["tojson"] = _to_json
        for name in _SIZED_FILTERS:
            env.filters[name] = _sized(env.filters[name])
        env.globals.pop("lipsum", None)
        env.globals |= {"raise_exception": _raise, "strftime_now": _now, _CONCAT: _concat, _TICK: env.meter.tick}
        self._meter = env.meter
        self._template = env.from_string(source)

    def render(self, **variables: Any) -> str:
        """The text of the template with these variables.

        Raises:
            TemplateError: The template refused its input, broke a rule of the sandbox, or passed a limit.
        """
        self._meter.start()
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(**variables):
                size += len(piece)
                _check_size(size)
                pieces.append(piece)
        except TemplateError:
            raise
        except RecursionError:
            raise TemplateLimit("the template calls itself without end") from None
        except MemoryError:
            raise TemplateLimit("the template needs too much memory") from None
        except Exception as error:  # whatever the template's own expressions raise on this input
            raise TemplateError(f"{type(error).__name__}: {error}") from error
        return "".join(pieces)

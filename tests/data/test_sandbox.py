"""Chat templates are untrusted: no way out, no endless work (R-27), yet rendered as transformers does."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from jinja2 import TemplateError

from burnish.data.sandbox import MAX_SOURCE, Sandbox
from tests.waiting import bounded

MESSAGES = [{"role": "user", "content": "hi"}]


def render(source: str, **more: Any) -> str:
    return Sandbox(source).render(messages=MESSAGES, add_generation_prompt=False, **more)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__ }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{{ self.__init__.__globals__ }}",
        "{{ raise_exception.__globals__ }}",
        "{{ strftime_now.__globals__['os'] }}",
        "{{ messages|attr('__class__') }}",
        "{{ '{0.__class__.__mro__}'.format(messages) }}",
        "{{ messages.append(1) }}",
        "{{ messages[0].update({'content': 'x'}) }}",
        "{{ messages[0].pop('role') }}",
        "{{ __burnish_tick.__self__ }}",
        "{% include '/etc/passwd' %}",
        "{% import 'os' as os %}",
        "{% extends '/etc/passwd' %}",
    ],
)
def test_r27_no_way_out(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        shown = render(source)
    except TemplateError:
        shown = ""
    assert shown.strip() == "", "what is unsafe is refused or undefined"
    assert not list(tmp_path.iterdir())
    assert MESSAGES == [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    "source",
    [
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for i in r %}{% for j in r %}{% for k in r %}{% endfor %}{% endfor %}{% endfor %}",
        "{% for i in range(10**10) %}x{% endfor %}",
        "{{ 'a' * 10**9 }}",
        "{{ 10**9 * 'a' }}",
        "{{ [0] * 10**9 }}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x=['a']) %}{% for i in range(60) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{% set ns = namespace(x='aaaa') %}{% for i in range(60) %}{% set ns.x = ns.x.replace('a', ns.x) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{{ 'a'.ljust(10**9) }}",
        "{{ 'a'|center(10**9) }}",
        "{{ 'a'|indent(10**9) }}",
        "{{ '%999999999d'|format(1) }}",
        "{{ '%*d'|format(999999999, 1) }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ '{:>{}}'.format(1, 999999999) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ lipsum(1000000) }}",
        "{{ messages|tojson(indent=10**9) }}",
    ],
)
def test_r27_bounded_in_time_and_size(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("burnish.data.sandbox.MAX_SECONDS", 0.5)
    with bounded(), pytest.raises(TemplateError):
        render(source)


def test_r27_long_templates_are_refused() -> None:
    with pytest.raises(TemplateError):
        Sandbox("a" * (MAX_SOURCE + 1))


def test_ordinary_templates_do_what_they_say() -> None:
    assert render("{{ messages[0]['content'] ~ 1 ~ 'a' }}") == "hi1a"
    assert render("{{ 'a' * 3 + 'b' }}{{ 2 ** 3 * 2 + 7 % 4 }}") == "aaab19"
    assert render("{%- for m in messages -%}\n  {{ m.role }}\n{%- endfor %}") == "user"
    assert render("{% for i in range(5) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}") == "01"
    assert render("a{% generation %}b{{ 1 }}{% endgeneration %}c") == "ab1c"
    assert render("{{ {'b': '<é>', 'a': 1}|tojson }}") == '{"b": "<é>", "a": 1}'
    assert render("{% if x is defined %}yes{% endif %}", x=1) == "yes"
    assert render("{{ '%s-%d'|format('a', 3) }}{{ '{}!'.format('b') }}") == "a-3b!"
    assert len(render("{{ strftime_now('%Y') }}")) == 4
    assert render("  {% if true %}\nx\n  {% endif %}\n") == "x\n"
    with pytest.raises(TemplateError, match="no system"):
        render("{{ raise_exception('no system') }}")


@pytest.mark.oracle
def test_templates_of_known_models_render_as_in_transformers() -> None:
    """Every model's template that TRL ships, in 12 situations each."""
    spec = find_spec("trl")
    if spec is None or spec.origin is None:
        pytest.skip("needs trl, which ships chat templates")
    reference = pytest.importorskip("transformers.utils.chat_template_utils")._compile_jinja_template
    files = sorted((Path(spec.origin).parent / "chat_templates").glob("*.jinja"))
    files = [file for file in files if "_training" not in file.name]
    assert len(files) > 30
    talk = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": "<think>\nr\n</think>\n\nYo"}]
    tool = {"name": "f", "description": "d", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}}
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<p>"}

    def outcome(compiled: Any, variables: dict[str, Any]) -> str:
        try:
            return compiled.render(**variables)
        except Exception as error:
            return f"refused: {error}" if isinstance(error, TemplateError) else "refused"

    compared = 0
    for file in files:
        source = file.read_text(encoding="utf-8")
        ours, theirs = Sandbox(source), reference(source)
        for messages in ([{"role": "system", "content": "S"}, *talk, talk[0]], talk, talk[:1]):
            for ask in (False, True):
                for tools in (None, [{"type": "function", "function": tool}]):
                    variables = special | {"messages": messages, "tools": tools, "documents": None}
                    variables["add_generation_prompt"] = ask
                    a, b = outcome(ours, variables), outcome(theirs, variables)
                    assert a == b or (a.startswith("refused") and b.startswith("refused")), file.name
                    compared += not a.startswith("refused")
    assert compared > 200

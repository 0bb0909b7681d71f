"""JSON that Python's reader would accept or choke on (D-01, D-15)."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from burnish.data.problems import RowError
from burnish.data.strict_json import parse_json, parse_row


@pytest.mark.parametrize(
    ("text", "kind", "words"),
    [
        ('{"a": 1, "a": 2}', "duplicate key", "'a' stands twice"),
        ('{"x": {"b": 1, "b": 1}}', "duplicate key", "'b' stands twice"),
        ('{"a": NaN}', "number", "NaN"),
        ('{"a": -Infinity}', "number", "-Infinity"),
        ('{"a": 1e999}', "number", "1e999 is too large"),
        ('{"a": ' + "9" * 5000 + "}", "number", "5000 digits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nesting", "too deep"),
        ('{"a": 1', "json", "column 8"),
        ('{"a" 1}', "json", "column 6"),
        ("{'a': 1}", "json", "column 2"),
        ('{"a": 1} {"b": 2}', "json", "further text after the value at column 10"),
        ('{"a": "\x01"}', "json", "control character"),
        ("[1]", "type", "expected an object"),
        ("3", "type", "the number 3"),
        ("", "json", "Expecting value"),
    ],
)
def test_d01_d15_refused_and_named(text: str, kind: str, words: str) -> None:
    with pytest.raises(RowError) as caught:
        parse_row(text)
    assert caught.value.kind == kind
    assert words in caught.value.message
    assert "on_error: skip" in caught.value.remedy


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(st.text(), values, max_size=5), st.booleans())
def test_valid_json_is_read_as_python_reads_it(value: dict[str, object], ascii_only: bool) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only)
    assert parse_row(f" {text} ") == json.loads(text)


@given(values, st.text(alphabet=" \n\t", max_size=3))
def test_parse_json_says_where_the_value_ends(value: object, space: str) -> None:
    text = json.dumps(value)
    assert parse_json(space + text + ",", 0) == (json.loads(text), len(space + text))


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        assert isinstance(parse_row(text), dict)
    except RowError as error:
        assert error.remedy

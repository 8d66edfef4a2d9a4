from __future__ import annotations

import math
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spaces.yaml_text import YamlError, dump, parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1E4", 1e4),
        ("-.5", -0.5),
        ("5.", 5.0),
        ("5.e-1", 0.5),
        ("+3", 3),
        ("010", 10),
        ("0.1", 0.1),
        ("1_000", "1_000"),
        ("12:30", "12:30"),
        ("0x10", "0x10"),
        ("no", "no"),
        ("yes", "yes"),
        ("on", "on"),
        ("n", "n"),
        ("true", True),
        ("False", False),
        ("none", "none"),
        ("null", None),
        ("~", None),
        ("", None),
        ("2024-01-01", "2024-01-01"),
        ("e", "e"),
        (".", "."),
        ("-", [None]),
        (".inf", ".inf"),
        ("'1e-4'", "1e-4"),
        ("embedded:all-MiniLM-L6-v2", "embedded:all-MiniLM-L6-v2"),
        ("!!str 5", "5"),
    ],
)
def test_values_are_what_they_look_like(text, value):
    read = parse(text).data
    assert read == value
    assert type(read) is type(value)


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]))
    | st.sampled_from(["no", "1e-4", "010", "~", "2024-01-01", ".5", "true", "1_0", "<<", "#", "a: b", " "]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab:# -1.e", max_size=4), inner, max_size=3),
    max_leaves=12,
)


@given(VALUES)
def test_what_is_dumped_is_read_back(value):
    assert parse(dump(value)).data == value


def test_lines_of_keys_and_items():
    lines = parse("a: 1\nb:\n  c:\n    - x\n    - {d: 2}\n").lines
    assert lines[("a",)] == 1
    assert lines[("b",)] == 2
    assert lines[("b", "c")] == 3
    assert lines[("b", "c", 0)] == 4
    assert lines[("b", "c", 1, "d")] == 5


def test_a_key_that_stands_twice_is_an_error_and_the_first_counts():
    document = parse("a: 1\nb: {c: 1, c: 2}\na: 3\n")
    assert document.data == {"a": 1, "b": {"c": 1}}
    assert [(line, path) for line, path, _ in document.errors] == [(2, ("b", "c")), (3, ("a",))]
    assert "first in line 1" in document.errors[1][2]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a: &x [1]\nb: *x", 2),
        ("a: &x [*x]", 1),
        ("a: 1\nb: [1", 2),
        ("a: 1\n\tb: 2", 2),
        ("a: b: c", 1),
        ("a: 1\n---\nb: 2", 2),
        ("a: '", 1),
        ("a: \x00", 1),
        ("[" * 5000, 1),
    ],
)
def test_text_that_is_refused_names_its_line(text, line):
    with pytest.raises(YamlError) as caught:
        parse(text)
    assert caught.value.line == line
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: !!python/object/apply:os.system [id]",
        "a: !!python/name:os.system",
        "a: !!binary aGk=",
        "a: !!set {b}",
        "a: !mine 3",
        "a: !!int x",
        "a: " + "9" * 5000,
        "? [1]\n: 2",
    ],
)
def test_only_plain_values_are_made(text):
    assert len(parse(text).errors) == 1


def test_an_alias_bomb_costs_nothing():
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [*a{i}, *a{i}]\n" for i in range(60))
    start = time.process_time()
    with pytest.raises(YamlError, match="aliases"):
        parse(bomb)
    assert time.process_time() - start < 1


def test_a_number_beyond_floats_is_infinite_and_so_out_of_every_range():
    assert math.isinf(parse("1e999").data)

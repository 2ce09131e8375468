"""YAML that is written without a library says what it was given, to a library that reads it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from ktrain.launcher.render.text import to_yaml

_TEXT = st.text(max_size=30) | st.sampled_from(
    ["yes", "No", "null", "~", "1e3", "0x1", "a: b", "a #b", "- a", "a\nb\n"]
)
_SCALAR = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | _TEXT
_VALUE = st.recursive(
    _SCALAR, lambda below: st.lists(below, max_size=4) | st.dictionaries(_TEXT, below, max_size=4), max_leaves=20
)


def read(text: str) -> list[Any]:
    return list(yaml.safe_load_all(text))


@given(st.lists(st.dictionaries(_TEXT, _VALUE, min_size=1, max_size=4), min_size=1, max_size=3))
def test_yaml_is_read_back_equal(objects: list[dict[str, Any]]) -> None:
    assert read(to_yaml(objects)) == objects


@pytest.mark.parametrize(
    "text", ["yes", "off", "null", "1", "1.5", "0o7", "2001-01-01", "a: b", "#a", "", " a", "&a", "!a"]
)
def test_yaml_text_that_could_be_read_otherwise_stays_a_text(text: str) -> None:
    assert read(to_yaml([{text: text}])) == [{text: text}]


def test_yaml_text_of_many_lines_is_a_block() -> None:
    value = {"job.json": json.dumps({"a": [1, 2]}, indent=1) + "\n"}

    assert "job.json: |\n  {\n" in to_yaml([value]) and read(to_yaml([value])) == [value]


def test_yaml_empty_containers_are_kept() -> None:
    assert read(to_yaml([{"a": {}, "b": [], "c": [[], {}]}])) == [{"a": {}, "b": [], "c": [[], {}]}]

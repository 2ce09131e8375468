"""Pure parts: patches, sets of owned fields, JSON with its duplicates."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ktrain.errors import ConfigError
from ktrain.testing.fake_cluster import strict_json
from ktrain.testing.fake_cluster.apply import APPLY, UPDATE, Owner, apply, owners, updated, with_owners
from ktrain.testing.fake_cluster.patches import json_patch, merge

KEYS = st.sampled_from("abc")
VALUES = st.recursive(
    st.integers(0, 3) | st.text("xy", max_size=2), lambda below: st.dictionaries(KEYS, below, max_size=3), max_leaves=8
)
SPECS = st.dictionaries(KEYS, VALUES, max_size=3)
STEPS = st.sampled_from(["f:spec", "f:a", "f:b", 'k:{"name": "x"}', 'v:"y"'])


def owner(name: str, operation: str = APPLY) -> Owner:
    return Owner(name, operation, "v1", "", "2026-01-01T00:00:00Z", frozenset())


def obj(spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "a"}, "spec": spec}


@given(SPECS, SPECS)
def test_merge_with_a_whole_value_gives_it_back_where_nothing_else_was(old: Any, new: Any) -> None:
    assert merge({}, new) == new
    assert merge(old, {key: None for key in old}) == {}
    assert merge(merge(old, new), new) == merge(old, new)


@given(SPECS, SPECS)
def test_json_patch_leaves_its_argument_alone(old: Any, new: Any) -> None:
    before = json.dumps(old)
    assert json_patch(old, [{"op": "replace", "path": "", "value": new}]) == new
    assert json.dumps(old) == before


@pytest.mark.parametrize(
    "operation",
    [
        {"op": "remove", "path": "/no"},
        {"op": "replace", "path": "/no", "value": 1},
        {"op": "test", "path": "/a", "value": 2},
        {"op": "add", "path": "/list/9", "value": 1},
        {"op": "add", "path": "/no/where", "value": 1},
        {"op": "shuffle", "path": "/a"},
        {"path": "/a"},
    ],
)
def test_json_patch_that_cannot_be_done_is_refused(operation: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="json patch"):
        json_patch({"a": 1, "list": [1]}, [operation])


@given(st.frozensets(st.lists(STEPS, min_size=1, max_size=4).map(tuple), max_size=6))
def test_owned_fields_survive_being_written_down(fields: frozenset[tuple[str, ...]]) -> None:
    written = with_owners(obj({}), [owner("one").with_fields(fields)])
    assert frozenset().union(*(each.fields for each in owners(written))) == fields


@given(SPECS, SPECS)
def test_last_apply_of_the_only_owner_is_what_is_there(first: Any, second: Any) -> None:
    live = apply(None, {"metadata": {"name": "a"}}, obj(first), owner("one"), force=True)
    live = apply(None, live, obj(second), owner("one"), force=True)
    assert live["spec"] == second


@given(SPECS, SPECS)
def test_apply_of_two_that_is_repeated_changes_nothing(first: Any, second: Any) -> None:
    live = apply(None, {"metadata": {"name": "a"}}, obj(first), owner("one"), force=True)
    live = apply(None, live, obj(second), owner("two"), force=True)
    assert apply(None, live, obj(second), owner("two"), force=False)["spec"] == live["spec"]


@given(SPECS, SPECS)
def test_update_owns_what_it_changed_and_nobody_what_is_gone(old: Any, new: Any) -> None:
    live = apply(None, {"metadata": {"name": "a"}}, obj(old), owner("one"), force=True)
    after = updated(None, live, {**live, "spec": new}, owner("two", UPDATE))
    fields = [each.fields for each in owners(after)]
    assert sum(map(len, fields)) == len(frozenset().union(*fields))  # no field has two owners


@pytest.mark.parametrize(
    ("text", "value", "twice"),
    [
        ('{"a": 1, "a": 2}', {"a": 2}, ["a"]),
        ('{"a": {"b": [{"c": 1, "c": 2, "c": 3}]}}', {"a": {"b": [{"c": 3}]}}, ["a.b[0].c"]),
        ("[1, {}]", [1, {}], []),
    ],
)
def test_fields_that_come_twice_are_found(text: str, value: Any, twice: list[str]) -> None:
    assert strict_json.parse(text) == (value, twice)


@pytest.mark.parametrize(("text", "why"), [('{"a": ', "unexpected end"), ("{'a': 1}", "invalid character")])
def test_what_is_no_json_is_refused(text: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        strict_json.parse(text)

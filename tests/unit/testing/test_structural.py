"""Structural schemas: what is refused, and what is dropped."""

from __future__ import annotations

from typing import Any

import pytest

from ktrain.testing import structural

SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["apiVersion", "spec"],
    "properties": {
        "spec": {
            "type": "object",
            "required": ["mode"],
            "properties": {
                "mode": {"type": "string", "enum": ["A", "B"]},
                "count": {"type": "integer", "minimum": 1, "maximum": 3},
                "size": {"x-kubernetes-int-or-string": True, "pattern": "^[0-9]+(Gi)?$"},
                "name": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 3},
                "labels": {"type": "object", "additionalProperties": {"type": "string"}},
                "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
                "items": {
                    "type": "array",
                    "maxItems": 2,
                    "items": {"type": "object", "properties": {"v": {"type": "number"}}},
                },
            },
        }
    },
}
GOOD: dict[str, Any] = {
    "mode": "A",
    "count": 2,
    "size": "1Gi",
    "name": "abc",
    "labels": {"any": "thing"},
    "free": {"deep": [{"er": 1}]},
    "items": [{"v": 1}, {"v": 1.5}],
}


def about(**spec: Any) -> dict[str, Any]:
    return {"apiVersion": "g/v1", "kind": "A", "metadata": {"name": "a"}, "spec": spec}


def test_problems_of_a_good_object_are_none() -> None:
    assert structural.problems(about(**GOOD), SCHEMA) == []
    assert structural.problems(about(**{**GOOD, "size": 5}), SCHEMA) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"mode": "C"}, "spec.mode: expected one of"),
        ({"count": 4}, "spec.count: 4 is out of range"),
        ({"count": "1"}, "spec.count: expected integer"),
        ({"count": True}, "spec.count: expected integer"),
        ({"size": True}, "spec.size: expected a number or a text"),
        ({"size": "1Xi"}, "spec.size: '1Xi' does not match"),
        ({"name": "ABC"}, "does not match"),
        ({"name": "abcd"}, "too long"),
        ({"labels": {"a": 1}}, "spec.labels.a: expected string"),
        ({"items": [{"w": 1}]}, r"spec.items[0].w: unknown field"),
        ({"items": [{}, {}, {}]}, "3 items are too few or too many"),
        ({"items": {}}, "spec.items: expected array"),
        ({"other": 1}, "spec.other: unknown field"),
    ],
)
def test_problems_name_the_path_and_what_was_expected(changes: dict[str, Any], problem: str) -> None:
    [found] = structural.problems(about(**{**GOOD, **changes}), SCHEMA)

    assert problem in found


def test_problems_name_what_is_missing() -> None:
    assert structural.problems(about(), SCHEMA) == ["spec.mode: missing"]


def test_prune_drops_what_the_schema_lacks_and_nothing_else() -> None:
    sent = about(**GOOD, other={"deep": 1})
    sent["spec"]["items"][1]["w"] = 2
    kept, lost = structural.prune(sent, SCHEMA)

    assert lost == ["spec.items[1].w", "spec.other"]
    assert kept == about(**{**GOOD, "items": [{"v": 1}, {"v": 1.5}]})


def test_schema_of_a_version_that_is_not_served_is_refused() -> None:
    versions = [{"name": "v1", "served": False, "schema": {"openAPIV3Schema": SCHEMA}}]
    with pytest.raises(KeyError, match="v1"):
        structural.schema_of({"spec": {"versions": versions}}, "v1")

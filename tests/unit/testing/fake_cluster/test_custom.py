"""Custom resources follow the schema of the CRD that the test gives."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.errors import ConfigError
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.testing.fake_cluster.clusters import MERGE, STRATEGIC, Client

WIDGETS = "/apis/example.com/v1/namespaces/default/widgets"
PART = {
    "type": "object",
    "required": ["name"],
    "properties": {
        "name": {"type": "string"},
        "size": {"x-kubernetes-int-or-string": True},
        "on": {"type": "boolean", "default": True},
    },
}
SPEC = {
    "type": "object",
    "properties": {
        "mode": {"type": "string", "enum": ["Fast", "Slow"], "default": "Fast"},
        "count": {"type": "integer", "format": "int32", "minimum": 1, "maximum": 9},
        "word": {"type": "string", "pattern": "^[a-z]+$", "maxLength": 5},
        "fixed": {
            "type": "string",
            "x-kubernetes-validations": [{"rule": "self == oldSelf", "message": "Value is immutable"}],
        },
        "free": {"type": "object", "x-kubernetes-preserve-unknown-fields": True},
        "labels": {"type": "object", "additionalProperties": {"type": "string"}},
        "parts": {
            "type": "array",
            "maxItems": 3,
            "items": PART,
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
        },
    },
}
CRD = {
    "apiVersion": "apiextensions.k8s.io/v1",
    "kind": "CustomResourceDefinition",
    "metadata": {"name": "widgets.example.com"},
    "spec": {
        "group": "example.com",
        "scope": "Namespaced",
        "names": {"kind": "Widget", "plural": "widgets", "shortNames": ["wd"]},
        "versions": [
            {
                "name": "v1",
                "served": True,
                "storage": True,
                "subresources": {"status": {}},
                "schema": {
                    "openAPIV3Schema": {
                        "type": "object",
                        "properties": {
                            "apiVersion": {"type": "string"},
                            "kind": {"type": "string"},
                            "metadata": {"type": "object"},
                            "spec": SPEC,
                            "status": {"type": "object", "properties": {"phase": {"type": "string"}}},
                        },
                    }
                },
            }
        ],
    },
}


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    (tmp_path / "example.com_widgets.yaml").write_text(json.dumps(CRD))
    with FakeCluster(Offer(jobset=None, more=("example.com_widgets",)), crds=tmp_path) as cluster:
        yield Client(cluster)


def widget(name: str = "a", **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": name}, "spec": spec}


def test_resource_is_discovered_with_its_names(client: Client) -> None:
    first, second = client.get("/apis/example.com/v1")["resources"]
    assert (first["name"], first["singularName"], first["shortNames"]) == ("widgets", "widget", ["wd"])
    assert second["name"] == "widgets/status"


def test_defaults_are_set_where_their_parent_is(client: Client) -> None:
    stored = client.post(WIDGETS, widget(parts=[{"name": "x"}]))
    assert stored["spec"] == {"mode": "Fast", "parts": [{"name": "x", "on": True}]}
    assert "spec" not in client.post(
        WIDGETS, {"apiVersion": "example.com/v1", "kind": "Widget", "metadata": {"name": "b"}}
    )


def test_unknown_fields_are_pruned_but_where_they_are_kept(client: Client) -> None:
    spec = {"mood": 1, "free": {"any": {"thing": 1}}, "labels": {"a": "b"}, "parts": [{"name": "x", "colour": "red"}]}
    answer = client.send("POST", WIDGETS, widget(**spec))
    assert answer.warnings == [
        '299 - "unknown field \\"spec.mood\\""',
        '299 - "unknown field \\"spec.parts[0].colour\\""',
    ]
    assert answer.body["spec"]["free"] == {"any": {"thing": 1}} and answer.body["spec"]["labels"] == {"a": "b"}
    assert "mood" not in answer.body["spec"] and "colour" not in answer.body["spec"]["parts"][0]
    strict = client.send("POST", WIDGETS, widget("b", **spec), fieldValidation="Strict")
    why = 'strict decoding error: unknown field "spec.mood", unknown field "spec.parts[0].colour"'
    assert strict.body["message"] == f'Widget in version "v1" cannot be handled as a Widget: {why}'


@pytest.mark.parametrize(
    ("spec", "field", "message"),
    [
        ({"mode": "Odd"}, "spec.mode", 'Unsupported value: "Odd": supported values: "Fast", "Slow"'),
        ({"count": 0}, "spec.count", "Invalid value: 0: spec.count in body should be greater than or equal to 1"),
        ({"count": 10}, "spec.count", "Invalid value: 10: spec.count in body should be less than or equal to 9"),
        ({"count": "1"}, "spec.count", 'Invalid value: "string": spec.count in body must be of type integer: "string"'),
        ({"word": "A"}, "spec.word", "Invalid value: \"A\": spec.word in body should match '^[a-z]+$'"),
        ({"word": "abcdef"}, "spec.word", 'Invalid value: "abcdef": may not be more than 5 bytes'),
        ({"parts": [{"size": 1}]}, "spec.parts[0].name", "Required value"),
        (
            {"parts": [{"name": n} for n in "abcd"]},
            "spec.parts",
            "Invalid value: 4: spec.parts in body should have at most 3 items",
        ),
    ],
)
def test_value_that_the_schema_forbids_is_refused(client: Client, spec: Any, field: str, message: str) -> None:
    refused = client.send("POST", WIDGETS, widget(**spec))
    assert (refused.status, refused.body["reason"]) == (422, "Invalid")
    first, last = refused.body["details"]["causes"]
    assert (first["field"], first["message"], last["field"]) == (field, message, "<nil>")


@pytest.mark.parametrize("size", [3, "3Gi"])
def test_int_or_string_takes_both(client: Client, size: Any) -> None:
    assert client.post(WIDGETS, widget(parts=[{"name": "x", "size": size}]))["spec"]["parts"][0]["size"] == size


def test_field_that_may_not_change_does_not(client: Client) -> None:
    client.post(WIDGETS, widget(fixed="a"))
    assert client.send("PATCH", f"{WIDGETS}/a", {"spec": {"count": 2}}, MERGE).status == 200
    refused = client.send("PATCH", f"{WIDGETS}/a", {"spec": {"fixed": "b"}}, MERGE)
    expected = 'Widget.example.com "a" is invalid: spec.fixed: Invalid value: Value is immutable'
    assert (refused.status, refused.body["message"]) == (422, expected)


def test_status_is_a_part_of_its_own(client: Client) -> None:
    client.post(WIDGETS, {**widget(count=1), "status": {"phase": "Early"}})
    assert "status" not in client.get(f"{WIDGETS}/a")
    body = {"spec": {"count": 2}, "status": {"phase": "Running"}}
    found = client.send("PATCH", f"{WIDGETS}/a/status", body, MERGE).body
    assert found["status"] == {"phase": "Running"} and found["spec"]["count"] == 1
    assert found["metadata"]["generation"] == 1


def test_strategic_patch_is_not_known(client: Client) -> None:
    client.post(WIDGETS, widget())
    assert client.send("PATCH", f"{WIDGETS}/a", {}, STRATEGIC).status == 415


def test_items_of_a_keyed_list_have_their_own_owners(client: Client) -> None:
    client.apply(f"{WIDGETS}/a", widget(parts=[{"name": "x", "size": 1}]), "one")
    both = client.apply(f"{WIDGETS}/a", widget(parts=[{"name": "y", "size": 2}]), "two").body
    assert [part["name"] for part in both["spec"]["parts"]] == ["x", "y"]
    refused = client.apply(f"{WIDGETS}/a", widget(parts=[{"name": "x", "size": 9}, {"name": "y", "size": 2}]), "two")
    assert refused.body["message"] == 'Apply failed with 1 conflict: conflict with "one": .spec.parts[name="x"].size'
    left = client.apply(f"{WIDGETS}/a", widget(), "one").body
    assert [part["name"] for part in left["spec"]["parts"]] == ["y"]


def test_file_that_holds_no_definition_is_refused(tmp_path: Path) -> None:
    (tmp_path / "example.com_widgets.yaml").write_text("kind: ConfigMap\n")
    with pytest.raises(ConfigError, match="holds ConfigMap, expected a CustomResourceDefinition"):
        FakeCluster(Offer(jobset=None, more=("example.com_widgets",)), crds=tmp_path)

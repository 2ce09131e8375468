"""Whatever is sent is answered: a body that is nothing of the kind is refused, never a closed connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ktrain.testing.fake_cluster import FakeCluster
from tests.unit.testing.fake_cluster.clusters import (
    APPLY,
    BARE,
    JOBS,
    JSON_PATCH,
    MAPS,
    MERGE,
    PODS,
    STRATEGIC,
    Client,
    config_map,
    pod,
)

KEYS = st.sampled_from(
    ["metadata", "spec", "name", "labels", "data", "containers", "template", "op", "path", "value", "k"]
)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from(["", "a", "/data/k", "add"]),
    lambda below: st.lists(below, max_size=2) | st.dictionaries(KEYS, below, max_size=3),
    max_leaves=12,
)
QUICK = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def client() -> Iterator[Client]:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(MAPS, config_map("target"))
        client.post(PODS, pod("target"))
        yield client


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (PODS, {"spec": None}),
        (PODS, {"spec": {"containers": None}}),
        (PODS, {"spec": {"containers": [None]}}),
        (JOBS, {"spec": {"template": None}}),
        (MAPS, {"metadata": {"labels": None}, "data": {"k": None}}),
    ],
)
def test_null_is_read_as_left_out(client: Client, path: str, body: dict[str, Any]) -> None:
    body = {**body, "metadata": {"name": "n", **body.get("metadata", {})}}
    assert client.send("POST", path, body, dryRun="All").status in (201, 422)
    assert client.send("PATCH", f"{MAPS if path == JOBS else path}/target", body | {"metadata": {}}, MERGE).status in (
        200,
        422,
    )


@QUICK
@given(st.sampled_from([MAPS, PODS, JOBS]), ANYTHING)
def test_create_of_anything_is_answered(client: Client, path: str, body: Any) -> None:
    assert client.send("POST", path, json.dumps(body), dryRun="All").status in (201, 400, 422)


@QUICK
@given(st.sampled_from([MAPS, PODS]), st.sampled_from([MERGE, STRATEGIC, JSON_PATCH, APPLY]), ANYTHING)
def test_patch_by_anything_is_answered(client: Client, path: str, kind: str, body: Any) -> None:
    answer = client.send(
        "PATCH", f"{path}/target", json.dumps(body), kind, dryRun="All", fieldManager="m", force="true"
    )
    assert answer.status in (200, 400, 409, 415, 422, 500)
    if answer.status == 500:
        assert "field not declared in schema" in answer.body["message"]


@QUICK
@given(st.sampled_from(["limit", "continue", "labelSelector", "fieldSelector", "resourceVersion"]), st.text(max_size=8))
def test_list_by_anything_is_answered(client: Client, option: str, value: str) -> None:
    assert client.send("GET", MAPS, **{option: value}).status in (200, 400, 410, 500, 504)


@QUICK
@given(st.text("abc/:%?&.", max_size=20))
def test_path_of_anything_is_answered(client: Client, path: str) -> None:
    assert client.send("GET", "/" + path.replace("?", "")).status in (200, 404, 405)

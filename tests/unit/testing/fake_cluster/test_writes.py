"""Applies, patches and refusals that no recording shows."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ktrain.errors import KtrainError
from ktrain.launcher.cluster.resources import JOB
from ktrain.testing.fake_cluster import FakeCluster, Offer
from tests.unit.testing.fake_cluster.clusters import (
    BARE,
    CRDS,
    JOB_SETS,
    JSON_PATCH,
    MAPS,
    MERGE,
    PODS,
    STRATEGIC,
    WAIT_S,
    Client,
    config_map,
    jobset,
    needs_crds,
    pod,
)


def owners(obj: dict[str, Any]) -> dict[str, Any]:
    return {entry["manager"]: entry["fieldsV1"] for entry in obj["metadata"]["managedFields"]}


def test_apply_merges_a_keyed_list_by_its_keys_and_removes_what_is_no_longer_applied() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        env = [{"name": "A", "value": "1"}, {"name": "B", "value": "2"}]
        assert client.apply(f"{PODS}/p", pod(main={"env": env}, schedulingGates=[{"name": "x/y"}]), "one").status == 201
        found = client.apply(f"{PODS}/p", {"metadata": {"labels": {"k": "v"}}}, "two").body
        assert found["metadata"]["labels"] == {"k": "v"} and len(found["spec"]["containers"]) == 1
        names = owners(found)["one"]["f:spec"]["f:containers"]['k:{"name": "main"}']["f:env"]
        assert set(names) == {'k:{"name": "A"}', 'k:{"name": "B"}'}


def test_apply_of_a_field_that_two_own_stays_until_both_have_left_it() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.apply(f"{MAPS}/a", config_map(data={"x": "1", "y": "1"}), "one")
        assert client.apply(f"{MAPS}/a", config_map(data={"x": "1"}), "two").status == 200
        assert client.apply(f"{MAPS}/a", config_map(data={"y": "1"}), "one").body["data"] == {"x": "1", "y": "1"}
        assert client.apply(f"{MAPS}/a", {"metadata": {"name": "a"}}, "two").body["data"] == {"y": "1"}


def test_apply_names_every_conflict_and_changes_nothing() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.apply(f"{MAPS}/a", config_map(data={"x": "1", "y": "1"}), "one")
        refused = client.apply(f"{MAPS}/a", config_map(data={"x": "2", "y": "2"}), "two")
        assert refused.status == 409
        assert refused.body["message"] == 'Apply failed with 2 conflicts: conflicts with "one":\n- .data.x\n- .data.y'
        assert [cause["field"] for cause in refused.body["details"]["causes"]] == [".data.x", ".data.y"]
        assert client.get(f"{MAPS}/a")["data"] == {"x": "1", "y": "1"}


def test_apply_of_the_same_again_makes_no_version() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        first = client.apply(f"{PODS}/p", pod(), "one").body
        assert client.apply(f"{PODS}/p", pod(), "one").body == first


def test_patches_and_applies_at_once_lose_nothing() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(MAPS, config_map())
        answers: list[int] = []

        def write(number: int) -> None:
            for turn in range(5):
                body = {"data": {f"p{number}-{turn}": "1"}}
                answers.append(client.send("PATCH", f"{MAPS}/a", body, MERGE).status)
            answers.append(client.apply(f"{MAPS}/a", {"data": {f"a{number}": "1"}}, f"m{number}").status)

        threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(WAIT_S)
        assert answers == [200] * 24
        assert len(client.get(f"{MAPS}/a")["data"]) == 25


def test_controller_meets_the_refusal_of_an_invalid_object() -> None:
    with FakeCluster(BARE) as cluster:
        body = {"metadata": {"name": "j", "namespace": "default"}, "spec": {"template": {"spec": {"containers": []}}}}
        with pytest.raises(KtrainError, match="restartPolicy: Required value"):
            cluster.store.create(JOB, body)


def test_dry_run_of_an_apply_stores_nothing() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        assert client.apply(f"{MAPS}/a", config_map(), "one", dryRun="All").status == 201
        assert client.send("GET", f"{MAPS}/a").status == 404
        client.apply(f"{MAPS}/a", config_map(), "one")
        assert client.apply(f"{MAPS}/a", config_map(data={"k": "w"}), "one", dryRun="All").body["data"] == {"k": "w"}
        assert client.get(f"{MAPS}/a")["data"] == {"k": "v"}


def test_apply_reads_yaml() -> None:
    with FakeCluster(BARE) as cluster:
        text = "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata:\n  k: from yaml\n"
        assert Client(cluster).apply(f"{MAPS}/a", text, "one").body["data"] == {"k": "from yaml"}


@pytest.mark.parametrize(
    ("patch", "expected"),
    [
        ([{"op": "replace", "path": "/data/k", "value": "w"}], {"k": "w"}),
        ([{"op": "move", "from": "/data/k", "path": "/data/m"}], {"m": "v"}),
        ([{"op": "copy", "from": "/data/k", "path": "/data/m"}], {"k": "v", "m": "v"}),
        ([{"op": "add", "path": "/data/a~1b~0c", "value": "w"}], {"k": "v", "a/b~c": "w"}),
        ([{"op": "remove", "path": "/data/k"}, {"op": "add", "path": "/data/m", "value": "w"}], {"m": "w"}),
    ],
)
def test_json_patch_does_each_of_its_operations(patch: list[dict[str, str]], expected: dict[str, str]) -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(MAPS, config_map())
        assert client.send("PATCH", f"{MAPS}/a", patch, JSON_PATCH).body["data"] == expected


def test_strategic_patch_deletes_and_replaces_by_directive() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(MAPS, config_map(finalizers=["x/a", "x/b"]))
        metadata = {"$deleteFromPrimitiveList/finalizers": ["x/a"], "finalizers": ["x/c"]}
        found = client.send("PATCH", f"{MAPS}/a", {"metadata": metadata}, STRATEGIC).body
        assert found["metadata"]["finalizers"] == ["x/b", "x/c"]
        data = {"data": {"$patch": "replace", "m": "w"}}
        assert client.send("PATCH", f"{MAPS}/a", data, STRATEGIC).body["data"] == {"m": "w"}


def test_patch_of_the_status_leaves_the_rest() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(PODS, pod())
        body = {"metadata": {"labels": {"k": "v"}}, "status": {"phase": "Running"}}
        found = client.send("PATCH", f"{PODS}/p/status", body, MERGE).body
        assert found["status"]["phase"] == "Running" and "labels" not in found["metadata"]
        found = client.send("PATCH", f"{PODS}/p", {"status": {"phase": "Failed"}}, MERGE).body
        assert found["status"]["phase"] == "Running"


def test_namespace_that_is_being_deleted_takes_nothing_new() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post("/api/v1/namespaces", {"metadata": {"name": "n"}})
        client.post("/api/v1/namespaces/n/configmaps", config_map(finalizers=["x/hold"]))
        assert client.send("DELETE", "/api/v1/namespaces/n").body["status"]["phase"] == "Terminating"
        refused = client.send("POST", "/api/v1/namespaces/n/configmaps", config_map("b"))
        assert refused.status == 403 and "being terminated" in refused.body["message"]
        client.send("PATCH", "/api/v1/namespaces/n/configmaps/a", {"metadata": {"finalizers": None}}, MERGE)
        assert client.send("GET", "/api/v1/namespaces/n").status == 404


def test_collection_is_deleted_by_selector() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        for i in range(4):
            client.post(MAPS, config_map(f"c{i}", labels={"odd": str(i % 2)}))
        gone = client.send("DELETE", MAPS, labelSelector="odd=1").body
        assert [each["metadata"]["name"] for each in gone["items"]] == ["c1", "c3"]
        assert [each["metadata"]["name"] for each in client.get(MAPS)["items"]] == ["c0", "c2"]


@needs_crds
def test_jobset_is_refused_with_a_cause_for_each_fault() -> None:
    with FakeCluster(Offer(), crds=CRDS) as cluster:
        body = jobset(failurePolicy={"maxRestarts": -1, "rules": [{"name": "r", "action": "Explode"}]})
        refused = Client(cluster).send("POST", JOB_SETS, body)
        assert refused.status == 422
        fields = [cause["field"] for cause in refused.body["details"]["causes"]]
        assert "spec.failurePolicy.rules[0].action" in fields and fields[-1] == "<nil>"


@needs_crds
def test_apply_of_a_jobset_takes_a_field_from_an_update_by_force() -> None:
    with FakeCluster(Offer(), crds=CRDS) as cluster:
        client = Client(cluster)
        client.apply(f"{JOB_SETS}/a", jobset(suspend=True), "ktrain")
        client.send("PATCH", f"{JOB_SETS}/a", {"spec": {"suspend": False}}, MERGE, fieldManager="queue")
        assert client.apply(f"{JOB_SETS}/a", jobset(suspend=True), "ktrain").status == 409
        found = client.apply(f"{JOB_SETS}/a", jobset(suspend=True), "ktrain", force="true").body
        assert found["spec"]["suspend"] is True and "queue" not in owners(found)

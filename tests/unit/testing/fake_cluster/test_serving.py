"""Clients, watches, rights, faults and logs."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

import ktrain.testing
from ktrain.launcher.cluster.resources import CONFIG_MAP, POD
from ktrain.testing.fake_cluster import Access, FakeCluster, Fault, FileLogs, Pace, Rule
from tests.unit.testing.fake_cluster.clusters import BARE, JOBS, MAPS, PODS, Client, config_map, pod

ROOT = Path(__file__).parents[4]


def lines(response: http.client.HTTPResponse, count: int) -> list[tuple[str, str]]:
    """The type and name, or version of a bookmark, of so many events."""
    found = [json.loads(response.readline()) for _ in range(count)]
    return [(each["type"], each["object"]["metadata"].get("name", "")) for each in found]


def test_cluster_is_found_by_its_public_name() -> None:
    assert ktrain.testing.FakeCluster is FakeCluster
    with pytest.raises(AttributeError):
        ktrain.testing.NoSuchThing  # noqa: B018


def test_official_client_creates_lists_watches_and_is_refused() -> None:
    kubernetes = pytest.importorskip("kubernetes")
    with FakeCluster(BARE) as cluster:
        api = kubernetes.config.new_client_from_config_dict(cluster.kubeconfig())
        with api:
            core = kubernetes.client.CoreV1Api(api)
            core.create_namespaced_config_map("default", {"metadata": {"name": "a"}, "data": {"k": "v"}})
            listed = core.list_namespaced_config_map("default")
            assert [each.metadata.name for each in listed.items] == ["a"]
            version = listed.metadata.resource_version
            core.patch_namespaced_config_map("a", "default", {"data": {"k": "w"}})
            events = kubernetes.watch.Watch().stream(
                core.list_namespaced_config_map, "default", resource_version=version, timeout_seconds=1
            )
            assert [(event["type"], event["object"].data) for event in events] == [("MODIFIED", {"k": "w"})]
            with pytest.raises(kubernetes.client.ApiException) as refused:
                core.create_namespaced_config_map("default", {"metadata": {"name": "a"}})
            assert refused.value.status == 409 and json.loads(refused.value.body)["reason"] == "AlreadyExists"


def test_kubeconfig_is_written_for_others(tmp_path: Path) -> None:
    with FakeCluster(BARE, access=Access(tokens={"secret": "bob"})) as cluster:
        config = json.loads(cluster.write_kubeconfig(tmp_path / "config", "bob", "ns").read_text())
        assert config["users"][0]["user"] == {"token": "secret"}
        assert config["clusters"][0]["cluster"] == {"server": cluster.url}
        assert config["contexts"][0]["context"]["namespace"] == "ns"


def test_cluster_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    with FakeCluster(BARE) as cluster:
        connection, response = Client(cluster).open("GET", MAPS, watch="true")
        assert response.status == 200
    assert threading.active_count() == before
    assert response.readline() == b""
    connection.close()


def test_example_of_the_page_runs(tmp_path: Path) -> None:
    pytest.importorskip("kubernetes")
    page = (ROOT / "docs" / "reference" / "fake-cluster.md").read_text()
    program = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr


# ---------------------------------------------------------------------------- watches


def test_watch_resumes_from_its_bookmark_and_misses_nothing() -> None:
    with FakeCluster(BARE, pace=Pace(bookmark_s=0.05)) as cluster:
        client = Client(cluster)
        version = client.get(MAPS)["metadata"]["resourceVersion"]
        client.post("/api/v1/namespaces/kube-system/configmaps", config_map("elsewhere"))
        connection, response = client.open(
            "GET", MAPS, watch="true", resourceVersion=version, allowWatchBookmarks="true"
        )
        bookmark = json.loads(response.readline())
        connection.close()
        assert bookmark["type"] == "BOOKMARK"
        resumed_at = bookmark["object"]["metadata"]["resourceVersion"]
        assert int(resumed_at) > int(version)
        client.post(MAPS, config_map("a"))
        connection, response = client.open("GET", MAPS, watch="true", resourceVersion=resumed_at)
        assert lines(response, 1) == [("ADDED", "a")]
        connection.close()


def test_watch_from_before_the_history_gets_410_and_a_new_list_goes_on() -> None:
    with FakeCluster(BARE, pace=Pace(history=3)) as cluster:
        client = Client(cluster)
        old = client.get(MAPS)["metadata"]["resourceVersion"]
        for i in range(5):
            client.post(MAPS, config_map(f"c{i}"))
        connection, response = client.open("GET", MAPS, watch="true", resourceVersion=old)
        expired = json.loads(response.readline())
        connection.close()
        assert (expired["type"], expired["object"]["code"], expired["object"]["reason"]) == ("ERROR", 410, "Expired")
        new = client.get(MAPS)["metadata"]["resourceVersion"]
        connection, response = client.open("GET", MAPS, watch="true", resourceVersion=new)
        client.send("DELETE", f"{MAPS}/c0")
        assert lines(response, 1) == [("DELETED", "c0")]
        connection.close()


def test_pages_show_the_list_as_it_was_when_it_began() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        for i in range(4):
            client.post(MAPS, config_map(f"c{i}"))
        page = client.get(MAPS, limit=2)
        assert page["metadata"]["remainingItemCount"] == 2
        client.send("DELETE", f"{MAPS}/c2")
        client.post(MAPS, config_map("c9"))
        rest = client.get(MAPS, limit=9, **{"continue": page["metadata"]["continue"]})
        assert [each["metadata"]["name"] for each in rest["items"]] == ["c2", "c3"]
        assert rest["metadata"]["resourceVersion"] == page["metadata"]["resourceVersion"]


def test_controllers_and_clients_see_one_store() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        connection, response = client.open("GET", MAPS, watch="true")
        cluster.store.create(CONFIG_MAP, {"metadata": {"name": "a", "namespace": "default"}})
        assert lines(response, 1) == [("ADDED", "a")]
        connection.close()


# ---------------------------------------------------------------------------- rights


def test_rule_allows_what_it_says_and_nothing_more() -> None:
    rules = {"bob": (Rule(("create", "get"), ("",), ("configmaps",), ("default",)), Rule(("*",), ("batch",), ("*",)))}
    with FakeCluster(BARE, access=Access(rules, {"t": "bob"})) as cluster:
        client = Client(cluster, "t")
        assert client.send("POST", MAPS, config_map()).status == 201
        assert client.send("GET", f"{MAPS}/a").status == 200
        assert client.send("GET", "/api/v1/namespaces/kube-system/configmaps/a").status == 403
        assert client.send("GET", JOBS).status == 200
        refused = client.send("GET", MAPS)
        assert refused.status == 403 and 'User "bob" cannot list resource "configmaps"' in refused.body["message"]
        assert client.send("GET", "/apis").status == 200
        cluster.access = Access()
        assert client.send("GET", "/apis").status == 401


def test_right_to_a_part_is_a_right_of_its_own() -> None:
    rules = {"bob": (Rule(("get",), ("",), ("pods",)),)}
    with FakeCluster(BARE, access=Access(rules, {"t": "bob"})) as cluster:
        Client(cluster).post(PODS, pod())
        client = Client(cluster, "t")
        assert client.send("GET", f"{PODS}/p").status == 200
        assert client.send("GET", f"{PODS}/p/log").status == 403


# ---------------------------------------------------------------------------- faults


def test_fault_refuses_so_many_requests_and_then_lets_through() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        cluster.put_fault(Fault(429, method="POST", path="configmaps", times=2, retry_after_s=1))
        assert client.send("GET", MAPS).status == 200
        for _ in range(2):
            refused = client.send("POST", MAPS, config_map())
            assert (refused.status, refused.headers["Retry-After"]) == (429, "1")
            assert refused.body["reason"] == "TooManyRequests"
        assert client.send("POST", MAPS, config_map()).status == 201


def test_lost_reply_leaves_the_write_done() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        cluster.put_fault(Fault(None, method="POST", performed=True))
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            client.send("POST", MAPS, config_map())
        assert client.get(f"{MAPS}/a")["data"] == {"k": "v"}


def test_requests_are_remembered_for_the_test() -> None:
    with FakeCluster(BARE) as cluster:
        Client(cluster).send("DELETE", f"{MAPS}/a", propagationPolicy="Orphan")
        found = cluster.requests(lambda request: request.method == "DELETE")
        assert [(each.path, each.query) for each in found] == [(f"{MAPS}/a", {"propagationPolicy": "Orphan"})]


# ---------------------------------------------------------------------------- logs


def state(cluster: FakeCluster, **changes: Any) -> None:
    status = {"containerStatuses": [{"name": "main", "restartCount": 0, **changes}]}
    cluster.store.mutate(POD, "default", "p", lambda obj: obj["status"].update(status), status=True)


def test_followed_log_ends_with_the_container() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(PODS, pod())
        bound = cluster.store.mutate(POD, "default", "p", lambda obj: obj["spec"].update(nodeName="n1"))
        state(cluster, state={"running": {}})
        connection, response = client.open("GET", f"{PODS}/p/log", follow="true")
        cluster.logs.write(bound, "main", "first\n")
        assert response.readline() == b"first\n"
        cluster.logs.write(bound, "main", "last\n")
        state(cluster, state={"terminated": {"exitCode": 0}})
        assert response.read() == b"last\n"
        connection.close()


def test_log_of_a_file_shows_a_torn_line_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "0.log"
    with FakeCluster(BARE, logs=FileLogs(lambda pod, container, run: tmp_path / f"{run}.log")) as cluster:
        client = Client(cluster)
        client.post(PODS, pod(nodeName="n1"))
        state(cluster, state={"running": {}})
        path.write_text("whole\ntorn")
        connection, response = client.open("GET", f"{PODS}/p/log", follow="true")
        assert response.readline() == b"whole\n"
        path.write_text("whole\ntorn no more\nlast")
        state(cluster, state={"terminated": {"exitCode": 0}})
        assert response.read() == b"torn no more\nlast"
        connection.close()


def test_log_lines_carry_their_times_when_asked() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        client.post(PODS, pod(nodeName="n1"))
        cluster.logs.write(cluster.store.get(POD, "default", "p"), "main", "one\ntwo\n")
        text = client.send("GET", f"{PODS}/p/log", timestamps="true", tailLines=1).body
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z two\n", text)


def test_eviction_counts_shares_of_a_budget() -> None:
    with FakeCluster(BARE) as cluster:
        client = Client(cluster)
        for i in range(3):
            body = pod(f"p{i}", nodeName="n1")
            client.post(PODS, body | {"metadata": {"name": f"p{i}", "labels": {"app": "x"}}})
            ready = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}
            cluster.store.mutate(
                POD, "default", f"p{i}", lambda obj, ready=ready: obj["status"].update(ready), status=True
            )
        spec = {
            "minAvailable": "60%",
            "selector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["x"]}]},
        }
        client.post(
            "/apis/policy/v1/namespaces/default/poddisruptionbudgets", {"metadata": {"name": "b"}, "spec": spec}
        )
        assert client.send("POST", f"{PODS}/p0/eviction", {"metadata": {"name": "p0"}}).status == 201
        refused = client.send("POST", f"{PODS}/p1/eviction", {"metadata": {"name": "p1"}})
        assert refused.status == 429
        conditions = client.get(f"{PODS}/p0")["status"]["conditions"]
        assert ("DisruptionTarget", "EvictionByEvictionAPI") in [
            (each["type"], each.get("reason")) for each in conditions
        ]

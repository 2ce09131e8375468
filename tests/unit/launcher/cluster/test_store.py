"""The store keeps objects as the recorded API server does."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from ktrain.errors import ConfigError, ConflictError, NotFoundError
from ktrain.launcher.cluster.resources import CONFIG_MAP, JOB, NAMESPACE, NODE, POD, POD_GROUP
from ktrain.launcher.cluster.store import AlreadyExistsError, ExpiredError, Preconditions, Store, Watch
from ktrain.testing.fake_clock import FakeClock

NS = "ns"
WAIT_S = 10.0


def config_map(name: str = "a", **metadata: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": NS, **metadata}, "data": {"k": "v"}}


def job(name: str = "a", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": NS}, "spec": {"parallelism": 1, **spec}}


def bound_pod(name: str = "p", **spec: Any) -> dict[str, Any]:
    spec = {"nodeName": "n1", "terminationGracePeriodSeconds": 5, **spec}
    return {"metadata": {"name": name, "namespace": NS}, "spec": spec, "status": {"phase": "Running"}}


def owned_by(owner: dict[str, Any], *, blocks: bool = False) -> dict[str, Any]:
    reference = {"apiVersion": "v1", "kind": owner["kind"], "name": owner["metadata"]["name"]}
    return {"ownerReferences": [{**reference, "uid": owner["metadata"]["uid"], "blockOwnerDeletion": blocks}]}


def events(watch: Watch, count: int) -> list[tuple[str, str]]:
    found = [watch.next(WAIT_S) for _ in range(count)]
    return [(event.type, event.object["metadata"]["name"]) for event in found if event is not None]


def names(store: Store, **selectors: Any) -> list[str]:
    return [obj["metadata"]["name"] for obj in store.list(CONFIG_MAP, NS, **selectors).items]


def test_create_sets_what_the_server_sets() -> None:
    store = Store(clock=FakeClock())
    stored = store.create(JOB, job(suspend=True) | {"metadata": {"name": "a", "namespace": NS, "uid": "mine"}})
    metadata = stored["metadata"]
    assert stored["apiVersion"] == "batch/v1" and stored["kind"] == "Job"
    assert metadata["uid"] != "mine" and len(metadata["uid"]) == 36
    assert metadata["generation"] == 1 and metadata["resourceVersion"] == store.version
    assert metadata["creationTimestamp"] == "2023-11-14T22:30:00Z"


def test_create_of_a_taken_name_is_refused() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map())
    with pytest.raises(AlreadyExistsError, match='configmaps "a" already exists'):
        store.create(CONFIG_MAP, config_map())


def test_create_without_a_name_makes_one_or_is_refused() -> None:
    store = Store()
    made = store.create(CONFIG_MAP, {"metadata": {"generateName": "run-", "namespace": NS}})
    assert made["metadata"]["name"].startswith("run-") and len(made["metadata"]["name"]) == 9
    with pytest.raises(ConfigError, match="generateName"):
        store.create(CONFIG_MAP, {"metadata": {}})


def test_what_is_returned_belongs_to_the_caller() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map())["data"]["k"] = "changed"
    store.list(CONFIG_MAP, NS).items[0]["data"]["k"] = "changed"
    assert store.get(CONFIG_MAP, NS, "a")["data"] == {"k": "v"}


def test_versions_of_a_group_share_their_objects() -> None:
    store = Store()
    store.create(POD_GROUP, {"metadata": {"name": "g", "namespace": NS}})
    assert store.get(POD_GROUP.at("v1beta1"), NS, "g")["apiVersion"] == "scheduling.k8s.io/v1beta1"


def test_update_counts_generations_of_the_spec_alone() -> None:
    store = Store()
    first = store.create(JOB, job())
    labelled = store.update(JOB, {**first, "metadata": {**first["metadata"], "labels": {"k": "v"}}})
    assert labelled["metadata"]["generation"] == 1
    changed = store.update(JOB, {**labelled, "spec": {"parallelism": 2}})
    assert changed["metadata"]["generation"] == 2


def test_binding_of_a_pod_is_no_generation() -> None:
    store = Store()
    store.create(POD, bound_pod(nodeName=""))
    store.mutate(POD, NS, "p", lambda pod: pod["spec"].update(nodeName="n1"))
    assert store.get(POD, NS, "p")["metadata"]["generation"] == 1
    store.mutate(POD, NS, "p", lambda pod: pod["spec"].update(activeDeadlineSeconds=1))
    assert store.get(POD, NS, "p")["metadata"]["generation"] == 2


def test_update_that_changes_nothing_makes_no_version() -> None:
    store = Store()
    first = store.create(CONFIG_MAP, config_map())
    assert store.update(CONFIG_MAP, first) == first
    assert store.version == first["metadata"]["resourceVersion"]


def test_update_of_a_stale_version_is_refused() -> None:
    store = Store()
    first = store.create(CONFIG_MAP, config_map())
    store.update(CONFIG_MAP, {**first, "data": {"k": "2"}})
    with pytest.raises(ConflictError, match="the object has been modified; please apply your changes"):
        store.update(CONFIG_MAP, {**first, "data": {"k": "3"}})
    assert store.get(CONFIG_MAP, NS, "a")["data"] == {"k": "2"}


def test_update_without_a_version_is_the_last_write() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map())
    store.update(CONFIG_MAP, {**config_map(), "data": {"k": "2"}})
    assert store.get(CONFIG_MAP, NS, "a")["data"] == {"k": "2"}


def test_status_is_written_apart_from_the_rest() -> None:
    store = Store()
    store.create(JOB, job())
    store.mutate(JOB, NS, "a", lambda obj: obj.update(spec={"parallelism": 9}, status={"active": 1}), status=True)
    store.mutate(JOB, NS, "a", lambda obj: obj.update(status={"active": 7}))
    found = store.get(JOB, NS, "a")
    assert found["spec"] == {"parallelism": 1} and found["status"] == {"active": 1}
    assert found["metadata"]["generation"] == 1


def test_mutate_by_many_threads_loses_nothing() -> None:
    store = Store()
    store.create(CONFIG_MAP, {**config_map(), "data": {"count": 0}})

    def count_up() -> None:
        for _ in range(25):
            store.mutate(CONFIG_MAP, NS, "a", lambda obj: obj["data"].update(count=obj["data"]["count"] + 1))

    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert store.get(CONFIG_MAP, NS, "a")["data"] == {"count": 100}


def test_admit_completes_and_refuses() -> None:
    def admit(resource: object, old: dict[str, Any] | None, new: dict[str, Any]) -> None:
        if old is not None and new["data"] != old["data"]:
            raise ConfigError("data: may not change")
        new["admitted"] = True

    store = Store(admit=admit)
    assert store.create(CONFIG_MAP, config_map())["admitted"]
    with pytest.raises(ConfigError):
        store.mutate(CONFIG_MAP, NS, "a", lambda obj: obj["data"].clear())
    assert store.get(CONFIG_MAP, NS, "a")["data"] == {"k": "v"}


def test_list_selects_by_labels_and_fields() -> None:
    store = Store()
    for i in range(4):
        store.create(CONFIG_MAP, config_map(f"c{i}", labels={"i": str(i), "app": "demo"}))
    store.create(CONFIG_MAP, {"metadata": {"name": "c9", "namespace": "other"}})
    assert names(store) == ["c0", "c1", "c2", "c3"]
    assert names(store, labels="app=demo,i in (1,2)") == ["c1", "c2"]
    assert names(store, labels="app,i notin (1,2),!other") == ["c0", "c3"]
    assert names(store, labels={"i": "2"}, fields="metadata.name!=c1") == ["c2"]
    assert len(store.list(CONFIG_MAP).items) == 5


# ---------------------------------------------------------------------------- deletion


def test_delete_of_what_is_absent_is_refused() -> None:
    with pytest.raises(NotFoundError, match='jobs.batch "a" not found'):
        Store().delete(JOB, NS, "a")


def test_delete_checks_its_preconditions() -> None:
    store = Store()
    stored = store.create(CONFIG_MAP, config_map())
    with pytest.raises(ConflictError, match="UID in the precondition"):
        store.delete(CONFIG_MAP, NS, "a", preconditions=Preconditions(uid="other"))
    with pytest.raises(ConflictError, match="ResourceVersion in the precondition"):
        store.delete(CONFIG_MAP, NS, "a", preconditions=Preconditions(version="0"))
    store.delete(CONFIG_MAP, NS, "a", preconditions=Preconditions(uid=stored["metadata"]["uid"]))
    assert names(store) == []


def test_delete_of_a_bound_pod_waits_for_its_grace() -> None:
    store = Store(clock=FakeClock())
    store.create(POD, bound_pod())
    marked = store.delete(POD, NS, "p")
    assert marked["metadata"]["deletionGracePeriodSeconds"] == 5
    assert marked["metadata"]["deletionTimestamp"] == "2023-11-14T22:30:05Z"
    assert store.delete(POD, NS, "p", grace_s=20) == marked
    store.delete(POD, NS, "p", grace_s=0)
    assert not store.list(POD).items


def test_delete_of_an_unbound_or_ended_pod_is_at_once() -> None:
    store = Store()
    store.create(POD, bound_pod("unbound", nodeName=""))
    store.create(POD, bound_pod("ended") | {"status": {"phase": "Succeeded"}})
    for name in ("unbound", "ended"):
        store.delete(POD, NS, name)
    assert not store.list(POD).items


def test_finalizer_holds_an_object_until_it_is_removed() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map(finalizers=["example.com/hold"]))
    assert store.delete(CONFIG_MAP, NS, "a")["metadata"]["deletionTimestamp"]
    store.mutate(CONFIG_MAP, NS, "a", lambda obj: obj["metadata"].pop("finalizers"))
    assert names(store) == []


def test_background_delete_takes_the_dependents_after_the_owner() -> None:
    store = Store()
    owner = store.create(CONFIG_MAP, config_map("owner"))
    child = store.create(CONFIG_MAP, config_map("child", **owned_by(owner)))
    store.create(CONFIG_MAP, config_map("grandchild", **owned_by(child)))
    watch = store.watch(CONFIG_MAP, NS, since=store.version)
    store.delete(CONFIG_MAP, NS, "owner")
    assert events(watch, 3) == [("DELETED", "owner"), ("DELETED", "child"), ("DELETED", "grandchild")]


def test_foreground_delete_waits_for_a_blocking_dependent() -> None:
    store = Store()
    owner = store.create(CONFIG_MAP, config_map("owner"))
    store.create(CONFIG_MAP, config_map("child", finalizers=["example.com/hold"], **owned_by(owner, blocks=True)))
    held = store.delete(CONFIG_MAP, NS, "owner", propagation="Foreground")
    assert held["metadata"]["finalizers"] == ["foregroundDeletion"] and names(store) == ["child", "owner"]
    watch = store.watch(CONFIG_MAP, NS, since=store.version)
    store.mutate(CONFIG_MAP, NS, "child", lambda obj: obj["metadata"].pop("finalizers"))
    assert events(watch, 2) == [("DELETED", "child"), ("DELETED", "owner")]


def test_orphaning_delete_leaves_the_dependents() -> None:
    store = Store()
    owner = store.create(CONFIG_MAP, config_map("owner"))
    store.create(CONFIG_MAP, config_map("child", **owned_by(owner)))
    store.delete(CONFIG_MAP, NS, "owner", propagation="Orphan")
    assert names(store) == ["child"]
    assert "ownerReferences" not in store.get(CONFIG_MAP, NS, "child")["metadata"]


def test_object_whose_owner_is_absent_is_accepted_and_collected() -> None:
    store = Store()
    absent = {"kind": "ConfigMap", "metadata": {"name": "gone", "uid": "0"}}
    watch = store.watch(CONFIG_MAP, NS, since=store.version)
    store.create(CONFIG_MAP, config_map("child", **owned_by(absent)))
    assert events(watch, 2) == [("ADDED", "child"), ("DELETED", "child")]


def test_namespace_goes_with_the_last_of_its_objects() -> None:
    store = Store()
    store.create(NAMESPACE, {"metadata": {"name": NS}})
    store.create(CONFIG_MAP, config_map())
    store.create(POD, bound_pod())
    assert store.delete(NAMESPACE, None, NS)["status"] == {"phase": "Terminating"}
    assert names(store) == [] and store.get(NAMESPACE, None, NS)
    store.delete(POD, NS, "p", grace_s=0)
    assert not store.list(NAMESPACE).items


# ---------------------------------------------------------------------------- watching


def test_watch_without_a_version_begins_with_what_is_there() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map("a"))
    with store.watch(CONFIG_MAP, NS) as watch:
        store.create(CONFIG_MAP, config_map("b"))
        store.create(CONFIG_MAP, {"metadata": {"name": "c", "namespace": "other"}})
        store.create(NODE, {"metadata": {"name": "n1"}})
        assert events(watch, 2) == [("ADDED", "a"), ("ADDED", "b")]
        assert watch.next(0) is None and str(watch.bookmark()) == store.version


def test_watch_from_a_version_sees_what_followed() -> None:
    store = Store()
    first = store.create(CONFIG_MAP, config_map())
    store.mutate(CONFIG_MAP, NS, "a", lambda obj: obj.update(data={}))
    store.delete(CONFIG_MAP, NS, "a")
    watch = store.watch(CONFIG_MAP, NS, since=first["metadata"]["resourceVersion"])
    changed, deleted = watch.next(WAIT_S), watch.next(WAIT_S)
    assert changed is not None and deleted is not None
    assert (changed.type, changed.object["data"], changed.previous and changed.previous["data"]) == (
        "MODIFIED",
        {},
        {"k": "v"},
    )
    assert deleted.type == "DELETED" and deleted.object["metadata"]["resourceVersion"] == store.version


def test_watch_from_a_forgotten_version_is_refused() -> None:
    store = Store(history=2)
    first = store.create(CONFIG_MAP, config_map("a"))
    for name in "bcd":
        store.create(CONFIG_MAP, config_map(name))
    with pytest.raises(ExpiredError, match="too old resource version: 1 "):
        store.watch(CONFIG_MAP, NS, since=first["metadata"]["resourceVersion"])
    store.compact()
    assert store.watch(CONFIG_MAP, NS, since=store.version).next(0) is None


def test_list_at_an_older_version_shows_what_was_there() -> None:
    store = Store()
    store.create(CONFIG_MAP, config_map("a"))
    store.create(CONFIG_MAP, config_map("b"))
    then = store.version
    store.mutate(CONFIG_MAP, NS, "a", lambda obj: obj.update(data={}))
    store.delete(CONFIG_MAP, NS, "b")
    store.create(CONFIG_MAP, config_map("c"))
    found = store.list(CONFIG_MAP, NS, at=then)
    assert [(obj["metadata"]["name"], obj["data"]) for obj in found.items] == [("a", {"k": "v"}), ("b", {"k": "v"})]
    assert found.version == then and names(store) == ["a", "c"]
    store.compact()
    with pytest.raises(ExpiredError):
        store.list(CONFIG_MAP, NS, at=then)


def test_plan_refuses_and_returns_like_the_write_and_stores_nothing() -> None:
    store = Store()
    planned = store.plan_create(CONFIG_MAP, config_map())
    assert planned["metadata"]["uid"] and "resourceVersion" not in planned["metadata"] and names(store) == []
    first = store.create(CONFIG_MAP, config_map())
    assert store.plan_update(CONFIG_MAP, {**first, "data": {"k": "2"}})["data"] == {"k": "2"}
    assert store.get(CONFIG_MAP, NS, "a") == first
    with pytest.raises(AlreadyExistsError):
        store.plan_create(CONFIG_MAP, config_map())


def test_watch_that_is_closed_wakes_its_reader() -> None:
    store = Store()
    watch = store.watch(CONFIG_MAP, NS)
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(watch.next(60.0)))
    reader.start()
    watch.close()
    reader.join(WAIT_S)
    assert not reader.is_alive() and found == [None] and watch.closed

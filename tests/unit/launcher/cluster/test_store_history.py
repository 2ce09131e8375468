"""Whatever is done to a store, its history tells it: to those who look back and to those who follow."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from ktrain.errors import ConflictError, NotFoundError
from ktrain.launcher.cluster.resources import CONFIG_MAP
from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_clock import FakeClock

NS = "ns"
NAMES = st.sampled_from("abcd")
OPERATIONS = st.one_of(
    st.tuples(st.just("create"), NAMES, st.lists(NAMES, max_size=2), st.booleans()),
    st.tuples(st.just("change"), NAMES, st.integers(0, 3)),
    st.tuples(st.just("release"), NAMES),
    st.tuples(st.just("delete"), NAMES, st.sampled_from(["Background", "Foreground", "Orphan"])),
)


def do(store: Store, operation: tuple[Any, ...]) -> None:
    """Does one operation, unless the store refuses it as it should."""
    verb, name, *rest = operation
    try:
        if verb == "create":
            owner_names, holds = rest
            metadata = {"name": name, "namespace": NS, "ownerReferences": references(store, owner_names)}
            store.create(CONFIG_MAP, {"metadata": metadata | ({"finalizers": ["x/hold"]} if holds else {})})
        elif verb == "change":
            store.mutate(CONFIG_MAP, NS, name, lambda obj: obj.update(data={"k": str(rest[0])}))
        elif verb == "release":
            store.mutate(CONFIG_MAP, NS, name, lambda obj: obj["metadata"].pop("finalizers", None))
        else:
            store.delete(CONFIG_MAP, NS, name, propagation=rest[0])
    except (NotFoundError, ConflictError) as error:
        assert f'"{name}"' in str(error)


def references(store: Store, names: list[str]) -> list[dict[str, Any]]:
    found = [obj["metadata"] for obj in store.list(CONFIG_MAP, NS).items if obj["metadata"]["name"] in names]
    return [{"name": each["name"], "uid": each["uid"], "blockOwnerDeletion": True} for each in found]


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_history_tells_all_that_was_done(operations: list[tuple[Any, ...]]) -> None:
    store = Store(clock=FakeClock())
    begin = store.create(CONFIG_MAP, {"metadata": {"name": "first", "namespace": NS}})["metadata"]["resourceVersion"]
    then: dict[str, list[dict[str, Any]]] = {begin: store.list(CONFIG_MAP, NS).items}
    watch = store.watch(CONFIG_MAP, NS, since=begin)
    for operation in operations:
        do(store, operation)
        then[store.version] = store.list(CONFIG_MAP, NS).items
    for version, items in then.items():
        assert store.list(CONFIG_MAP, NS, at=version).items == items
    followed = {obj["metadata"]["name"]: obj for obj in then[begin]}
    last = int(begin)
    while (event := watch.next(0)) is not None:
        assert event.version > last and event.object["metadata"]["resourceVersion"] == str(event.version)
        last, name = event.version, event.object["metadata"]["name"]
        assert (event.previous is None) == (name not in followed)
        if event.type == "DELETED":
            del followed[name]
        else:
            followed[name] = event.object
    assert sorted(followed.values(), key=lambda obj: obj["metadata"]["name"]) == store.list(CONFIG_MAP, NS).items


@settings(max_examples=150, deadline=None)
@given(st.lists(OPERATIONS, max_size=25))
def test_nothing_is_left_whose_owners_are_all_gone(operations: list[tuple[Any, ...]]) -> None:
    store = Store(clock=FakeClock())
    for operation in operations:
        do(store, operation)
        objects = store.list(CONFIG_MAP, NS).items
        uids = {obj["metadata"]["uid"] for obj in objects}
        for obj in objects:
            metadata = obj["metadata"]
            owners = metadata.get("ownerReferences") or []
            if owners and not any(owner["uid"] in uids for owner in owners):
                assert metadata.get("deletionTimestamp") and metadata.get("finalizers")

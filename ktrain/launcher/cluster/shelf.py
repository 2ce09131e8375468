"""Where a store's objects lie, with the counter of versions and those who watch.

Invariant: an object on the shelf is never changed in place; every change puts a new one under a new version.
Not safe for threads: its owner locks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.resources import Resource
from ktrain.launcher.cluster.watch import ADDED, DELETED, MODIFIED, Change, Event, History, Watch

Object = dict[str, Any]
Name = tuple[str | None, str]  # namespace (None for a kind without), name


def name_of(resource: Resource, namespace: str | None, name: str) -> Name:
    return (namespace or "default" if resource.namespaced else None), name


class Shelf:
    """Objects by kind and name. `version` is that of the newest change."""

    def __init__(self, history: int) -> None:
        self.version = 0
        self._objects: dict[tuple[str, str], dict[Name, Object]] = {}
        self._resources: dict[tuple[str, str], Resource] = {}
        self._uids: set[str] = set()
        self._history = History(history)
        self._watches: list[Watch] = []

    def find(self, resource: Resource, name: Name) -> Object:
        """Returns what lies on the shelf, not a copy.

        Raises:
            NotFoundError: nothing lies there.
        """
        try:
            return self._objects[resource.storage][name]
        except KeyError:
            raise NotFoundError(f'{resource.qualified} "{name[1]}" not found') from None

    def holds(self, resource: Resource, name: Name) -> bool:
        return name in self._objects.get(resource.storage, {})

    def holds_uid(self, uid: str) -> bool:
        return uid in self._uids

    def items(self, resource: Resource, namespace: str | None) -> list[Object]:
        """The objects of a kind in a namespace, or in all where it is None, by namespace and name."""
        return _in_order(self._objects.get(resource.storage, {}), namespace)

    def as_of(self, version: int, resource: Resource, namespace: str | None) -> list[Object]:
        """What `items` was at an older version.

        Raises:
            ExpiredError: the history no longer reaches back so far.
        """
        then = dict(self._objects.get(resource.storage, {}))
        for change in reversed(list(self._history.after(version))):
            if change.storage == resource.storage:
                name = (change.namespace, change.event.object["metadata"]["name"])
                if change.event.previous is None:
                    del then[name]
                else:
                    then[name] = change.event.previous
        return _in_order(then, namespace)

    def everything(self) -> Iterator[tuple[Resource, Name, Object]]:
        for storage, objects in list(self._objects.items()):
            for name, obj in list(objects.items()):
                yield self._resources[storage], name, obj

    def dependents(self, uid: str) -> list[tuple[Resource, Name, Object]]:
        """The objects that name the uid among their owners."""
        return [entry for entry in self.everything() if any(owner["uid"] == uid for owner in owners(entry[2]))]

    def put(self, resource: Resource, name: Name, obj: Object) -> Object:
        """Lays an object down under a new version, and tells the watches."""
        previous = self._objects.get(resource.storage, {}).get(name)
        stored = self._versioned(obj)
        self._resources.setdefault(resource.storage, resource)
        self._objects.setdefault(resource.storage, {})[name] = stored
        self._uids.add(stored["metadata"]["uid"])
        self._tell(resource, name, Event(MODIFIED if previous else ADDED, stored, previous, self.version))
        return stored

    def remove(self, resource: Resource, name: Name, last: Object) -> Object:
        """Takes an object away, whose last state is `last`, and tells the watches."""
        previous = self._objects[resource.storage].pop(name)
        gone = self._versioned(last)
        self._uids.discard(gone["metadata"]["uid"])
        self._tell(resource, name, Event(DELETED, gone, previous, self.version))
        return gone

    def attach(self, watch: Watch, since: str | None) -> None:
        """Lets a watch see what happens after `since`; without it, all that lies here and what follows.

        Raises:
            ExpiredError: the history no longer reaches back to `since`.
        """
        if since is None:
            for obj in self.items(watch.resource, None):
                event = Event(ADDED, obj, None, int(obj["metadata"]["resourceVersion"]))
                watch.offer(Change(watch.resource.storage, obj["metadata"].get("namespace"), event))
        else:
            for change in self._history.after(int(since)):
                watch.offer(change)
        watch.start(self.version)
        self._watches.append(watch)

    def detach(self, watch: Watch) -> None:
        if watch in self._watches:
            self._watches.remove(watch)

    def compact(self) -> None:
        self._history.compact(self.version)

    def _versioned(self, obj: Object) -> Object:
        self.version += 1
        return {**obj, "metadata": {**obj["metadata"], "resourceVersion": str(self.version)}}

    def _tell(self, resource: Resource, name: Name, event: Event) -> None:
        change = Change(resource.storage, name[0], event)
        self._history.append(change)
        for watch in self._watches:
            watch.offer(change)


def _in_order(objects: dict[Name, Object], namespace: str | None) -> list[Object]:
    inside = [name for name in objects if namespace in (None, name[0])]
    return [objects[name] for name in sorted(inside, key=lambda name: (name[0] or "", name[1]))]


def owners(obj: Object) -> list[dict[str, Any]]:
    return obj["metadata"].get("ownerReferences") or []

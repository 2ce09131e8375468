"""What goes when its owner goes: owner references, the two finalizers of deletion, and the contents of namespaces.

Everything happens within the call that causes it, so that a test sees no half-collected state; the order of the
events is that of a real collector.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ktrain.launcher.cluster.resources import NAMESPACE, Resource
from ktrain.launcher.cluster.shelf import Name, Object, Shelf, name_of, owners

ORPHAN = "orphan"
FOREGROUND = "foregroundDeletion"
FINALIZERS = {"Foreground": FOREGROUND, "Orphan": ORPHAN}

Delete = Callable[[Resource, Name, str], None]  # with the propagation policy
Replace = Callable[[Resource, Name, Object], None]


class Garbage:
    """The collector of one shelf. Its owner locks, and does the deleting and replacing."""

    def __init__(self, shelf: Shelf, *, delete: Delete, replace: Replace) -> None:
        self._shelf = shelf
        self._delete = delete
        self._replace = replace

    def created(self, resource: Resource, name: Name) -> None:
        """Deletes an object none of whose owners is there."""
        named = owners(self._shelf.find(resource, name))
        if named and not any(self._shelf.holds_uid(owner["uid"]) for owner in named):
            self._delete(resource, name, "Background")

    def marked(self, resource: Resource, name: Name) -> None:
        """Goes on with the deletion of an object that is held by one of the collector's finalizers."""
        if not self._shelf.holds(resource, name):
            return
        obj = self._shelf.find(resource, name)
        held_by = obj["metadata"].get("finalizers") or []
        dependents = self._shelf.dependents(obj["metadata"]["uid"])
        if ORPHAN in held_by:
            for entry in dependents:
                self._disown(*entry, obj["metadata"]["uid"])
            self._release(resource, name, ORPHAN)
        elif FOREGROUND in held_by:
            self._delete_dependents(dependents)
            if not any(self._blocks(*entry, obj["metadata"]["uid"]) for entry in dependents):
                self._release(resource, name, FOREGROUND)

    def changed(self, old: Object) -> None:
        """Goes on with owners that wait for an object, which has now changed or gone; `old` is how it was."""
        waiting = {owner["uid"] for owner in owners(old)}
        for resource, name, obj in self._shelf.everything() if waiting else ():
            metadata = obj["metadata"]
            if metadata["uid"] in waiting and FOREGROUND in (metadata.get("finalizers") or []):
                self.marked(resource, name)

    def removed(self, resource: Resource, name: Name, gone: Object) -> None:
        """Deletes what only the removed object owned, and lets go of those who waited for it."""
        uid = gone["metadata"]["uid"]
        for entry in self._shelf.dependents(uid):
            if any(self._shelf.holds_uid(owner["uid"]) for owner in owners(entry[2])):
                self._disown(*entry, uid)
            else:
                self._delete(entry[0], entry[1], "Background")
        self.changed(gone)
        if name[0] is not None:
            self._end_namespace(name[0])

    def empty(self, namespace: str) -> None:
        """Deletes all that lies in a namespace that is being deleted; the namespace goes with the last of it."""
        for resource, name, _ in self._shelf.everything():
            if name[0] == namespace and self._shelf.holds(resource, name):
                self._delete(resource, name, "Background")
        self._end_namespace(namespace)

    def is_full(self, namespace: str) -> bool:
        return any(name[0] == namespace for _, name, _ in self._shelf.everything())

    def _end_namespace(self, namespace: str) -> None:
        name = name_of(NAMESPACE, None, namespace)
        if self._shelf.holds(NAMESPACE, name) and not self.is_full(namespace):
            metadata = self._shelf.find(NAMESPACE, name)["metadata"]
            if metadata.get("deletionTimestamp"):
                self._delete(NAMESPACE, name, "Background")

    def _delete_dependents(self, dependents: list[tuple[Resource, Name, Object]]) -> None:
        for resource, name, obj in dependents:
            if self._shelf.holds(resource, name) and not obj["metadata"].get("deletionTimestamp"):
                has_own = bool(self._shelf.dependents(obj["metadata"]["uid"]))
                self._delete(resource, name, "Foreground" if has_own else "Background")

    def _blocks(self, resource: Resource, name: Name, obj: Object, uid: str) -> bool:
        """Whether an object is still there and holds up its owner's foreground deletion."""
        if not self._shelf.holds(resource, name):
            return False
        obj = self._shelf.find(resource, name)
        return any(owner["uid"] == uid and owner.get("blockOwnerDeletion") for owner in owners(obj))

    def _disown(self, resource: Resource, name: Name, obj: Object, uid: str) -> None:
        left = [owner for owner in owners(obj) if owner["uid"] != uid]
        self._replace(resource, name, _with(obj, "ownerReferences", left))

    def _release(self, resource: Resource, name: Name, finalizer: str) -> None:
        if self._shelf.holds(resource, name):
            obj = self._shelf.find(resource, name)
            left = [held for held in obj["metadata"].get("finalizers") or [] if held != finalizer]
            self._replace(resource, name, _with(obj, "finalizers", left))


def _with(obj: Object, key: str, values: list[Any]) -> Object:
    """The object with a list of its metadata replaced; an empty list is left out."""
    metadata = {k: v for k, v in obj["metadata"].items() if k != key}
    return {**obj, "metadata": {**metadata, key: values} if values else metadata}

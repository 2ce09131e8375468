"""Objects kept as an API server keeps them: versions, generations, graces, finalizers, owners and watches.

Versions are one counter for all kinds, so that their order is the order of what happened.
"""

from __future__ import annotations

import copy
import secrets
import threading
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.errors import ConfigError, ConflictError
from ktrain.launcher.cluster import selectors
from ktrain.launcher.cluster.garbage import FINALIZERS, Garbage
from ktrain.launcher.cluster.resources import NAMESPACE, POD, Resource, seen, untyped
from ktrain.launcher.cluster.shelf import Name, Object, Shelf, name_of
from ktrain.launcher.cluster.watch import Event, ExpiredError, Watch

__all__ = ["AlreadyExistsError", "Event", "ExpiredError", "Listed", "Object", "Preconditions", "Store", "Watch"]

Admit = Callable[[Resource, Object | None, Object], None]

_SERVER_SIDE = ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "generation")
_GENERATED_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
_DEFAULT_GRACE_S = 30
_ENDED = ("Succeeded", "Failed")
_MAX_TRIES = 100


class AlreadyExistsError(ConflictError):
    """An object of this name is there."""


@dataclass(frozen=True, slots=True)
class Listed:
    """Objects of one kind by namespace and name, as they were at a version."""

    items: list[Object]
    version: str


@dataclass(frozen=True, slots=True)
class Preconditions:
    """What must hold for an object to be deleted; None for what is not asked."""

    uid: str | None = None
    version: str | None = None


class Store:
    """Objects by kind, namespace and name. Safe from any thread; what it returns belongs to the caller.

    `history` is the number of changes that a watch can start behind. Garbage is collected within the call that
    makes it: when a delete returns, the dependents are deleted as well, or wait for their grace or finalizers.

    `admit(resource, old, new)` may complete or refuse what is about to be stored, as the defaults and the
    admission of an API server do: old is None for a create; it runs with the store locked and must not call it.

    An object of a namespaced kind without a namespace goes to `default`; that the namespace is there is not asked.
    """

    def __init__(self, *, clock: Clock = SYSTEM_CLOCK, history: int = 10_000, admit: Admit | None = None) -> None:
        self._clock = clock
        self._admit = admit
        self._lock = threading.RLock()
        self._shelf = Shelf(history)  # guarded by _lock
        self._garbage = Garbage(self._shelf, delete=self._delete_garbage, replace=self._replace)

    @property
    def version(self) -> str:
        """The version of the newest change."""
        with self._lock:
            return str(self._shelf.version)

    def now(self, later_s: float = 0) -> str:
        """The time as objects carry it: UTC, whole seconds."""
        return datetime.fromtimestamp(self._clock.wall() + later_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")

    # ------------------------------------------------------------------ reading

    def get(self, resource: Resource, namespace: str | None, name: str) -> Object:
        """Returns an object.

        Raises:
            NotFoundError: it is not there.
        """
        with self._lock:
            return seen(resource, self._shelf.find(resource, name_of(resource, namespace, name)))

    def list(
        self,
        resource: Resource,
        namespace: str | None = None,
        *,
        labels: selectors.Selector = None,
        fields: selectors.Selector = None,
        at: str | None = None,
    ) -> Listed:
        """Returns the objects of a namespace, or of all where it is None, that match both selectors.

        With `at`, they are returned as they were at that version.

        Raises:
            ConfigError: a selector that is none.
            ExpiredError: the history no longer reaches back to `at`.
        """
        labels_match, fields_match = selectors.labels_match(labels), selectors.fields_match(fields)
        with self._lock:
            shelf, version = self._shelf, str(self._shelf.version) if at is None else at
            objects = shelf.items(resource, namespace) if at is None else shelf.as_of(int(at), resource, namespace)
            found = [obj for obj in objects if labels_match(obj) and fields_match(obj)]
            return Listed([seen(resource, obj) for obj in found], version)

    def watch(self, resource: Resource, namespace: str | None = None, since: str | None = None) -> Watch:
        """Returns a watch of what happens after version `since`; without it, of what is there and of what follows.

        Raises:
            ExpiredError: the history no longer reaches back to `since`.
        """
        with self._lock:
            watch = Watch(resource, namespace, clock=self._clock, leave=self._leave)
            self._shelf.attach(watch, since)
            return watch

    def compact(self) -> None:
        """Forgets all history: a watch from an older version than the newest is refused."""
        with self._lock:
            self._shelf.compact()

    # ------------------------------------------------------------------ writing

    def create(self, resource: Resource, obj: Mapping[str, Any]) -> Object:
        """Stores a new object and returns it. Without a name, one is made from `generateName`.

        Raises:
            AlreadyExistsError: the name is taken (a ConflictError).
            ConfigError: it has no name.
        """
        with self._lock:
            name, new = self._planned_create(resource, obj)
            stored = self._shelf.put(resource, name, new)
            self._garbage.created(resource, name)
            return seen(resource, stored)

    def plan_create(self, resource: Resource, obj: Mapping[str, Any]) -> Object:
        """Returns what `create` would store, or is refused as it would be, and stores nothing."""
        with self._lock:
            return seen(resource, self._planned_create(resource, obj)[1])

    def update(self, resource: Resource, obj: Mapping[str, Any], *, status: bool = False) -> Object:
        """Replaces an object, or with `status` its status alone; without `status`, its status is kept.

        What does not change anything makes no new version. The generation moves with all but metadata and status.
        The removal of the last finalizer removes an object that is being deleted.

        Raises:
            NotFoundError: it is not there.
            ConflictError: it has another version or uid than the one that `obj` names.
        """
        with self._lock:
            name, new = self._planned_update(resource, obj, status)
            self._replace(resource, name, new)
            return seen(resource, self._shelf.find(resource, name) if self._shelf.holds(resource, name) else new)

    def plan_update(self, resource: Resource, obj: Mapping[str, Any], *, status: bool = False) -> Object:
        """Returns what `update` would store, or is refused as it would be, and stores nothing."""
        with self._lock:
            return seen(resource, self._planned_update(resource, obj, status)[1])

    def mutate(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        change: Callable[[Object], None],
        *,
        status: bool = False,
    ) -> Object:
        """Reads an object, has it changed in place and writes it; again where somebody else wrote in between.

        Raises:
            NotFoundError: it is not there.
            ConflictError: others wrote in between a hundred times.
        """
        for tries in range(1, _MAX_TRIES + 1):
            obj = self.get(resource, namespace, name)
            change(obj)
            try:
                return self.update(resource, obj, status=status)
            except ConflictError:
                if tries == _MAX_TRIES:
                    raise
        raise AssertionError("unreachable")

    def delete(
        self,
        resource: Resource,
        namespace: str | None,
        name: str,
        *,
        grace_s: int | None = None,
        propagation: str = "Background",
        preconditions: Preconditions | None = None,
    ) -> Object:
        """Deletes an object, or marks it where a grace or a finalizer keeps it; returns its last state.

        A pod that is bound and has not ended keeps its grace: its own, or `grace_s`; a second delete may only
        shorten it. Who runs the pod deletes it again with a grace of 0 once its processes are gone.
        `propagation` says what becomes of dependents: Background, Foreground or Orphan.

        Raises:
            NotFoundError: it is not there.
            ConflictError: a precondition does not hold.
        """
        with self._lock:
            key = name_of(resource, namespace, name)
            old = self._shelf.find(resource, key)
            _check_preconditions(resource, old, preconditions or Preconditions())
            new = self._marked(resource, old, _grace_s(resource, old, grace_s), propagation)
            is_full = resource.storage == NAMESPACE.storage and self._garbage.is_full(name)
            if _is_held(new) or is_full:
                stored = self._shelf.put(resource, key, new) if new != old else old
                if is_full:
                    self._garbage.empty(name)
                else:
                    self._garbage.marked(resource, key)
            else:
                # A pod's end is told twice: its grace is over, then it is gone.
                last = self._shelf.put(resource, key, new) if resource.storage == POD.storage else old
                stored = self._remove(resource, key, last)
            return seen(resource, stored)

    def _leave(self, watch: Watch) -> None:
        with self._lock:
            self._shelf.detach(watch)

    # ------------------------------------------------------------------ within the lock

    def _admitted(self, resource: Resource, old: Object | None, new: Object) -> None:
        if self._admit is not None:
            self._admit(resource, copy.deepcopy(old), new)

    def _planned_create(self, resource: Resource, obj: Mapping[str, Any]) -> tuple[Name, Object]:
        new = untyped(obj)
        metadata = new.setdefault("metadata", {})
        for key in (*_SERVER_SIDE, "resourceVersion"):
            metadata.pop(key, None)
        namespace, name = name_of(resource, metadata.get("namespace"), metadata.get("name") or _generated(metadata))
        if self._shelf.holds(resource, (namespace, name)):
            raise AlreadyExistsError(f'{resource.qualified} "{name}" already exists')
        metadata |= {"name": name, "uid": str(uuid.uuid4()), "creationTimestamp": self.now()}
        metadata |= {"namespace": namespace} if namespace else {}
        metadata |= {"generation": 1} if resource.counts_generation else {}
        self._admitted(resource, None, new)
        return (namespace, name), new

    def _planned_update(self, resource: Resource, obj: Mapping[str, Any], status: bool) -> tuple[Name, Object]:
        new = untyped(obj)
        name = name_of(resource, new["metadata"].get("namespace"), new["metadata"]["name"])
        old = self._shelf.find(resource, name)
        _check_unchanged(resource, old, new)
        if status:
            new = {**copy.deepcopy(old), "status": new.get("status", {}), "metadata": _status_metadata(old, new)}
        else:
            _keep(old, new, resource)
        self._admitted(resource, old, new)
        if resource.counts_generation and _spec(resource, new) != _spec(resource, old):
            new["metadata"] = {**new["metadata"], "generation": old["metadata"]["generation"] + 1}
        new["metadata"]["resourceVersion"] = old["metadata"]["resourceVersion"]
        return name, new

    def _replace(self, resource: Resource, name: Name, new: Object) -> None:
        old = self._shelf.find(resource, name)
        new = {**new, "metadata": {**new["metadata"], "resourceVersion": old["metadata"]["resourceVersion"]}}
        if new == old:
            return
        if new["metadata"].get("deletionTimestamp") and not _is_held(new):
            self._remove(resource, name, old)  # watches see it with the finalizer whose removal ended it
            return
        self._shelf.put(resource, name, new)
        self._garbage.changed(old)

    def _remove(self, resource: Resource, name: Name, last: Object) -> Object:
        gone = self._shelf.remove(resource, name, last)
        self._garbage.removed(resource, name, gone)
        return gone

    def _delete_garbage(self, resource: Resource, name: Name, propagation: str) -> None:
        self.delete(resource, *name, propagation=propagation)

    def _marked(self, resource: Resource, obj: Object, grace_s: int, propagation: str) -> Object:
        """The object as it is while it is being deleted."""
        metadata = dict(obj["metadata"])
        finalizer = FINALIZERS.get(propagation)
        if finalizer and finalizer not in metadata.get("finalizers", []):
            metadata["finalizers"] = [*metadata.get("finalizers", []), finalizer]
        left_s = metadata.get("deletionGracePeriodSeconds")
        if left_s is None and "generation" in metadata:
            metadata["generation"] += 1
        if left_s is None or grace_s < left_s:
            metadata |= {"deletionTimestamp": self.now(grace_s), "deletionGracePeriodSeconds": grace_s}
        marked = {**obj, "metadata": metadata}
        return {**marked, "status": {"phase": "Terminating"}} if resource.storage == NAMESPACE.storage else marked


def _generated(metadata: Mapping[str, Any]) -> str:
    prefix = metadata.get("generateName")
    if not prefix:
        raise ConfigError("metadata: an object needs a name or a generateName; give one")
    return str(prefix) + "".join(secrets.choice(_GENERATED_LETTERS) for _ in range(5))


def _check_unchanged(resource: Resource, old: Object, new: Object) -> None:
    for key in ("resourceVersion", "uid"):
        expected = new["metadata"].get(key)
        if expected and expected != old["metadata"][key]:
            raise ConflictError(
                f'Operation cannot be fulfilled on {resource.qualified} "{old["metadata"]["name"]}": the object has'
                " been modified; please apply your changes to the latest version and try again"
            )


def _check_preconditions(resource: Resource, obj: Object, wanted: Preconditions) -> None:
    name, found = obj["metadata"]["name"], obj["metadata"]
    what = f'Operation cannot be fulfilled on {resource.kind} "{name}": the'
    if wanted.uid is not None and wanted.uid != found["uid"]:
        raise ConflictError(
            f"{what} UID in the precondition ({wanted.uid}) does not match the UID in record ({found['uid']})."
            " The object might have been deleted and then recreated"
        )
    if wanted.version is not None and wanted.version != found["resourceVersion"]:
        raise ConflictError(
            f"{what} ResourceVersion in the precondition ({wanted.version}) does not match the ResourceVersion in"
            f" record ({found['resourceVersion']}). The object might have been modified"
        )


def _keep(old: Object, new: Object, resource: Resource) -> None:
    """Gives a replacement what only the server sets, and the status where that is written apart."""
    for key in _SERVER_SIDE:
        new["metadata"].pop(key, None)
        if key in old["metadata"]:
            new["metadata"][key] = old["metadata"][key]
    if old["metadata"].get("namespace"):
        new["metadata"]["namespace"] = old["metadata"]["namespace"]
    if "status" in resource.subresources:
        new.pop("status", None)
        new |= {"status": old["status"]} if "status" in old else {}


def _status_metadata(old: Object, new: Object) -> dict[str, Any]:
    """An update of the status may change `managedFields`, nothing else of the metadata."""
    fields = new["metadata"].get("managedFields")
    return {**old["metadata"], **({"managedFields": fields} if fields else {})}


def _spec(resource: Resource, obj: Object) -> Object:
    """What moves the generation when it changes: all but metadata, status and the node that a pod is bound to."""
    counted = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind", "metadata", "status")}
    if resource.storage == POD.storage and "spec" in counted:
        counted["spec"] = {key: value for key, value in counted["spec"].items() if key != "nodeName"}
    return counted


def _grace_s(resource: Resource, obj: Object, asked_s: int | None) -> int:
    if resource.storage != POD.storage or not obj.get("spec", {}).get("nodeName"):
        return 0
    if obj.get("status", {}).get("phase") in _ENDED:
        return 0
    own_s = obj["spec"].get("terminationGracePeriodSeconds", _DEFAULT_GRACE_S)
    return int(own_s if asked_s is None else asked_s)


def _is_held(obj: Object) -> bool:
    """Whether a grace or a finalizer keeps an object that is being deleted."""
    return bool(obj["metadata"].get("finalizers") or obj["metadata"].get("deletionGracePeriodSeconds"))

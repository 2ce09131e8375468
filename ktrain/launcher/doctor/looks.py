"""Reads of a cluster, each made once however many checks ask for it. A refusal is remembered like an answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from ktrain.errors import ForbiddenError, KtrainError, NotFoundError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of
from ktrain.launcher.backends.kubernetes.discover import served
from ktrain.launcher.facts import ClusterFacts, server_version

_T = TypeVar("_T")
_NAMES_ALONE = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"


class Looks:
    """What is read of one cluster, seen from one namespace. Raises what `Client` raises, the same each time."""

    def __init__(self, client: Client, namespace: str) -> None:
        self.client = client
        self.namespace = namespace
        self._known: dict[str, Any] = {}

    def facts(self) -> ClusterFacts:
        """Version and served resources alone."""
        return self._once("facts", self._facts)

    def list(self, group: str, plural: str, *, inside: str | None = None, labels: str = "") -> tuple[Object, ...]:
        """All objects of a kind, in the version that is served; of one namespace, or of all.

        Raises:
            NotFoundError: the cluster does not serve it.
            ForbiddenError: it may not be listed.
        """
        version = self.version_of(group, plural)
        path = path_of(version, plural, inside)
        return self._once(f"{path}?{labels}", lambda: self.client.list(path, labels=labels).items)

    def get(self, path: str) -> Object:
        """One object. Raises NotFoundError, ForbiddenError."""
        return self._once(path, lambda: self.client.get(path))

    def name_of(self, path: str) -> str:
        """The name of an object of which nothing else is to be read: the contents of a Secret stay where they are."""
        found = self._once(path, lambda: self.client.get(path, accept=_NAMES_ALONE)["metadata"]["name"])
        return str(found)

    def version_of(self, group: str, plural: str) -> str:
        """`group/version` that serves the resource, `v1` for the core group. Raises NotFoundError."""
        if not group:
            return "v1"
        versions = self.facts().versions_of(group, plural)
        if versions is None:
            raise ForbiddenError("GET /apis: what is served may not be read")
        if not versions:
            raise NotFoundError(f"{plural}.{group} is not served")
        return f"{group}/{versions[-1] if 'v1' not in versions else 'v1'}"

    def _facts(self) -> ClusterFacts:
        try:
            version = server_version(self.client.get("/version"))
        except (ForbiddenError, NotFoundError):
            version = None
        return ClusterFacts(version=version, served=served(self.client))

    def _once(self, key: str, ask: Callable[[], _T]) -> _T:
        if key not in self._known:
            try:
                self._known[key] = ask()
            except KtrainError as error:
                self._known[key] = error
        found = self._known[key]
        if isinstance(found, KtrainError):
            raise found
        return found  # type: ignore[no-any-return]


def condition(obj: Object, kind: str) -> str | None:
    """The status of a condition: True, False or Unknown; None where the object has none of that type."""
    found = (obj.get("status") or {}).get("conditions") or ()
    return next((str(item.get("status")) for item in found if item.get("type") == kind), None)


def name_of(obj: Object) -> str:
    return str(obj["metadata"]["name"])

"""From a request to an answer: who asks, what for, whether it may, and who does it."""

from __future__ import annotations

from collections.abc import Callable

from ktrain.launcher.cluster.store import Store
from ktrain.testing.fake_cluster import channels, discovery, parts
from ktrain.testing.fake_cluster.access import Access, Ask
from ktrain.testing.fake_cluster.logs import LogReader
from ktrain.testing.fake_cluster.offer import ACCESS_REVIEW, RULES_REVIEW, Served
from ktrain.testing.fake_cluster.reads import Reads
from ktrain.testing.fake_cluster.requests import NOT_FOUND_PAGE, Request, Response, Target, parse_target
from ktrain.testing.fake_cluster.status import (
    Refusal,
    method_not_allowed,
    no_such_resource,
    not_acceptable,
)
from ktrain.testing.fake_cluster.writes import Writes

_TEXT = {"Content-Type": "text/plain; charset=utf-8"}
_HEALTH = ("/healthz", "/livez", "/readyz")
_OFFERED = (
    "application/json",
    "application/yaml",
    "application/vnd.kubernetes.protobuf",
    "application/json;stream=watch",
    "application/vnd.kubernetes.protobuf;stream=watch",
)
_CREATES_CHANNELS = 35  # the minor version from which a command in a pod needs the right to create one
_REVIEWS = (ACCESS_REVIEW, RULES_REVIEW)
_COLLECTION_VERBS = {"GET": "list", "POST": "create", "DELETE": "deletecollection"}
_OBJECT_VERBS = {"GET": "get", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


class Api:
    """Answers the requests of one cluster. Safe from any thread."""

    def __init__(
        self, store: Store, served: Callable[[], Served], access: Access, reads: Reads, logs: LogReader, address: str
    ) -> None:
        self.access = access
        self._store = store
        self._served = served
        self._reads = reads
        self._writes = Writes(store, served)
        self._logs = logs
        self._address = address

    def answer(self, request: Request, is_gone: Callable[[], bool]) -> Response:
        """Answers a request; `is_gone` tells whether its sender has gone, for answers that take long."""
        try:
            user = self.access.user(request.headers)
            creates = self._served().offer.minor >= _CREATES_CHANNELS
            channels_of = channels.admit(self._store, self.access, user, request, creates=creates)
            return channels_of or self._discovery(request) or self._objects(request, user, is_gone)
        except Refusal as refusal:
            return Response(refusal.code, refusal.body(), refusal.headers, warnings=refusal.warnings)

    def _discovery(self, request: Request) -> Response | None:
        """The answer of a path that names no objects; None for the others."""
        served, path = self._served(), request.path.rstrip("/")
        aggregates = "as=APIGroupDiscoveryList" in request.headers.get("Accept", "").replace(" ", "")
        if path in _HEALTH:
            return Response(200, "ok", _TEXT)
        if path == "/version":
            return Response(200, discovery.version(served.offer))
        if path == "/api" or path == "/apis":
            if aggregates:
                names = [""] if path == "/api" else served.groups()
                return Response(200, discovery.aggregated(served, names), {"Content-Type": discovery.AGGREGATED})
            return Response(
                200, discovery.legacy_versions(self._address) if path == "/api" else discovery.groups(served)
            )
        return self._group(served, path.split("/")[1:]) if path else _page()

    def _group(self, served: Served, names: list[str]) -> Response | None:
        if names[0] == "api" and len(names) == 2:
            return Response(200, discovery.resources(served, names[1])) if names[1] == "v1" else _page()
        if names[0] != "apis" or len(names) not in (2, 3):
            return None
        versions = served.versions(names[1])
        if not versions:
            return _page()
        if len(names) == 2:
            return Response(200, discovery.group(served, names[1]))
        if names[2] not in versions:
            raise no_such_resource()
        return Response(200, discovery.resources(served, f"{names[1]}/{names[2]}"))

    def _objects(self, request: Request, user: str, is_gone: Callable[[], bool]) -> Response:
        target = parse_target(self._served(), request.path)
        if target is None:
            return _page()
        verb = _verb(target, request)
        if target.resource in _REVIEWS:
            return parts.review(self.access, user, target, request)
        _check_accept(request)
        ask = Ask(verb, target.resource.group, target.what, target.namespace, target.name)
        self.access.check(user, ask, target.resource)
        if target.subresource not in (None, "status"):
            return self._part(target, request)
        return self._dispatch(verb, target, request, is_gone)

    def _part(self, target: Target, request: Request) -> Response:
        if target.subresource == "eviction" and request.method == "POST":
            return parts.evict(self._store, target, request)
        if target.subresource == "binding" and request.method == "POST":
            return parts.bind(self._store, target, request)
        if target.subresource == "log" and request.method == "GET":
            return parts.log(self._store, self._logs, target, request)
        raise method_not_allowed()

    def _dispatch(self, verb: str, target: Target, request: Request, is_gone: Callable[[], bool]) -> Response:
        if verb == "get":
            return self._reads.get(target)
        if verb == "list":
            return self._reads.list(target, request)
        if verb == "watch":
            return self._reads.watch(target, request, is_gone)
        writers = {
            "create": self._writes.create,
            "update": self._writes.replace,
            "patch": self._writes.patch,
            "delete": self._writes.delete,
            "deletecollection": self._writes.delete_collection,
        }
        return writers[verb](target, request)


def _page() -> Response:
    return Response(404, NOT_FOUND_PAGE, _TEXT)


def _verb(target: Target, request: Request) -> str:
    if target.subresource not in (None, "status"):
        return {"POST": "create", "GET": "get"}.get(request.method, request.method.lower())
    verbs = _OBJECT_VERBS if target.name is not None else _COLLECTION_VERBS
    verb = verbs.get(request.method)
    if verb is None or (target.subresource == "status" and verb == "delete"):
        raise method_not_allowed()
    if verb in ("create", "deletecollection") and target.resource.namespaced and target.namespace is None:
        raise method_not_allowed()
    is_watch = verb == "list" and request.query.get("watch") in ("true", "1")
    return "watch" if is_watch else verb


def _check_accept(request: Request) -> None:
    accepted = request.headers.get("Accept") or "*/*"
    if not any(kind in accepted for kind in ("*/*", "application/json", "application/*")):
        raise not_acceptable(_OFFERED)

"""Requests that read: one object, a list in pages, a watch."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ktrain.base.clock import Clock, Deadline
from ktrain.errors import ConfigError, NotFoundError
from ktrain.launcher.cluster import selectors
from ktrain.launcher.cluster.resources import EVENT, JOB, NAMESPACE, NODE, POD, SECRET, Resource
from ktrain.launcher.cluster.store import Event, ExpiredError, Store, Watch
from ktrain.launcher.cluster.watch import ADDED, DELETED, MODIFIED
from ktrain.testing.fake_cluster import bodies
from ktrain.testing.fake_cluster.requests import Request, Response, Target
from ktrain.testing.fake_cluster.status import FORBIDDEN, FieldError, Refusal, bad_request, invalid_options, not_found

Object = dict[str, Any]

BOOKMARK, ERROR = "BOOKMARK", "ERROR"
INITIAL_END = "k8s.io/initial-events-end"
_DEFAULT_WATCH_S = 3600.0
_LOOK_AGAIN_S = 0.5  # how long a quiet watch does not look whether its reader is still there
_COMMON_FIELDS = ("metadata.name", "metadata.namespace")
_FIELDS: Mapping[tuple[str, str], tuple[str, ...]] = {
    POD.storage: ("spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "status.phase", "status.podIP"),
    JOB.storage: ("status.successful",),
    NODE.storage: ("spec.unschedulable",),
    NAMESPACE.storage: ("status.phase", "name"),
    SECRET.storage: ("type",),
    EVENT.storage: (
        "involvedObject.kind",
        "involvedObject.namespace",
        "involvedObject.name",
        "involvedObject.uid",
        "involvedObject.apiVersion",
        "involvedObject.fieldPath",
        "reason",
        "source",
        "type",
    ),
}
_LOST_PAGE = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without"
    " the continue parameter, or use the continue token in this response to retrieve the remainder of the results."
    " Continuing with the provided token results in an inconsistent list - objects that were created, modified, or"
    " deleted between the time the first chunk was returned and now may show up in the list."
)


@dataclass(frozen=True, slots=True)
class _Page:
    """Where a list goes on: after a name, at a version; at the newest where it is 0."""

    version: str
    after: tuple[str, str]

    def token(self) -> str:
        text = json.dumps({"v": "meta.k8s.io/v1", "rv": int(self.version), "start": list(self.after)})
        return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")

    @classmethod
    def of(cls, token: str) -> _Page:
        text = b""
        try:
            text = base64.urlsafe_b64decode(token + "=" * (-len(token) % 4))
            found = json.loads(text)
            first, second = found["start"]
            return cls(str(found["rv"]), (first, second))
        except (ValueError, KeyError, TypeError) as error:
            why = f"invalid character '\\u{text[0]:04x}' looking for beginning of value" if text else str(error)
            raise bad_request(f"invalid continue token: continue key is not valid: {why}") from error


class Reads:
    """Answers the requests that read. Safe from any thread.

    `bookmark_s` is how often a watch that asked for bookmarks gets one.
    """

    def __init__(self, store: Store, clock: Clock, *, bookmark_s: float) -> None:
        self._store = store
        self._clock = clock
        self._bookmark_s = bookmark_s

    def get(self, target: Target) -> Response:
        assert target.name is not None
        try:
            return Response(200, self._store.get(target.resource, target.namespace, target.name))
        except NotFoundError as error:
            raise not_found(target.resource, target.name) from error

    def list(self, target: Target, request: Request) -> Response:
        query, resource = request.query, target.resource
        labels, fields = _selectors(resource, query)
        page = _Page.of(query["continue"]) if query.get("continue") else None
        at = self._version_of(query, page)
        try:
            found = self._store.list(resource, target.namespace, labels=labels, fields=fields, at=at)
        except ExpiredError as error:
            raise _expired(page) from error
        except ConfigError as error:
            raise bad_request(str(error)) from error
        items = [obj for obj in found.items if page is None or _key(obj) > page.after]
        limit = int(query.get("limit") or 0) or len(items)
        metadata: Object = {"resourceVersion": found.version}
        if len(items) > limit:
            metadata["continue"] = _Page(found.version, _key(items[limit - 1])).token()
            if not labels and not fields:
                metadata["remainingItemCount"] = len(items) - limit
        kind = {"kind": f"{resource.kind}List", "apiVersion": resource.api_version}
        shown = items[:limit] if resource.is_custom else [bodies.plain(obj) for obj in items[:limit]]
        return Response(200, {**kind, "metadata": metadata, "items": shown})

    def _version_of(self, query: Mapping[str, str], page: _Page | None) -> str | None:
        """The version that a list is read at; None for the newest."""
        version = query.get("resourceVersion") or "0"
        _check_version(version)
        if int(version) > int(self._store.version):
            what = f"Too large resource version: {version}, current: {self._store.version}"
            causes = [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}]
            details = {"causes": causes, "retryAfterSeconds": 1}
            raise Refusal(504, f"Timeout: {what}", "Timeout", details, {"Retry-After": "1"})
        if page is not None:
            return page.version if int(page.version) else None
        return version if query.get("resourceVersionMatch") == "Exact" else None

    def watch(self, target: Target, request: Request, is_gone: Callable[[], bool]) -> Response:
        """Answers with a stream that ends at `timeoutSeconds`, or soon after `is_gone` says so."""
        query, resource = request.query, target.resource
        labels, fields = _selectors(resource, query)
        version = query.get("resourceVersion") or "0"
        _check_version(version)
        sends_list = query.get("sendInitialEvents") in ("true", "1")
        if sends_list and query.get("resourceVersionMatch") != "NotOlderThan":
            why = "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan"
            raise invalid_options("ListOptions", FieldError(FORBIDDEN, "resourceVersionMatch", "", why))
        matches = _matches(labels, fields)
        try:
            since = None if int(version) == 0 or sends_list else version
            watch = self._store.watch(resource, target.namespace, since=since)
        except ExpiredError as error:
            return Response(200, stream=iter([_line(ERROR, Refusal(410, str(error), "Expired").body())]))
        stream = _Stream(resource, watch, matches, self._clock, is_gone)
        stream.sends_list_end = sends_list
        stream.bookmark_s = self._bookmark_s if query.get("allowWatchBookmarks") in ("true", "1") else None
        return Response(200, stream=stream.lines(float(query.get("timeoutSeconds") or _DEFAULT_WATCH_S)))


class _Stream:
    """The lines of one watch."""

    sends_list_end = False
    bookmark_s: float | None = None

    def __init__(
        self,
        resource: Resource,
        watch: Watch,
        matches: selectors.Matches,
        clock: Clock,
        is_gone: Callable[[], bool],
    ) -> None:
        self._resource = resource
        self._watch = watch
        self._matches = matches
        self._clock = clock
        self._is_gone = is_gone

    def lines(self, timeout_s: float) -> Iterator[bytes]:
        """Yields an event a line, and an empty piece now and then, so that the sender may look after its reader."""
        end = Deadline.after(timeout_s, self._clock)
        bookmark = Deadline.after(self.bookmark_s or timeout_s, self._clock)
        with self._watch:
            if self.sends_list_end:
                yield from self._initial()
            while not end.expired() and not self._is_gone() and not self._watch.closed:
                try:
                    event = self._watch.next(min(end.remaining_s(), bookmark.remaining_s(), _LOOK_AGAIN_S))
                except ExpiredError as error:
                    yield _line(ERROR, Refusal(410, str(error), "Expired").body())
                    return
                yield self._line_of(event) if event is not None else b""
                version = self._watch.bookmark()
                if self.bookmark_s is not None and bookmark.expired() and version is not None:
                    yield self._bookmark(version, {})
                    bookmark = Deadline.after(self.bookmark_s, self._clock)

    def _initial(self) -> Iterator[bytes]:
        """What was there when the watch was opened, and the bookmark that ends it."""
        started_at = self._watch.started_at
        event = self._watch.next(0)
        while event is not None and event.version <= started_at:
            yield self._line_of(event)
            event = self._watch.next(0)
        yield self._bookmark(started_at, {"annotations": {INITIAL_END: "true"}})
        if event is not None:
            yield self._line_of(event)

    def _line_of(self, event: Event) -> bytes:
        """The line of an event as the selectors show it: to leave a selector is to be deleted, to enter to be added."""
        is_in = self._matches(event.object)
        was_in = event.previous is not None and self._matches(event.previous)
        if event.type == DELETED:
            return _line(DELETED, event.object) if was_in or is_in else b""
        if was_in and not is_in:
            assert event.previous is not None
            metadata = {**event.previous["metadata"], "resourceVersion": str(event.version)}
            return _line(DELETED, {**event.previous, "metadata": metadata})
        if not is_in:
            return b""
        return _line(MODIFIED if was_in else ADDED, event.object)

    def _bookmark(self, version: int, metadata: Object) -> bytes:
        kind = {"kind": self._resource.kind, "apiVersion": self._resource.api_version}
        return _line(BOOKMARK, {**kind, "metadata": {"resourceVersion": str(version), **metadata}})


def _line(kind: str, obj: Object) -> bytes:
    return json.dumps({"type": kind, "object": obj}, separators=(",", ":")).encode() + b"\n"


def _matches(labels: str | None, fields: str | None) -> selectors.Matches:
    try:
        by_labels, by_fields = selectors.labels_match(labels), selectors.fields_match(fields)
    except ConfigError as error:
        raise bad_request(str(error)) from error
    return lambda obj: by_labels(obj) and by_fields(obj)


def _selectors(resource: Resource, query: Mapping[str, str]) -> tuple[str | None, str | None]:
    fields = query.get("fieldSelector")
    known = (*_COMMON_FIELDS, *_FIELDS.get(resource.storage, ()))
    try:
        unknown = [path for path, _, _ in selectors.field_terms(fields) if path not in known]
    except ConfigError as error:
        raise bad_request(str(error)) from error
    if unknown:
        listed = ", ".join(json.dumps(path) for path in _COMMON_FIELDS)
        if resource.storage in _FIELDS:
            raise bad_request(f"field label not supported: {unknown[0]}")
        raise bad_request(f'"{unknown[0]}" is not a known field selector: only {listed}')
    return query.get("labelSelector"), fields


def _check_version(version: str) -> None:
    if not version.isdigit():
        why = f'strconv.ParseUint: parsing "{version}": invalid syntax'
        raise Refusal(500, f'resourceVersion: Invalid value: "{version}": {why}')


def _key(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("namespace") or "", obj["metadata"]["name"]


def _expired(page: _Page | None) -> Refusal:
    if page is None:
        return Refusal(410, "The resourceVersion for the provided list is too old.", "Expired")
    return Refusal(410, _LOST_PAGE, "Expired", metadata={"continue": _Page("0", page.after).token()})

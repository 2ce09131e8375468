"""Requests to an API server: plain dicts, every call with a deadline, the retries of all calls under one budget."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode

from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.retry import BusyError, Retries, RetryBudget
from ktrain.errors import NotFoundError
from ktrain.launcher.backends.kubernetes.connect import Channels, Door, Reply, Words
from ktrain.launcher.backends.kubernetes.refusals import ExpiredError, refusal

Object = dict[str, Any]
Query = Mapping[str, str]

CALL_S = 60.0  # for one call with its retries
_TRIES = 6
_PAGE = 500
_SILENCE_S = 90.0  # of a stream; watches get a bookmark about once a minute
_MERGE = "application/merge-patch+json"


@dataclass(frozen=True, slots=True)
class Listed:
    """Objects as they were at a version, from which a watch goes on."""

    items: tuple[Object, ...]
    version: str


@dataclass(frozen=True, slots=True)
class Change:
    """One event of a watch."""

    kind: str  # ADDED, MODIFIED, DELETED, BOOKMARK
    obj: Object


def path_of(api_version: str, plural: str, namespace: str | None = None, name: str | None = None) -> str:
    """The path of a resource, of a namespace's or of all where it is None, or of one object."""
    root = f"/apis/{api_version}" if "/" in api_version else f"/api/{api_version}"
    within = "" if namespace is None else f"/namespaces/{quote(namespace)}"
    return f"{root}{within}/{plural}" + ("" if name is None else f"/{quote(name)}")


class Client:
    """Calls by verb. Safe from any thread.

    All calls raise BusyError or UnavailableError (nothing is known), ForbiddenError, and what their Raises adds.
    """

    def __init__(self, door: Door, *, clock: Clock = SYSTEM_CLOCK, call_s: float = CALL_S) -> None:
        self.clock = clock
        self._door = door
        self._call_s = call_s
        self._retries = Retries(RetryBudget(), max_tries=_TRIES, clock=clock)

    def get(self, path: str, *, accept: str = "application/json") -> Object:
        """One object or document. Raises NotFoundError."""
        return self._call("GET", path, accept=accept)

    def try_get(self, path: str) -> Object | None:
        """One object, None where it is surely absent."""
        try:
            return self.get(path)
        except NotFoundError:
            return None

    def list(self, path: str, *, labels: str = "", fields: str = "") -> Listed:
        """All objects that match both selectors, however many pages they fill. Raises NotFoundError: no such kind."""
        query = {"limit": str(_PAGE), "labelSelector": labels, "fieldSelector": fields}
        try:
            return self._pages(path, query)
        except ExpiredError:  # the list took longer than the server remembers: once more, in one answer
            return self._pages(path, {**query, "limit": "0"})

    def create(self, path: str, obj: Object, *, dry_run: bool = False, validation: str = "Strict") -> Object:
        """Creates an object; returns it as it is stored, or would be.

        Raises:
            RejectedError: it is not valid there.
            AlreadyExistsError: the name is taken; after a lost answer perhaps by this very call.
        """
        query = {"fieldValidation": validation, **({"dryRun": "All"} if dry_run else {})}
        return self._call("POST", path, query, obj)

    def patch(self, path: str, change: Object) -> Object:
        """Merges a change into an object. Raises NotFoundError, ConflictError, RejectedError."""
        return self._call("PATCH", path, {}, change, content=_MERGE)

    def delete(self, path: str, uid: str, *, propagation: str = "Background", version: str | None = None) -> bool:
        """Deletes that very object; false where it is gone, or another one has its name.

        Raises:
            ConflictError: it is no longer as it was at `version`.
        """
        options = {"kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": propagation}
        now = self.try_get(path)
        if now is None or now["metadata"]["uid"] != uid:
            return False
        seen = {"uid": uid} if version is None else {"uid": uid, "resourceVersion": version}
        try:
            self._call("DELETE", path, {}, {**options, "preconditions": seen})
        except NotFoundError:
            return False
        return True

    def watch(
        self, path: str, since: str, *, deadline: Deadline, labels: str = "", fields: str = ""
    ) -> Iterator[Change]:
        """Changes after a version, until the server or the deadline ends the watch.

        Raises:
            ExpiredError: the version is too old; list again.
        """
        query = {
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": since,
            "labelSelector": labels,
            "fieldSelector": fields,
            "timeoutSeconds": str(max(1, int(deadline.remaining_s()))),
        }
        for line in self.lines(path, query, deadline=deadline):
            event = json.loads(line)
            if event["type"] == "ERROR":
                raise refusal(int(event["object"].get("code", 0)), {}, json.dumps(event["object"]).encode(), what=path)
            yield Change(event["type"], event["object"])

    def lines(self, path: str, query: Query, *, deadline: Deadline) -> Iterator[bytes]:
        """Lines as they come, each with its line feed but perhaps the last, until the server or the deadline ends them.

        Raises:
            BusyError: the stream broke; what came before was whole.
        """
        reply = self._retries.run(lambda: self._open("GET", path, query, deadline), deadline=deadline)
        rest = b""
        with contextlib.closing(reply):
            for piece in reply.pieces():
                *whole, rest = (rest + piece).split(b"\n")
                yield from (line + b"\n" for line in whole)
                if deadline.expired():
                    return
        if rest:
            yield rest

    def attach(self, path: str, query: Words) -> Channels:
        """Channels to a command or a port. Never asked twice: it may run. Raises NotFoundError, RejectedError."""
        return self._door.attach(path, query, self._call_s)

    def _pages(self, path: str, query: Query) -> Listed:
        items: list[Object] = []
        more: Query = query
        while True:
            page = self._call("GET", path, more)
            items += page.get("items") or ()
            about = page.get("metadata") or {}
            if not about.get("continue"):
                return Listed(tuple(items), str(about.get("resourceVersion", "")))
            more = {**query, "continue": about["continue"]}

    def _call(
        self,
        method: str,
        path: str,
        query: Query | None = None,
        body: Object | None = None,
        *,
        accept: str = "application/json",
        content: str = "application/json",
    ) -> Object:
        deadline = Deadline.after(self._call_s, self.clock)
        headers = {"Accept": accept, **({} if body is None else {"Content-Type": content})}
        data = None if body is None else json.dumps(body).encode()

        def ask() -> Object:
            with contextlib.closing(self._open(method, path, query or {}, deadline, headers, data)) as reply:
                text = reply.read()
            try:
                value = json.loads(text)
            except ValueError as error:
                raise BusyError(f"{method} {path}: the answer is no JSON: {text[:80]!r}") from error
            return dict(value)

        return self._retries.run(ask, deadline=deadline)

    def _open(
        self,
        method: str,
        path: str,
        query: Query,
        deadline: Deadline,
        headers: Mapping[str, str] | None = None,
        data: bytes | None = None,
    ) -> Reply:
        words = urlencode({key: value for key, value in query.items() if value})
        address = f"{path}?{words}" if words else path
        timeout_s = max(1.0, min(_SILENCE_S, deadline.remaining_s()))
        reply = self._door.send(method, address, headers or {}, data, timeout_s)
        if reply.status < 300:
            return reply
        with contextlib.closing(reply):
            what = f"{method} {path}"
            raise refusal(reply.status, reply.headers, reply.read(), what=what, secret="/secrets" in path)

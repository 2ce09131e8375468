"""What happened to the objects of a store, in order, and those who follow it."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from ktrain.base.clock import Clock, Deadline
from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.resources import Resource, seen

ADDED = "ADDED"
MODIFIED = "MODIFIED"
DELETED = "DELETED"

MAX_WAITING = 100_000


class ExpiredError(NotFoundError):
    """The version is older than the history that is kept: list again and watch from there."""


@dataclass(frozen=True, slots=True)
class Event:
    """One change of one object; `previous` is the object before it, None where it was not there.

    `object` of a DELETED event is the last state, under the version of the deletion.
    """

    type: str
    object: dict[str, Any]
    previous: dict[str, Any] | None
    version: int


@dataclass(frozen=True, slots=True)
class Change:
    """An event with the kind (group, plural) and the namespace that it happened in."""

    storage: tuple[str, str]
    namespace: str | None
    event: Event


class History:
    """The newest changes of a store, at most `size` of them. Guarded by the owner's lock."""

    def __init__(self, size: int) -> None:
        self._changes: deque[Change] = deque(maxlen=size)
        self.forgotten = 0  # the newest version that a watch can no longer start from

    def append(self, change: Change) -> None:
        if len(self._changes) == self._changes.maxlen:
            self.forgotten = self._changes[0].event.version
        self._changes.append(change)

    def compact(self, version: int) -> None:
        """Forgets what happened up to and at the version."""
        while self._changes and self._changes[0].event.version <= version:
            self._changes.popleft()
        self.forgotten = max(self.forgotten, version)

    def after(self, version: int) -> Iterable[Change]:
        """The changes after a version, oldest first.

        Raises:
            ExpiredError: some of them are forgotten.
        """
        if version < self.forgotten:
            raise ExpiredError(f"too old resource version: {version} ({self.forgotten + 1})")
        return [change for change in self._changes if change.event.version > version]


class Watch:
    """The events of one kind, in the order in which they happened. One thread reads it, any may close it.

    A reader that falls `MAX_WAITING` events behind loses its place, as it would on an API server.
    """

    def __init__(
        self, resource: Resource, namespace: str | None, *, clock: Clock, leave: Callable[[Watch], None]
    ) -> None:
        self.resource = resource
        self._namespace = namespace
        self.started_at = 0  # the version at which it was opened; what is older was there before
        self._clock = clock
        self._leave = leave
        self._lock = threading.Lock()
        self._events: deque[Event] = deque()  # guarded by _lock
        self._version = 0  # guarded by _lock: what was offered and is not in _events was read
        self._closed = False  # guarded by _lock
        self._overrun = False  # guarded by _lock
        self._changed = threading.Event()

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def closed(self) -> bool:
        return self._closed

    def next(self, timeout_s: float) -> Event | None:
        """Returns the next event; None where there is none within the time, or the watch is closed.

        The objects of the event belong to the caller.

        Raises:
            ExpiredError: the reader fell too far behind; list again and watch from there.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        while True:
            with self._lock:
                if self._events:
                    return self._seen(self._events.popleft())
                if self._overrun:
                    raise ExpiredError(f"watch: more than {MAX_WAITING} events were waiting to be read")
                if self._closed or deadline.expired():
                    return None
                self._changed.clear()
            self._clock.wait(self._changed, deadline.remaining_s())

    def bookmark(self) -> int | None:
        """The version up to which all was read; None while events are waiting."""
        with self._lock:
            return None if self._events else self._version

    def close(self) -> None:
        """Ends the watch and wakes its reader. May be called again."""
        with self._lock:
            self._closed = True
            self._changed.set()
        self._leave(self)

    def offer(self, change: Change) -> None:
        """Takes note of a change of the store; called in the order of the changes."""
        with self._lock:
            self._version = max(self._version, change.event.version)
            if change.storage == self.resource.storage and self._namespace in (None, change.namespace):
                self._take(change.event)
                self._changed.set()

    def _seen(self, event: Event) -> Event:
        previous = event.previous and seen(self.resource, event.previous)
        return replace(event, object=seen(self.resource, event.object), previous=previous)

    def _take(self, event: Event) -> None:
        self._overrun = self._overrun or len(self._events) == MAX_WAITING
        if self._overrun:
            self._events.clear()
        else:
            self._events.append(event)

    def start(self, version: int) -> None:
        """Says that it was offered everything up to this version, at which it is opened."""
        with self._lock:
            self.started_at = version
            self._version = max(self._version, version)

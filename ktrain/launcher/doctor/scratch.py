"""A namespace of our own for a test, and its removal whatever happens.

What it may never do: leave something behind without naming it; wait without an end; delete what it did not make.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

from ktrain.base import ids
from ktrain.base.clock import Deadline
from ktrain.errors import KtrainError
from ktrain.launcher.backends.kubernetes.client import Client, Object, path_of

PREFIX = "ktrain-doctor-"
MARKS = {"app.kubernetes.io/managed-by": "ktrain", "app.kubernetes.io/name": "ktrain-doctor"}
_POLL_S = 0.5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True)
class Left:
    """What could not be removed, and how it is by hand."""

    what: str
    why: str
    command: str

    def __str__(self) -> str:
        return f"{self.what}: {self.why}"


class Scratch:
    """A throw-away namespace. `open`, `create` in it, then `clear`, which may be called again."""

    def __init__(self, client: Client) -> None:
        self.client = client
        self.name = f"{PREFIX}{ids.random_id(4)}"
        self._made: list[tuple[str, Object]] = []  # path of each object, the namespace first

    def open(self) -> None:
        """Makes the namespace. Raises ForbiddenError, UnavailableError (then `clear` looks whether it was made)."""
        space: Object = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.name, "labels": MARKS}}
        self._create(path_of("v1", "namespaces"), space)

    def create(self, plural: str, obj: Object) -> Object:
        """Creates an object in the namespace; remembered before it is sent, since an answer may be lost."""
        return self._create(path_of(obj["apiVersion"], plural, self.name), obj)

    def path(self, api_version: str, plural: str, name: str | None = None) -> str:
        return path_of(api_version, plural, self.name, name)

    def remove(self, plural: str, obj: Object, deadline: Deadline) -> None:
        """Removes an object and waits until it and its pods are gone; what is late is left to `clear`."""
        path = self.path(obj["apiVersion"], plural, obj["metadata"]["name"])
        self._delete(path)
        while not deadline.expired():
            gone = self.client.try_get(path) is None
            if gone and not self.client.list(self.path("v1", "pods")).items:
                return
            self.client.clock.sleep(_POLL_S)

    def clear(self, deadline: Deadline) -> list[Left]:
        """Removes everything, the last made first, and waits until it is gone; returns what is not."""
        left = [each for path, obj in reversed(self._made) if (each := self._try_delete(path, obj)) is not None]
        if left or not self._made:
            return left
        path = path_of("v1", "namespaces", None, self.name)
        while True:
            try:
                if self.client.try_get(path) is None:
                    self._made.clear()
                    return []
            except KtrainError as error:
                return [self._left_whole(f"it may be there still: {error}")]
            if deadline.expired():
                return [self._left_whole(f"still terminating after {deadline.total_s:g} s")]
            self.client.clock.sleep(_POLL_S)

    def _create(self, collection: str, obj: Object) -> Object:
        self._made.append((f"{collection}/{obj['metadata']['name']}", obj))
        return self.client.create(collection, obj)

    def _try_delete(self, path: str, obj: Object) -> Left | None:
        try:
            self._delete(path)
        except KtrainError as error:
            if obj["kind"] == "Namespace":
                return self._left_whole(str(error))
            kind, name = obj["kind"].lower(), obj["metadata"]["name"]
            return Left(f"{kind} {name}", str(error), f"kubectl --namespace {self.name} delete {kind}/{name}")
        return None

    def _left_whole(self, why: str) -> Left:
        return Left(f"namespace {self.name}", why, f"kubectl delete namespace/{self.name}")

    def _delete(self, path: str) -> None:
        """By name and uid; all names here lie in our own namespace, or bear its random part."""
        there = self.client.try_get(path)
        if there is not None and not there["metadata"].get("deletionTimestamp"):
            self.client.delete(path, there["metadata"]["uid"])


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, the first signal to end raises KeyboardInterrupt and later ones are ignored: cleaning up goes on.

    Only the main thread gets signals; on another one this changes nothing.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        _set(signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled(stop):
        yield


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Within, signals to end are ignored; what is done within must have a deadline."""
    with _handled(signal.SIG_IGN):
        yield


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    _set(handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def _set(handler: Callable[[int, FrameType | None], None] | signal.Handlers) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)

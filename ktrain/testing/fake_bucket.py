"""A bucket in this process's memory: a tier without files, network and threads."""

from __future__ import annotations

import threading

from ktrain.abc.tier import Buffer, Stored, check_name, check_prefix
from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, ConflictError, CorruptionError, NotFoundError, UnavailableError


class FakeBucket:
    """Objects in a dictionary. Several owners may share one, as the ranks of a job share a bucket.

    `objects` is the truth behind the calls: a test may look at it and change it. Faults are added around
    it by `FaultyTier`. It takes no time; only a deadline that is already over is noticed.
    """

    shows_whole = True

    def __init__(
        self,
        *,
        kind: str = "bucket",
        url: str = "fake://bucket/run",
        supports_create: bool = True,
        capacity_nbytes: int | None = None,
    ) -> None:
        self.kind = kind
        self.url = url
        self.supports_create = supports_create
        self.objects: dict[str, bytes] = {}  # guarded by _lock while the tier's calls use it
        self._capacity_nbytes = capacity_nbytes
        self._closed = False
        self._lock = threading.Lock()

    def write(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        what = self._start("write", check_name(name), deadline)
        with self._lock:
            self._put(what, name, bytes(data))

    def create(self, name: str, data: Buffer, *, deadline: Deadline) -> None:
        what = self._start("create", check_name(name), deadline)
        with self._lock:
            if name in self.objects:
                raise ConflictError(f"{what}: the object is there already")
            self._put(what, name, bytes(data))

    def read(self, name: str, *, deadline: Deadline) -> bytes:
        what = self._start("read", check_name(name), deadline)
        with self._lock:
            return self._get(what, name)

    def read_range(self, name: str, begin: int, end: int, *, deadline: Deadline) -> bytes:
        what = self._start(f"read [{begin}, {end}) of", check_name(name), deadline)
        if begin == end:
            return b""
        with self._lock:
            data = self._get(what, name)
        if end > len(data):
            raise CorruptionError(f"{what}: expected {end} bytes or more, found {len(data)} bytes; try another copy")
        return data[begin:end]

    def list(self, prefix: str, *, deadline: Deadline) -> list[Stored]:
        prefix = check_prefix(prefix)
        self._start("list", prefix, deadline)
        below = f"{prefix}/" if prefix else ""
        with self._lock:
            return [Stored(name, len(data)) for name, data in sorted(self.objects.items()) if name.startswith(below)]

    def delete(self, name: str, *, deadline: Deadline) -> None:
        self._start("delete", check_name(name), deadline)
        with self._lock:
            self.objects.pop(name, None)

    def close(self) -> None:
        self._closed = True

    def _start(self, verb: str, name: str, deadline: Deadline) -> str:
        what = f"{self.kind} tier {self.url}: {verb} {name}"
        deadline.check(what)
        if self._closed:
            raise UnavailableError(f"{what}: the tier is closed")
        return what

    def _get(self, what: str, name: str) -> bytes:
        try:
            return self.objects[name]
        except KeyError:
            raise NotFoundError(f"{what}: there is no such object") from None

    def _put(self, what: str, name: str, data: bytes) -> None:
        used = sum(len(other) for key, other in self.objects.items() if key != name)
        if self._capacity_nbytes is not None and used + len(data) > self._capacity_nbytes:
            raise CapacityError(
                f"{what}: expected space for {len(data)} bytes, found {self._capacity_nbytes - used} bytes free"
            )
        self.objects[name] = data

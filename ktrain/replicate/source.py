"""The sending side of a pull: serves the sealed snapshots of one node's volume, whatever the wire.

Invariant: nothing but sealed slots of that volume can be read, and a slot stays leased while it is read.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Any

from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.errors import NotFoundError
from ktrain.format.manifest import Identity
from ktrain.snapshot.arena import NodeVolume, SlotReader

LEASE_S = 30.0  # silence of a puller after which it counts as gone and its slot may be overwritten


@dataclass(slots=True)
class _Lease:
    reader: SlotReader
    used_at_s: float


class VolumeSource:
    """Hands out ranges of sealed snapshots under leases. Safe from any thread."""

    def __init__(self, volume: NodeVolume, *, lease_s: float = LEASE_S, clock: Clock = SYSTEM_CLOCK) -> None:
        self._volume = volume
        self._lease_s = lease_s
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}  # guarded by _lock
        self._closed = threading.Event()
        self._janitor = threading.Thread(target=self._expire_forever, name="ktrain-leases", daemon=True)
        self._janitor.start()

    def open(self, rank: int, identity: dict[str, Any]) -> tuple[str, bytes]:
        """Leases a snapshot; returns the lease's handle and the manifest's bytes.

        Raises:
            NotFoundError: this node holds no such sealed snapshot.
        """
        handle, reader = self._lease(rank, identity)
        return handle, reader.manifest.to_bytes()

    def lease(self, rank: int, identity: dict[str, Any]) -> str:
        """Leases a snapshot for a reader that has a manifest of it; see `open`."""
        return self._lease(rank, identity)[0]

    def _lease(self, rank: int, identity: dict[str, Any]) -> tuple[str, SlotReader]:
        reader = self._volume.open(rank, Identity.from_json(identity))
        handle = ids.random_id()
        with self._lock:
            self._leases[handle] = _Lease(reader, self._clock.monotonic())
        return handle, reader

    def read(self, handle: str, begin: int, end: int) -> memoryview:
        """Read-only bytes `[begin, end)` of the payload; valid until the lease ends.

        Raises:
            NotFoundError: the lease has ended.
        """
        with self._lock:
            lease = self._leases.get(handle)
            if lease is None:
                raise NotFoundError(
                    f"pull: lease {handle} has ended (after {self._lease_s:g} s of silence); pull again"
                )
            lease.used_at_s = self._clock.monotonic()
            return lease.reader.memory[begin:end]

    def release(self, handle: str) -> None:
        """Ends a lease; one that has ended already is fine."""
        with self._lock:
            lease = self._leases.pop(handle, None)
        if lease is not None:
            lease.reader.close()

    def expire(self) -> int:
        """Ends the leases of silent pullers; returns how many."""
        now = self._clock.monotonic()
        with self._lock:
            gone = [handle for handle, lease in self._leases.items() if now - lease.used_at_s > self._lease_s]
            readers = [self._leases.pop(handle).reader for handle in gone]
        for reader in readers:
            reader.close()
        return len(readers)

    def close(self) -> None:
        """Ends all leases. May be called again."""
        self._closed.set()
        self._janitor.join(5.0)
        with self._lock:
            readers = [lease.reader for lease in self._leases.values()]
            self._leases.clear()
        for reader in readers:
            reader.close()

    def _expire_forever(self) -> None:
        while not self._clock.wait(self._closed, self._lease_s / 4):
            self.expire()

"""Snapshots of all ranks in this process's memory, as a SnapshotSource."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ktrain.base.clock import Deadline
from ktrain.errors import InternalError
from ktrain.format.manifest import Manifest, verify_payload


class MemorySource:
    """Payloads by saved rank. Refuses views of bytes that were not fetched, as a real source would."""

    def __init__(self, snapshots: Mapping[int, tuple[Manifest, bytes | bytearray]]) -> None:
        self._snapshots = snapshots
        self._fetched: dict[int, list[tuple[int, int]]] = {}
        self.is_closed = False

    @property
    def manifests(self) -> Mapping[int, Manifest]:
        return {rank: manifest for rank, (manifest, _) in self._snapshots.items()}

    def fetch(self, ranges: Mapping[int, Sequence[tuple[int, int]]], *, deadline: Deadline) -> None:
        for rank, wanted in ranges.items():
            manifest, payload = self._snapshots[rank]
            for begin, end in wanted:
                deadline.check("fetch")
                verify_payload(manifest, payload, begin, end)
                self._fetched.setdefault(rank, []).append((begin, end))

    def view(self, rank: int, begin: int, end: int) -> memoryview:
        if self.is_closed or not any(a <= begin and end <= b for a, b in self._fetched.get(rank, [])):
            raise InternalError(f"view of bytes {begin} to {end} of rank {rank}, which were not fetched or are closed")
        return memoryview(self._snapshots[rank][1])[begin:end].toreadonly()

    def close(self) -> None:
        self.is_closed = True

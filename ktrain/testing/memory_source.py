"""Snapshots of all ranks in this process's memory, as a SnapshotSource."""

from __future__ import annotations

import array
from collections.abc import Mapping, Sequence

from ktrain import native
from ktrain.base.clock import Deadline
from ktrain.errors import CorruptionError, InternalError
from ktrain.format.manifest import Manifest, verify_payload
from ktrain.native import Runs


class MemorySource:
    """Payloads by saved rank. Refuses views of bytes that were not fetched, as a real source would."""

    def __init__(self, snapshots: Mapping[int, tuple[Manifest, bytes | bytearray]]) -> None:
        self._snapshots = snapshots
        self._fetched: dict[int, list[tuple[int, int]]] = {}
        self.is_closed = False

    @property
    def manifests(self) -> Mapping[int, Manifest]:
        return {rank: manifest for rank, (manifest, _) in self._snapshots.items()}

    def fetch(
        self,
        ranges: Mapping[int, Sequence[tuple[int, int]]],
        *,
        into: Mapping[int, Runs] | None = None,
        deadline: Deadline,
    ) -> None:
        for rank, runs in (into or {}).items():
            manifest, payload = self._snapshots[rank]
            deadline.check("fetch")
            expected = array.array("Q", manifest.chunks)
            bad = native.prove_scatter(payload, runs, begin=0, chunk_nbytes=manifest.chunk_nbytes, expected=expected)
            if bad:
                raise CorruptionError(f"rank {rank}: chunks {bad[:5]} do not match their digests")
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

"""Copies of DCP saves in this machine's memory volume. They only make loads fast: what exists is what the run says.

Invariant: a copy is read only where its manifest is the one that a commit record names, and every chunk is proven
again.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

from ktrain.base import contract, settings
from ktrain.errors import KtrainError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.record import CommitRecord
from ktrain.snapshot.arena import NodeVolume, SlotReader, list_volumes

_LOG = logging.getLogger(__name__)


def keep_copy(url: str, manifest: Manifest, payload: memoryview, *, num_kept: int) -> bool:
    """Copies a rank's share into this node's volume; false where it could not be, which never stops a save.

    Args:
        num_kept: shares of the rank that stay there; one more while it is written.
    """
    identity, rank = manifest.identity, manifest.rank
    node = settings.worker_settings().node or contract.node_name(settings.worker_settings().node_index)
    try:
        with NodeVolume(settings.volume_root(), node=node, run=identity.run, uri=url) as volume:
            slot = volume.acquire(rank, manifest.nbytes, protect=(), limit=num_kept + 1)
            if slot is None:
                _LOG.warning("step %d, rank %d: no slot is free in %s", identity.step, rank, volume.path)
                return False
            with slot:
                slot.memory[:] = payload
                slot.seal(manifest)
    except (KtrainError, OSError) as error:
        _LOG.warning("step %d, rank %d: no copy is kept in memory: %s", identity.step, rank, error)
        return False
    return True


class NearCopies:
    """The shares of one committed checkpoint that lie on this machine, under lease until `close`."""

    def __init__(self, commit: CommitRecord) -> None:
        self._identity = commit.identity
        self._readers: dict[int, tuple[str, SlotReader]] = {}
        wanted = {files.rank: files.manifest_digest for files in commit.ranks}
        root = settings.volume_root()
        try:
            found = [info for info in list_volumes(root) if info.run == commit.identity.run]
        except (KtrainError, OSError) as error:
            _LOG.warning("the memory volume %s cannot be read: %s", root, error)
            return
        for info in found:
            ranks = [held.rank for held in info.held if held.identity == commit.identity]
            self._open(info.node, [rank for rank in ranks if rank not in self._readers], wanted)

    def _open(self, node: str, ranks: list[int], wanted: Mapping[int, str]) -> None:
        if not ranks:
            return
        try:
            with NodeVolume(settings.volume_root(), node=node, run=self._identity.run) as volume:
                for rank in ranks:
                    slot = volume.open(rank, self._identity)
                    if slot.manifest.digest() == wanted.get(rank):
                        self._readers[rank] = (node, slot)
                    else:
                        slot.close()  # of a save that was not committed
        except (KtrainError, OSError) as error:
            _LOG.info("copies of %s in the memory of %s: %s", self._identity, node, error)

    def memory(self) -> dict[int, memoryview]:
        """The payloads that are here, by rank: read-only, and not proven yet."""
        return {rank: slot.memory for rank, (_, slot) in self._readers.items()}

    def refuse(self, rank: int, reason: str) -> None:
        """A copy was proven bad: it is not offered any more, to nobody."""
        node, slot = self._readers.pop(rank)
        _LOG.warning("%s, rank %d in the memory of %s: %s; reading the run's own", self._identity, rank, node, reason)
        slot.close()
        _discard(node, rank, self._identity, reason)

    def close(self) -> None:
        """Ends the leases, once no view is left. May be called again."""
        for _, slot in self._readers.values():
            slot.close()
        self._readers = {}


def _discard(node: str, rank: int, identity: Identity, reason: str) -> None:
    try:
        with NodeVolume(settings.volume_root(), node=node, run=identity.run) as volume:
            volume.discard(rank, identity, reason)
    except (KtrainError, OSError) as error:
        _LOG.warning("a bad copy stays in the memory of %s: %s", node, error)

"""Copies beside shares in a node's volume: what the node holds of other ranks' shares, for its own ranks alone.

Invariant: copies are an extra (ADR 0015). They are found only beside a sealed share of the same rank and snapshot, and
no inventory, commit or peer ever counts them.
"""

from __future__ import annotations

import os

from ktrain.errors import CorruptionError, NotFoundError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import copies_begin
from ktrain.snapshot.inventory import Inventory
from ktrain.snapshot.slots import SlotReader, read_copies, translated


class VolumeCopies:
    """The copies in one node's volume. Safe from any thread."""

    def __init__(self, inventory: Inventory) -> None:
        self._inventory = inventory

    def ranks(self) -> list[int]:
        """The ranks with copies beside their shares, of whichever snapshot."""
        return self._inventory.ranks_with_copies()

    def find(self, identity: Identity) -> tuple[dict[int, Manifest], dict[int, str]]:
        """Manifests of the copies beside shares of a snapshot, by rank; and by rank why some cannot be used."""
        found: dict[int, Manifest] = {}
        damaged: dict[int, str] = {}
        for rank in self.ranks():
            try:
                with self.open(rank, identity) as reader:
                    found[rank] = reader.manifest
            except NotFoundError:
                continue
            except CorruptionError as error:
                damaged[rank] = str(error)
        return found, damaged

    def open(self, rank: int, identity: Identity) -> SlotReader:
        """The copies beside a rank's share, for reading, under the lease of the slot.

        Raises:
            NotFoundError: no sealed slot here has copies of it.
            CorruptionError: what there is, is damaged.
        """
        what = f"copies of rank {rank}, {identity} in {self._inventory.path}"
        with translated(f"open {what}"):
            found = self._inventory.try_lease(rank, identity)
            if found is None:
                raise NotFoundError(f"{what}: there is no share of it")
            files, share, lease_fd = found
            try:
                copies = read_copies(files, share)
            except BaseException:
                os.close(lease_fd)
                raise
            return SlotReader(files, copies, lease_fd, copies_begin(share.nbytes, share.chunk_nbytes))

    def discard(self, rank: int, identity: Identity) -> None:
        """Takes copies out of use that were proven bad; the share beside them stays. Absent is fine."""
        with translated(f"discard copies of rank {rank}, {identity} in {self._inventory.path}"):
            found = self._inventory.try_lease(rank, identity)
            if found is not None:
                files, _, lease_fd = found
                try:
                    files.copies.unlink(missing_ok=True)
                finally:
                    os.close(lease_fd)

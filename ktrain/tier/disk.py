"""The disk tier of one node: a directory of its own, which survives processes and restarts of the machine.

Like a volume it is reached by its own node alone, so a checkpoint on disks is made by joined inventories and needs no
commit record (ADR 0009). A snapshot counts once its manifest is there, which is written after the payload. What goes is
the head's word; a mark stands before the removal and is taken away last (ADR 0023).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from pathlib import Path

from ktrain.abc.proven import BadBytes, Chunks, ProvesWrites, Terms
from ktrain.abc.tier import Buffer, Tier
from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.pace import Pace
from ktrain.base.settings import Timeouts
from ktrain.errors import ConfigError, CorruptionError, NotFoundError
from ktrain.format import record as records
from ktrain.format.manifest import Identity, Manifest, bad_ranges
from ktrain.tier.files import FileTier

_WRITE_ID = "node"  # names need no more than step, epoch and rank: nobody else writes here
_MANIFEST = re.compile(
    rf"{contract.CHECKPOINTS_DIR}/step-(\d{{8,19}})/data-(\d{{6,19}})-{_WRITE_ID}/rank-(\d{{5,}})\.json", re.ASCII
)
_DOOMED = re.compile(rf"{contract.MARKS_DIR}/doomed-(\d{{8,19}})-(\d{{6,19}})-{_WRITE_ID}\.json", re.ASCII)


class NodeDisk:
    """Snapshots of one node's ranks below `root/RUN_ID/NODE`. Safe from any thread."""

    def __init__(self, root: Path, *, run: str, node: str, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> None:
        self.path = root / run / node
        self.tier: Tier = FileTier(self.path, kind=contract.TIER_DISK)
        self._run = run
        self._timeouts = timeouts
        self._clock = clock
        self._known: dict[str, Manifest] = {}  # by name; a manifest is never rewritten with other bytes
        self.copies = DiskCopies(self)
        self.damaged: dict[tuple[int, int, int], str] = {}  # (step, epoch, rank) that `scan` left out -> why

    def _deadline(self, nbytes: int = 0) -> Deadline:
        return Deadline.after(self._timeouts.storage_s + nbytes / 1e6, self._clock)

    def store(self, manifest: Manifest, payload: Buffer) -> None:
        """Keeps a snapshot: payload, every chunk proven on its way, then manifest.

        Raises:
            BadBytes: the payload is not the manifest's; it does not count.
            CapacityError: the disk is full; what was there still is.
            UnavailableError, DeadlineError: it could not be written; it does not count.
        """
        identity, rank = manifest.identity, manifest.rank
        self.write_proven(payload_name(identity, rank), manifest, payload)
        self.write_manifest(_manifest_name(identity, rank), manifest)

    def write_manifest(self, name: str, manifest: Manifest) -> None:
        """Writes one manifest, which makes its payload count."""
        self.tier.write(name, manifest.to_bytes(), deadline=self._deadline())

    def delete(self, name: str) -> None:
        """Removes one object; one that is not there is fine."""
        self.tier.delete(name, deadline=self._deadline())

    def write_proven(self, name: str, manifest: Manifest, payload: Buffer) -> None:
        """Writes one payload, every chunk proven on its way."""
        rank, deadline = manifest.rank, self._deadline(manifest.nbytes)
        if isinstance(self.tier, ProvesWrites):
            terms = Terms(Chunks(manifest.chunk_nbytes, manifest.chunks), Pace(None))
            self.tier.write_proven(name, payload, terms, deadline=deadline)
        else:  # a tier of six calls: the proof of the whole payload first
            for begin, end in bad_ranges(manifest, payload):
                raise BadBytes(f"rank {rank}: bytes {begin} to {end} differ from the digest", begin, end)
            self.tier.write(name, payload, deadline=deadline)

    def scan(self) -> list[tuple[int, Identity]]:
        """(rank, identity) of every snapshot whose manifest can be read; payloads are not touched."""
        found: list[tuple[int, Identity]] = []
        damaged: dict[tuple[int, int, int], str] = {}
        names = [stored.name for stored in self.tier.list(f"{contract.CHECKPOINTS_DIR}/", deadline=self._deadline())]
        self._known = {name: manifest for name, manifest in self._known.items() if name in names}
        for name in names:
            match = _MANIFEST.fullmatch(name)
            if match is None:
                continue
            named = (int(match[1]), int(match[2]), int(match[3]))
            try:
                manifest = self._known.get(name) or self.read(name)
            except NotFoundError:
                continue  # collected meanwhile
            except (CorruptionError, ConfigError) as error:  # torn, or of a newer version: it is not offered
                damaged[named] = str(error)
                continue
            identity = manifest.identity
            if (identity.step, identity.epoch, manifest.rank) == named and identity.run == self._run:
                self._known[name] = manifest
                found.append((manifest.rank, identity))
            else:
                damaged[named] = f"the manifest inside is of rank {manifest.rank}, {identity}"
        self.damaged = damaged
        return found

    def read(self, name: str) -> Manifest:
        """The manifest of that name."""
        return Manifest.from_bytes(self.tier.read(name, deadline=self._deadline()))

    def manifest(self, rank: int, identity: Identity) -> Manifest:
        """The manifest of a snapshot.

        Raises:
            NotFoundError: it is not on this disk.
            CorruptionError: it is damaged.
        """
        return self.read(_manifest_name(identity, rank))

    def discard(self, rank: int, identity: Identity) -> None:
        """A copy that was proven bad does not count any more; its payload stays for people until it is collected."""
        self.delete(_manifest_name(identity, rank))

    def collect(self, steps: Collection[tuple[int, int]], *, reached: Callable[[str, int], None]) -> list[Identity]:
        """Removes the snapshots of these (step, epoch): mark, manifests, payloads, mark; returns what was there.

        `reached` is told each point that faults can be planned for.
        """
        held = [(rank, identity) for rank, identity in self.scan() if (identity.step, identity.epoch) in steps]
        removed = list(dict.fromkeys(identity for _, identity in held))
        for identity in removed:
            mark = _doomed_name(identity.step, identity.epoch)
            self.tier.write(mark, b"{}", deadline=self._deadline())
            reached("disk.doomed", identity.step)
            for rank in [rank for rank, other in held if other == identity]:
                self._forget(rank, identity)
            reached("disk.manifest", identity.step)
            self._remove_payloads(identity.step, identity.epoch)
            self.delete(mark)
        return removed

    def finish_removals(self) -> None:
        """Goes on with what a process that died had begun to remove.

        Payloads whose manifests it removed go. With a manifest still there the snapshot counts; its mark is taken back.
        """
        for stored in self.tier.list(f"{contract.MARKS_DIR}/", deadline=self._deadline()):
            match = _DOOMED.fullmatch(stored.name)
            if match is not None:
                self._remove_payloads(int(match[1]), int(match[2]))
                self.delete(stored.name)

    def _remove_payloads(self, step: int, epoch: int) -> None:
        """Removes the payloads of a step that have no manifest beside them."""
        folder = records.payload_name(step, epoch, _WRITE_ID, 0).rpartition("/")[0]
        names = {stored.name for stored in self.tier.list(f"{folder}/", deadline=self._deadline())}
        for name in names:
            rank = name.rpartition("rank-")[2].removesuffix(".safetensors")
            if not rank.isdecimal() or name != records.payload_name(step, epoch, _WRITE_ID, int(rank)):
                continue
            if records.manifest_name(step, epoch, _WRITE_ID, int(rank)) not in names:
                self.delete(name)

    def remove(self) -> None:
        """Removes everything of this run on this node, after its success."""
        self.finish_removals()
        for rank, identity in self.scan():
            self._forget(rank, identity)
            self.delete(payload_name(identity, rank))
        for folder in (self.path, self.path.parent):
            try:
                folder.rmdir()
            except OSError:
                return  # something is left that this tier did not write, or another node shares the directory

    def _forget(self, rank: int, identity: Identity) -> None:
        """Removes the copies, then the manifest of the share, by which all of it is found."""
        payload, manifest = _copies_names(identity, rank)
        for name in (manifest, payload, _manifest_name(identity, rank)):
            self.delete(name)

    def close(self) -> None:
        """Ends the calls' threads. Idempotent."""
        self.tier.close()


class DiskCopies:
    """Copies beside shares on a node's disk, which no other node can read (ADR 0015). Safe from any thread."""

    def __init__(self, disk: NodeDisk) -> None:
        self._disk = disk

    def store(self, manifest: Manifest, payload: Buffer) -> None:
        """Keeps copies as `NodeDisk.store` keeps the share, with its errors; they count once the share is there."""
        payload_at, manifest_at = _copies_names(manifest.identity, manifest.rank)
        self._disk.write_proven(payload_at, manifest, payload)
        self._disk.write_manifest(manifest_at, manifest)

    def find(self, identity: Identity) -> tuple[dict[int, Manifest], dict[int, str]]:
        """Manifests of the copies beside shares of a snapshot, by rank; and by rank why some cannot be used."""
        found: dict[int, Manifest] = {}
        damaged: dict[int, str] = {}
        for rank in [rank for rank, held in self._disk.scan() if held == identity]:
            try:
                manifest = self._disk.read(_copies_names(identity, rank)[1])
            except NotFoundError:
                continue
            except CorruptionError as error:
                damaged[rank] = str(error)
                continue
            if (manifest.rank, manifest.identity) == (rank, identity):
                found[rank] = manifest
            else:
                damaged[rank] = f"the manifest inside is of rank {manifest.rank}, {manifest.identity}"
        return found, damaged

    def discard(self, rank: int, identity: Identity) -> None:
        """Copies that were proven bad do not count any more; the share beside them does."""
        self._disk.delete(_copies_names(identity, rank)[1])


def payload_name(identity: Identity, rank: int) -> str:
    """The payload's name below the node's directory."""
    return records.payload_name(identity.step, identity.epoch, _WRITE_ID, rank)


def copies_name(identity: Identity, rank: int) -> str:
    """The name of the copies' payload beside a rank's share, below the node's directory."""
    return _copies_names(identity, rank)[0]


def _copies_names(identity: Identity, rank: int) -> tuple[str, str]:
    """Payload and manifest."""
    stem = payload_name(identity, rank).removesuffix(".safetensors")
    return f"{stem}-copies.safetensors", f"{stem}-copies.json"


def _manifest_name(identity: Identity, rank: int) -> str:
    return records.manifest_name(identity.step, identity.epoch, _WRITE_ID, rank)


def _doomed_name(step: int, epoch: int) -> str:
    return f"{contract.MARKS_DIR}/doomed-{step:08d}-{epoch:06d}-{_WRITE_ID}.json"


def open_disk(root: str | None, *, run: str, node: str, timeouts: Timeouts) -> NodeDisk | None:
    """The node's disk tier, or None where none is set.

    Raises:
        ConfigError: the path is not absolute: nodes and workers have other working directories.
    """
    if root is None:
        return None
    path = Path(root)
    if not path.is_absolute():
        raise ConfigError(f"{contract.ENV_DISK}: expected an absolute path, found {root!r}")
    return NodeDisk(path, run=run, node=node, timeouts=timeouts)

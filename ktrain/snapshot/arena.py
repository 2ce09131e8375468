"""A node's part of the memory tier: slots in files on a memory-backed volume, which outlive every process.

    <volume root>/<run id>/<node>/volume.json, volume.lock, committed.json
                                  rank-00003/slot-0.safetensors, .manifest.json, .copies.json, .lock, .lease

A folder `rank-R` holds this node's copies of rank R's snapshots, its own and those kept for others alike.
What is held is found by looking, never by asking. The rules of a single slot are in `ktrain.snapshot.slots`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from ktrain.base import atomic, contract
from ktrain.errors import CorruptionError, InternalError, NotFoundError
from ktrain.format.manifest import Identity, Manifest
from ktrain.snapshot.copies import VolumeCopies
from ktrain.snapshot.inventory import Inventory, ProblemKind, SlotProblem, age
from ktrain.snapshot.leased import LeasedSlot
from ktrain.snapshot.own_slots import OwnSlots
from ktrain.snapshot.slots import (
    Held,
    Slot,
    SlotCalls,
    SlotReader,
    SlotWriter,
    is_full,
    payload_nbytes,
    translated,
)
from ktrain.snapshot.volumes import (
    KEPT_SLOTS,
    Slots,
    VolumeInfo,
    claim_folder,
    list_volumes,
    node_folder,
    open_folder,
    remove_folder,
    remove_volume,
    required_nbytes,
)

__all__ = [
    "KEPT_SLOTS",
    "Held",
    "NodeVolume",
    "ProblemKind",
    "SlotProblem",
    "SlotReader",
    "SlotWriter",
    "Slots",
    "VolumeInfo",
    "list_volumes",
    "remove_volume",
    "required_nbytes",
]


_SMALL_NBYTES = 1 << 16


class NodeVolume:
    """The slots of one node. Safe from any thread; a forked child opens the volume again.

    Args:
        root: the volume; made with its folders where they are missing, for this user alone.
        node: name of this node.
        run: id of the run.
        uri: the run's URI, for people who list volumes later.
        calls: the border to the system, replaced in tests.

    Raises:
        ConfigError: a name is no plain name, the URI holds a secret, or a folder on the way belongs to another user.
        ConflictError: the folder is another run's, or is being removed.
    """

    def __init__(self, root: Path, *, node: str, run: str, uri: str = "", calls: SlotCalls | None = None) -> None:
        self.path = node_folder(root, run, node)
        self.node = node
        self.run = run
        self._inventory = Inventory(self.path, run)
        self.copies = VolumeCopies(self._inventory)
        self._own = OwnSlots(self._inventory, calls or SlotCalls())
        self._pid = os.getpid()
        self._committed_path = self.path / contract.COMMITTED_FILE
        self._committed: tuple[bytes | None, Mapping[str, tuple[int, int]]] = None, {}  # the file, and what it says
        with translated(f"open volume {self.path}"):
            self._volume_fd: int | None = open_folder(root, self.path)
            try:
                claim_folder(self.path, run=run, node=node, uri=uri)
            except BaseException:
                self.close()
                raise

    # ------------------------------------------------------------------------------------------ what is held

    def scan(self) -> list[Held]:
        """Every sealed slot, by rank, epoch and step. Reads manifests, and each only once."""
        with translated(f"scan volume {self.path}"):
            return self._inventory.scan()

    def problems(self) -> list[SlotProblem]:
        """Every slot that `scan` leaves out and why; empty ones that this process keeps ready are none."""
        ready = self._own.ready()
        with translated(f"scan volume {self.path}"):
            return self._inventory.problems(ready=ready)

    def open(self, rank: int, identity: Identity, *, known: Manifest | None = None) -> SlotReader:
        """The snapshot for reading, under a lease that keeps writers away until it is closed.

        Args:
            known: its manifest where that was read before; the same bytes are not parsed again.

        Raises:
            NotFoundError: no sealed slot here holds it.
        """
        with translated(f"open rank {rank}, {identity} in {self.path}"):
            found = self._inventory.try_lease(rank, identity, known)
            if found is not None:
                return SlotReader(*found)
            held = self._inventory.held(rank).values()
        there = ", ".join(f"{h.identity.step} of epoch {h.identity.epoch}" for h in held) or "none"
        raise NotFoundError(
            f"volume {self.path}: no snapshot of rank {rank}, {identity}; steps held of this rank: {there}; "
            "try another copy"
        )

    def discard(self, rank: int, identity: Identity, reason: str) -> None:
        """Unseals a copy that was proven bad. Its bytes stay for people until the slot is used again.

        Where several slots hold the identity it is the one that `open` returns. Absent is fine.
        """
        with translated(f"discard rank {rank}, {identity} in {self.path}"):
            found = self._inventory.try_lease(rank, identity)
            if found is None:
                return
            files, _, lease_fd = found
            try:
                files.reason.write_text(reason + "\n")
                os.replace(files.manifest, files.bad)
            finally:
                os.close(lease_fd)

    def committed(self) -> Mapping[str, tuple[int, int]]:
        """What was announced as committed, by tier: (step, epoch). Read fresh; understood anew where it changed.

        Raises:
            CorruptionError: the file is damaged; what is protected cannot be told until it is written again.
        """
        data = _try_read_small(self._committed_path)
        if data is None:
            return {}
        known = self._committed  # replaced whole
        if known[0] != data:
            known = self._committed = data, _parse_committed(self._committed_path, data)
        return known[1]

    def write_committed(self, committed: Mapping[str, tuple[int, int]]) -> None:
        """Replaces what `committed` says; survives every process."""
        path = self.path / contract.COMMITTED_FILE
        with translated(f"write {path}"):
            atomic.write_json(path, {tier: list(at) for tier, at in committed.items()})

    def free_nbytes(self) -> int:
        """Bytes that the file system has free for this user."""
        stat = os.statvfs(self.path)
        return stat.f_bavail * stat.f_frsize

    def held_nbytes(self) -> int:
        """Bytes that the slots of this node take, sealed or not."""
        return self._inventory.allocated_nbytes()

    # -------------------------------------------------------------------------------------- what is written

    def acquire(
        self,
        rank: int,
        nbytes: int,
        *,
        protect: Collection[tuple[int, int]],
        limit: int,
        over: tuple[int, int] = (0, 0),
    ) -> SlotWriter | None:
        """A slot of exactly `nbytes` to write the rank's next snapshot into, or None where none is free.

        Never taken are the rank's newest sealed slot (greatest epoch, then step), those of `protect` and of
        `committed()`, those that are read under a lease, and those of another living process. Of the rest one
        without a snapshot is taken, else the oldest (smallest epoch, then step), else a new one is made while
        the rank has fewer than `limit`; slots of another living process do not count.

        Args:
            protect: (step, epoch) of snapshots that somebody still needs.
            limit: slots that the rank may have here.
            over: (epoch, step) of a snapshot that all ranks have sealed, where it is such a one that is to be kept:
                what is older and not in `protect` may then be taken though it is the rank's newest (ADR 0022).

        Raises:
            CapacityError: the volume is full. What was sealed still is.
        """
        leased = self.lease(rank, nbytes, protect=protect, limit=limit, over=over)
        return None if leased is None else self._begin(leased)

    def lease(
        self,
        rank: int,
        nbytes: int,
        *,
        protect: Collection[tuple[int, int]],
        limit: int,
        over: tuple[int, int] = (0, 0),
    ) -> LeasedSlot | None:
        """The slot that `acquire` would give, before anything of it is lost: for `begin`, or to be given back."""
        self._require_usable()
        if nbytes < 1:
            raise InternalError(f"acquire a slot for rank {rank}: expected at least 1 byte, found {nbytes}")
        kept = {*protect, *self.committed().values()}
        with translated(f"acquire a slot of {nbytes} bytes for rank {rank} in {self.path}"):
            return self._try_lease(rank, nbytes, (kept, over), limit)

    def begin(self, leased: LeasedSlot, nbytes: int, *, protect: Collection[tuple[int, int]]) -> SlotWriter | None:
        """Turns a leased slot into a writer of `nbytes`; None, and it is given back, where that may not be any more.

        Raises:
            CorruptionError: as in `committed`. The slot is given back.
        """
        try:
            self._require_usable()
            is_free = leased.may_be_written(nbytes, {*protect, *self.committed().values()})
        except BaseException:
            leased.give_back()
            raise
        if not is_free:
            leased.give_back()
            return None
        return self._begin(leased)

    def _begin(self, leased: LeasedSlot) -> SlotWriter:
        slot = leased.slot
        try:
            with translated(f"begin to write {slot.files.name}"):
                slot.unseal()
        except BaseException:
            leased.give_back()
            raise
        return SlotWriter(slot, leased.rank, self.run, ended=lambda held: self._ended(slot, held))

    def prepare(
        self, rank: int, nbytes: int, count: int, mapped: Callable[[str, memoryview], None] = lambda slot, memory: None
    ) -> None:
        """Has `count` slots of the rank mapped with all pages present, so that first snapshots are fast too.

        Sealed snapshots keep every byte; those of another size stay as they are and count. `mapped` is called with
        name and memory of each slot that was mapped; it writes nothing.

        Raises:
            CapacityError: the volume is full.
        """
        self._require_usable()
        with translated(f"prepare {count} slots of {nbytes} bytes for rank {rank} in {self.path}"):
            mine, num_busy = self._own.lock(rank)
            try:
                mine += self._own.make(rank, count - len(mine) - num_busy)
                sealed = self._inventory.held(rank)
                for slot in mine[:count]:
                    held = sealed.get(slot.files.index)
                    if slot.mapped_nbytes != nbytes and (held is None or payload_nbytes(slot.files) == nbytes):
                        slot.map(nbytes)
                        slot.prefault()
                        mapped(slot.files.name, slot.view())
            finally:
                self._own.give_back(mine)

    def release(self, rank: int) -> None:
        """Gives up this process's slots of a rank, so that another may write them. Sealed ones stay."""
        self._own.close(self._inventory.folder(rank))

    def close(self) -> None:
        """Gives up all slots that are not being written; what is sealed stays. Closing twice is fine."""
        self._own.close()
        if self._volume_fd is not None:
            os.close(self._volume_fd)
            self._volume_fd = None

    def remove(self) -> int:
        """Closes the volume and frees everything of this node; the bytes freed.

        Raises:
            ConflictError: a living process (also a stopped one) has the volume open or one of its slots.
        """
        self.close()
        return remove_folder(self.path)

    def __enter__(self) -> NodeVolume:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------- choosing a slot

    def _try_lease(
        self, rank: int, nbytes: int, keep: tuple[Collection[tuple[int, int]], tuple[int, int]], limit: int
    ) -> LeasedSlot | None:
        """The chosen slot: leased, mapped, and for this thread alone.

        `keep`: what may not be taken, and the age below which the newest is not kept for being the newest.
        """
        kept, over = keep
        mine, num_busy = self._own.lock(rank)
        taken: Slot | None = None
        try:
            sealed = self._inventory.held(rank)
            current = (held for held in sealed.values() if age(held) >= over)
            newest = max(current, key=age, default=None)
            free = [slot for slot in mine if not _is_kept(sealed.get(slot.files.index), newest, kept)]
            free.sort(key=lambda slot: _preference(slot, sealed.get(slot.files.index), nbytes))
            taken = _try_open_first(free, nbytes)
            if taken is None and len(mine) + num_busy < limit:
                fresh = self._own.make(rank, 1)
                mine += fresh
                taken = _try_open_first(fresh, nbytes)
        finally:
            self._own.give_back([slot for slot in mine if slot is not taken])
        if taken is None:
            return None
        return LeasedSlot(
            taken,
            rank,
            sealed.get(taken.files.index),
            newest_is_there=lambda: newest is None or self._inventory.has(newest),
            give_back=lambda: self._own.give_back([taken]),
        )

    def _ended(self, slot: Slot, held: Held | None) -> None:
        if held is not None:
            self._inventory.learn(slot.files, held)
        self._own.give_back([slot])

    def _require_usable(self) -> None:
        if self._volume_fd is None:
            raise InternalError(f"volume {self.path}: used after it was closed")
        if os.getpid() != self._pid:
            raise InternalError(f"volume {self.path}: used in a forked child; open it there again")


def _try_read_small(path: Path) -> bytes | None:
    """A file of some hundred bytes; None where there is none. Python's own files take four times as long to open."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        return os.read(fd, _SMALL_NBYTES)
    finally:
        os.close(fd)


def _parse_committed(path: Path, data: bytes) -> Mapping[str, tuple[int, int]]:
    try:
        return {str(tier): (int(step), int(epoch)) for tier, (step, epoch) in json.loads(data).items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptionError(
            f"{path}: expected an object of [step, epoch] by tier, found {data[:40]!r}; announce it again"
        ) from error


def _is_kept(held: Held | None, newest: Held | None, kept: Collection[tuple[int, int]]) -> bool:
    return held is not None and (held == newest or (held.identity.step, held.identity.epoch) in kept)


def _preference(slot: Slot, held: Held | None, nbytes: int) -> tuple[int, int, bool, int]:
    """Sorts free slots: empty before sealed, older before newer, and those of the right size first."""
    epoch, step = (-1, -1) if held is None else age(held)
    return epoch, step, slot.mapped_nbytes != nbytes, slot.files.index


def _try_open_first(slots: list[Slot], nbytes: int) -> Slot | None:
    """The first slot that nobody reads and that the volume has room for, mapped and under lease.

    All are tried: an empty slot may find no room to grow, while an old snapshot's has its bytes already.
    """
    full: OSError | None = None
    for slot in slots:
        if not slot.try_lease():
            continue
        try:
            slot.map(nbytes)
        except OSError as error:
            if not is_full(error):
                raise
            full = full or error
            slot.unlease()
            continue
        return slot
    if full is not None:
        raise full
    return None

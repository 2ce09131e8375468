"""A node's carrying of bytes: sealed snapshots to disk and bucket, replicas in from peers. Threads of its own.

What to carry is a wanted state that `want` replaces; what was carried is told through the callbacks.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrain.abc.proven import BadBytes
from ktrain.abc.transport import Transport
from ktrain.base import contract
from ktrain.base.clock import Clock
from ktrain.base.faults import FaultPoints
from ktrain.base.process import let_training_first
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.fill import Filler, WantedFills
from ktrain.checkpoint.replicas import Replicas, WantedReplicas
from ktrain.checkpoint.source import Failure
from ktrain.checkpoint.upload import Uploader, refuse_slot
from ktrain.errors import CorruptionError, KtrainError, NotFoundError
from ktrain.format.manifest import Identity
from ktrain.snapshot.arena import NodeVolume
from ktrain.tier.disk import NodeDisk

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the head wants carried by this node."""

    drain: Mapping[str, Any] | None = None  # what to bring into the bucket, and for which ranks
    ranks: Sequence[int] = ()  # whose snapshots are to be on this node's disk
    replicas: WantedReplicas = field(default_factory=WantedReplicas)
    disk: Mapping[str, Any] | None = None  # what is to be on this node's disk
    disk_gone: Sequence[tuple[int, int]] = ()  # (step, epoch) of what is to go from there
    fill: WantedFills = field(default_factory=WantedFills)  # from the bucket into the volume, before a restore reads
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Ends:
    """What a carrier stands between; `volume` and `disk` give None while there is none."""

    run_url: str
    node: str
    volume: Callable[[], NodeVolume | None]
    disk: Callable[[], NodeDisk | None]
    transport: Transport | None


class Carrier:
    """Drains and pulls for one node. Safe from any thread.

    Args:
        emit: takes an event's kind and fields.
        drained: takes what the head is to know of one rank's upload; from several threads.
        filled: called when `fills` has something new.
    """

    def __init__(
        self,
        ends: Ends,
        *,
        emit: Callable[..., None],
        drained: Callable[[dict[str, Any]], None],
        filled: Callable[[], None],
        timeouts: Timeouts,
        clock: Clock,
    ) -> None:
        self._node = ends.node
        self._volume = ends.volume
        self._disk = ends.disk
        self._emit = emit
        self._timeouts = timeouts
        self._clock = clock
        self._uploader = Uploader(ends.run_url, ends.node, emit=emit, report=drained, timeouts=timeouts, clock=clock)
        self._wanted = Wanted()  # replaced whole
        self._faults = FaultPoints([], epoch=0)
        self._closed = threading.Event()
        self._disk_failed = False
        self._disk_lock = threading.Lock()  # one at a time writes to the disk, or removes it
        self.on_disk: Sequence[tuple[int, Identity]] | None = None  # replaced whole; None before the first look
        self._filler = Filler(ends.run_url, timeouts, clock, changed=filled, bad=self._say_bad_fill)
        self._wakes = {name: threading.Event() for name in ("drain", "disk", "pull", "fill")}
        self.replicas = Replicas(ends.node, ends.volume, ends.transport, emit=emit, timeouts=timeouts, clock=clock)
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads."""
        works = {"drain": self._drain_once, "disk": self._disk_once, "pull": self._pull_once, "fill": self._fill_once}
        for name, work in works.items():
            thread = threading.Thread(target=self._loop, args=(name, work), name=f"ktrain-{name}", daemon=True)
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Ends the threads; a transfer that still runs after a call's time fails. Idempotent."""
        self._closed.set()
        for wake in self._wakes.values():
            wake.set()
        for thread in self._threads:
            thread.join(self._timeouts.call_s)
        self._threads = []
        self._uploader.close()

    def want(self, wanted: Wanted) -> None:
        """Replaces what is to be carried."""
        if wanted.epoch != self._wanted.epoch:
            self._faults = FaultPoints.from_environment(wanted.epoch)
        self._wanted = wanted
        self.replicas.want(wanted.replicas, self._faults, epoch=wanted.epoch)
        for wake in self._wakes.values():
            wake.set()

    def _loop(self, name: str, work: Callable[[dict[Any, Any]], None]) -> None:
        if name != "fill":  # for that one a restore waits, and nothing trains
            let_training_first()  # so do the threads of uploads and stores: they are started from here
        memory: dict[Any, Any] = {}  # what this loop has done or given up, so that a wanted state is not carried twice
        while not self._closed.is_set():
            self._clock.wait(self._wakes[name], self._timeouts.beat_s)
            self._wakes[name].clear()
            try:
                work(memory)
            except Exception:  # noqa: BLE001 -- top of the thread: recorded, the next wanted state tries again
                _LOG.exception("%s: unexpected failure", name)

    def _drain_once(self, memory: dict[Any, Any]) -> None:
        self._uploader.work(self._wanted.drain, self._volume(), self._faults)

    # What a restore reads once a job

    @property
    def fills(self) -> Sequence[Mapping[str, Any]]:
        """What the head is to know of the fills of the newest restore."""
        return self._filler.reports

    def _fill_once(self, memory: dict[Any, Any]) -> None:
        self._filler.work(self._wanted.fill, self._volume(), self._faults)

    def _say_bad_fill(self, failure: Failure) -> None:
        copy = failure.copy
        where = {"step": copy.identity.step, "rank": copy.rank, "tier": copy.tier, "where": copy.place}
        self._emit("bad_copy", reason=failure.reason, begin=failure.begin, end=failure.end, **where)

    # The node's own disk

    def _disk_once(self, memory: dict[Any, Any]) -> None:
        with self._disk_lock:
            self._disk_once_locked(memory)

    def _disk_once_locked(self, memory: dict[Any, Any]) -> None:
        disk, volume, wanted = self._disk(), self._volume(), self._wanted
        if disk is None or self._clock.monotonic() < memory.get("again_s", 0.0):
            return
        try:
            if not memory.get("is_finished"):
                disk.finish_removals()
                memory["is_finished"] = True
            self.on_disk = disk.scan()
            if volume is not None and wanted.disk is not None:
                identity = Identity.from_json(wanted.disk["identity"])
                missing = [rank for rank in wanted.ranks if (rank, identity) not in (self.on_disk or ())]
                for rank in missing:
                    self._store(disk, volume, rank, identity)
                if missing:
                    self.on_disk = disk.scan()
            self._collect(disk, wanted.disk_gone)
        except NotFoundError:
            return  # the slot was taken for a newer step meanwhile; that one comes next
        except (KtrainError, OSError) as error:
            memory.update(again_s=self._clock.monotonic() + self._timeouts.call_s, is_finished=False)
            if not self._disk_failed:
                self._emit("tier_failed", tier=contract.TIER_DISK, reason=f"{self._node}: {error}")
            self._disk_failed = True
            return
        if self._disk_failed:
            self._emit("tier_recovered", tier=contract.TIER_DISK)
        self._disk_failed = False

    def _collect(self, disk: NodeDisk, gone: Sequence[tuple[int, int]]) -> None:
        """Removes what the head names, where it is here."""
        if not any((identity.step, identity.epoch) in gone for _, identity in self.on_disk or ()):
            return
        faults = self._faults
        for old in disk.collect(gone, reached=lambda point, step: faults.reached(point, step=step)):
            self._emit("collected", tier=contract.TIER_DISK, step=old.step)
        self.on_disk = disk.scan()

    def look_at_disk(self) -> None:
        """Reads the disk's inventory now; a disk that cannot be read is left to the next round."""
        disk = self._disk()
        try:
            self.on_disk = () if disk is None else disk.scan()
        except KtrainError as error:
            _LOG.warning("disk of %s: %s", self._node, error)

    def remove_disk(self, disk: NodeDisk) -> None:
        """Nothing more is to be on the disk: the run has ended. Waits for what is being written or removed there."""
        with self._disk_lock:
            self._wanted = Wanted(epoch=self._wanted.epoch)
            self.on_disk = ()
            disk.remove()

    def _store(self, disk: NodeDisk, volume: NodeVolume, rank: int, identity: Identity) -> None:
        started = self._clock.monotonic()
        nbytes = self._store_copies(disk, volume, rank, identity)  # before the share, which makes the snapshot count
        with volume.open(rank, identity) as slot:
            nbytes += slot.manifest.nbytes
            try:
                disk.store(slot.manifest, slot.memory)
            except BadBytes as error:
                refuse_slot(volume, slot.manifest, error, emit=self._emit, node=self._node)
                raise
        fields = {"rank": rank, "step": identity.step, "tier": contract.TIER_DISK}
        self._emit("drained", nbytes=nbytes, seconds=self._clock.monotonic() - started, node=self._node, **fields)

    def _store_copies(self, disk: NodeDisk, volume: NodeVolume, rank: int, identity: Identity) -> int:
        """The copies beside a share go along, because no other node can read this disk; bad ones are left out."""
        try:
            with volume.copies.open(rank, identity) as copies:
                disk.copies.store(copies.manifest, copies.memory)
                return copies.manifest.nbytes
        except NotFoundError:
            return 0
        except (CorruptionError, BadBytes) as error:
            volume.copies.discard(rank, identity)
            where = {"step": identity.step, "rank": rank, "tier": contract.TIER_MEMORY, "where": self._node}
            self._emit("bad_copy", reason=f"copies beside its share: {error}", **where)
            return 0

    # What peers hold

    def _pull_once(self, memory: dict[Any, Any]) -> None:
        self.replicas.work(memory, is_closed=self._closed.is_set)

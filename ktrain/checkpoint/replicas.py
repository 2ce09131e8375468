"""What a node holds of its peers' snapshots: the replicas that it keeps, and what its ranks read for a restore."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from ktrain.abc.source import copies_beside
from ktrain.abc.transport import BadOwn, PartialRead, Receipt, Transport
from ktrain.base import contract
from ktrain.base.clock import Clock, Deadline
from ktrain.base.control import Handler
from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.source import Fetched
from ktrain.errors import (
    CapacityError,
    ConflictError,
    CorruptionError,
    DeadlineError,
    KtrainError,
    NotFoundError,
    UnavailableError,
)
from ktrain.format.manifest import Identity
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.scratch import Scratch, ScratchFile

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class WantedReplicas:
    """What the head wants of this node as a peer, and what it says of the others."""

    own: Sequence[int] = ()  # the ranks that run here
    keeps: Sequence[int] = ()  # those whose replicas this node is to keep
    pull: Sequence[Mapping[str, Any]] = ()
    peers: Mapping[str, str] = field(default_factory=dict)
    protect: Sequence[tuple[int, int]] = ()
    protect_kept: Sequence[tuple[int, int]] = ()  # the part of it that no replica may overwrite


@dataclass(frozen=True, slots=True)
class Loan:
    """A whole snapshot of a peer in a file, for all ranks of the node to read once."""

    scratch: Scratch
    file: ScratchFile


class Replicas:
    """Pulls for one node. Safe from any thread.

    Args:
        volume: gives None while there is none.
        emit: takes an event's kind and fields.
    """

    def __init__(
        self,
        node: str,
        volume: Callable[[], NodeVolume | None],
        transport: Transport | None,
        *,
        emit: Callable[..., None],
        timeouts: Timeouts,
        clock: Clock,
    ) -> None:
        self._node = node
        self._volume = volume
        self._transport = transport
        self._emit = emit
        self._timeouts = timeouts
        self._clock = clock
        self._wanted = WantedReplicas()  # replaced whole
        self._faults = FaultPoints([], epoch=0)
        self._not_kept: dict[int, Identity] = {}  # rank -> the replica that was said to be missing
        self._no_room_until: dict[int, float] = {}  # rank -> until when a lack of room is nothing to be said
        self._pull_lock = threading.Lock()  # one pull at a time: bounded chunks in flight
        self._pulled: set[int] = set()  # ranks of which the transport may have slots
        self._lend_lock = threading.Lock()  # one loan at a time is read
        self._loans: dict[tuple[int, Identity], Loan] = {}  # replaced whole
        self._fault_lock = threading.Lock()  # a plan counts, and is not made for several threads
        self._due_lock = threading.Lock()  # guards the two fields below
        self._epoch = 0
        self._wire_due: dict[str, Deadline] = {}  # owner -> by when the wire to it, which is down, is to be up

    def want(self, wanted: WantedReplicas, faults: FaultPoints, *, epoch: int) -> None:
        """Replaces what is wanted."""
        self._wanted, self._faults = wanted, faults
        with self._due_lock:
            absent = [owner for owner in self._wire_due if epoch == self._epoch and self._wire_to(owner) is None]
            self._wire_due = {owner: self._wire_due[owner] for owner in absent}
            self._epoch = epoch

    def work(self, memory: dict[Any, Any], *, is_closed: Callable[[], bool] = lambda: False) -> None:
        """Brings what is wanted and missing; `memory` has until when each is left alone after a failure."""
        for want in self._wanted.pull:
            key = (int(want["rank"]), Identity.from_json(want["identity"]))
            is_wanted = want in self._wanted.pull  # still: pulling the ones before it took its time
            if is_closed() or not is_wanted or self._clock.monotonic() < memory.get(key, 0.0):
                continue
            if not self._keep_replica(*key, owner=str(want["owner"])):
                memory[key] = self._clock.monotonic() + self._timeouts.call_s  # not again at once

    def _keep_replica(self, rank: int, identity: Identity, *, owner: str) -> bool:
        started = self._clock.monotonic()
        deadline = Deadline.after(self._timeouts.restore_s, self._clock)
        try:
            with self._fault_lock:
                self._faults.reached("replica.pull", step=identity.step, rank=rank)
            receipt = self._pull(rank, identity, owner, lambda: self._wanted.protect_kept, deadline)
        except (NotFoundError, ConflictError) as error:
            _LOG.info(
                "replica of rank %d step %d from %s: %s", rank, identity.step, owner, error
            )  # superseded meanwhile
            return False
        except CorruptionError as error:
            where = {"step": identity.step, "rank": rank, "tier": contract.TIER_PEER, "where": owner}
            self._emit("bad_copy", reason=str(error), **where)
            return False
        except KtrainError as error:
            _LOG.warning("replica of rank %d step %d from %s: %s", rank, identity.step, owner, error)
            self._say_not_kept(rank, identity, error)
            return False
        self._no_room_until.pop(rank, None)
        self._emit(
            "replicated",
            rank=rank,
            step=identity.step,
            source=owner,
            target=self._node,
            nbytes=receipt.wire_nbytes,
            own_bytes=receipt.own_nbytes,
            seconds=self._clock.monotonic() - started,
            wire_seconds=receipt.wire_s,
        )
        return True

    def _say_not_kept(self, rank: int, identity: Identity, error: KtrainError) -> None:
        """Once for each replica; it is tried until a newer step is wanted.

        Slots are often in use for a moment, between a commit and the news of it. A lack of room is said where nothing
        of the rank could be kept from one try to the next, be it of the same step or of a newer one.
        """
        now = self._clock.monotonic()
        if isinstance(error, CapacityError) and now < self._no_room_until.setdefault(rank, now + self._timeouts.call_s):
            return
        if self._not_kept.get(rank) != identity:
            self._not_kept[rank] = identity
            fields = {"rank": rank, "step": identity.step, "tier": contract.TIER_PEER}
            self._emit("save_skipped", reason=f"{self._node} cannot keep it: {error}", **fields)

    def handlers(self) -> dict[str, Handler]:
        """Calls that workers of this node make while they restore."""
        return {"fetch": self._answer_fetch, "read": self._answer_read}

    def _answer_fetch(self, said: dict[str, Any]) -> dict[str, Any]:
        copy, wanted = Copy.from_json(said["copy"]), PartialRead.from_json(said["wanted"])
        return self.fetch(wanted, copy.place, Deadline.after(float(said["timeout_s"]), self._clock)).to_json()

    def _answer_read(self, said: dict[str, Any]) -> dict[str, Any]:
        copy, wanted = Copy.from_json(said["copy"]), PartialRead.from_json(said["wanted"])
        deadline = Deadline.after(float(said["timeout_s"]), self._clock)
        return {"wire_nbytes": self.read(wanted, copy.place, deadline)}

    def fetch(self, wanted: PartialRead, owner: str, deadline: Deadline) -> Fetched:
        """Brings a whole snapshot of another node, which a rank restores.

        It goes into a slot where the rank that it is of runs here or has its replicas here, else into a file for the
        node's ranks to read (ADR 0025); to neither where it is no use that it comes whole.

        Raises:
            CapacityError: there is no room.
            KtrainError: as `Transport.pull` and `Transport.read` do.
        """
        rank = wanted.rank
        if rank in (*self._wanted.own, *self._wanted.keeps):
            wire_nbytes = self._pull_to_restore(rank, wanted.identity, owner, deadline)
            if rank in self._wanted.own:
                self.release(rank)  # its own process writes these slots
            return Fetched(wire_nbytes)
        if len(self._wanted.own) == 1:
            return Fetched(0)  # the one rank that wants it reads it as it comes
        return self._lend(wanted, owner, deadline)

    def release(self, rank: int) -> None:
        """Gives up the slots of a rank that were pulled into; where none was, nothing is asked."""
        if self._transport is not None and rank in self._pulled:
            self._pulled.discard(rank)
            self._transport.release(rank)

    def end_loans(self) -> None:
        """Takes all files back; a rank that has one mapped may still read it."""
        loans, self._loans = self._loans, {}
        for loan in loans.values():
            loan.scratch.drop(loan.file)

    def _lend(self, wanted: PartialRead, owner: str, deadline: Deadline) -> Fetched:
        volume, key = self._volume(), (wanted.rank, wanted.identity)
        if volume is None:
            raise UnavailableError(f"{wanted}: this node has no volume now")
        if not self._lend_lock.acquire(timeout=deadline.remaining_s()):
            raise DeadlineError(f"{wanted}: what else this node reads took {deadline.total_s:g} s")
        try:
            if key in self._loans:
                return Fetched(0, self._loans[key].file.path)
            scratch = Scratch(volume.path, wanted.nbytes)
            file = scratch.take()
            try:
                wire_nbytes = self.read(replace(wanted, file=file.path), owner, deadline)
            except BaseException:
                scratch.drop(file)  # the wire may still be writing to it
                raise
            self._loans = {**self._loans, key: Loan(scratch, file)}
            return Fetched(wire_nbytes, file.path)
        finally:
            self._lend_lock.release()

    def _pull_to_restore(self, rank: int, identity: Identity, owner: str, deadline: Deadline) -> int:
        """The newest one here of its epoch or a later one stays: it may be what is restored next."""
        volume = self._volume()
        held = [] if volume is None else [entry.identity for entry in volume.scan() if entry.rank == rank]
        ages = [(at.epoch, at.step) for at in held if at.epoch >= identity.epoch]
        newest = [(step, epoch) for epoch, step in [max(ages)]] if ages else []
        return self._pull(rank, identity, owner, lambda: [*self._wanted.protect, *newest], deadline).wire_nbytes

    def _pull(
        self,
        rank: int,
        identity: Identity,
        owner: str,
        protect: Callable[[], Sequence[tuple[int, int]]],
        deadline: Deadline,
    ) -> Receipt:
        if self._transport is None:
            raise UnavailableError(f"rank {rank}, {identity}: this node has no wire to its peers")
        source = self._source_of(owner, deadline)
        with self._pull_lock:
            self._pulled.add(rank)
            receipt = self._transport.pull(source, rank, identity, protect=protect(), deadline=deadline)
        for bad in receipt.bad_own:
            self._refuse_own(bad, identity)
        return receipt

    def _refuse_own(self, bad: BadOwn, identity: Identity) -> None:
        """Takes what the volume itself had of a snapshot out of use where it was proven bad, and says which it is."""
        volume, is_beside = self._volume(), bad.rank < 0
        rank = copies_beside(bad.rank) if is_beside else bad.rank
        reason = f"bytes {bad.begin} to {bad.end} differ from the digest made at the snapshot"
        if volume is not None and is_beside:
            volume.copies.discard(rank, identity)
        elif volume is not None:
            volume.discard(rank, identity, reason)
        where = {"step": identity.step, "rank": rank, "tier": contract.TIER_MEMORY, "where": self._node}
        said = f"copies beside its share: {reason}" if is_beside else reason
        self._emit("bad_copy", reason=said, begin=bad.begin, end=bad.end, **where)

    def read(self, wanted: PartialRead, owner: str, deadline: Deadline) -> int:
        """Brings parts of a snapshot of another node into a reader's file; returns the bytes that crossed the wire."""
        if self._transport is None:
            raise UnavailableError(f"{wanted}: this node has no wire to its peers")
        source = self._source_of(owner, deadline)
        with self._fault_lock:
            self._faults.reached("read.parts", step=wanted.identity.step, rank=wanted.rank)
        return self._transport.read(source, wanted, deadline=deadline)

    def _source_of(self, owner: str, deadline: Deadline) -> str:
        """Waits, bounded, until both ends of the wire are up (a replaced node joins the wire while ranks start).

        All who wait for an owner in one epoch have one deadline, from the first of them on until the wire has been up:
        a restore asks once for each saved rank.
        """
        if (source := self._wire_to(owner)) is not None:
            return source
        with self._due_lock:
            fresh = Deadline.after(self._timeouts.start_s / 2, self._clock)
            due = self._wire_due.setdefault(owner, fresh)
        bound = min(deadline, due, key=lambda each: each.at_s)
        while (source := self._wire_to(owner)) is None:
            if bound.expired():
                raise UnavailableError(f"peer {owner}: no wire to it within {bound.total_s:g} s")
            self._clock.sleep(min(0.1, bound.remaining_s()))
        return source

    def _wire_to(self, owner: str) -> str | None:
        """The owner's address on the wire while both ends are up."""
        is_up = self._transport is not None and self._transport.address() is not None
        return self._wanted.peers.get(owner) if is_up else None

"""A node's part of a drain: sealed snapshots from its slots into the bucket, several ranks at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from ktrain.abc.proven import BadBytes, Chunks, ProvesWrites, Terms
from ktrain.abc.tier import Tier
from ktrain.base import contract, settings
from ktrain.base.clock import Clock, Deadline
from ktrain.base.faults import FaultPoints
from ktrain.base.pace import Pace
from ktrain.base.retry import RetryBudget
from ktrain.base.settings import Timeouts
from ktrain.errors import KtrainError, NotFoundError, UnavailableError
from ktrain.format import record as records
from ktrain.format.digest import digest_text
from ktrain.format.manifest import Identity, Manifest, bad_ranges
from ktrain.format.record import RankFiles
from ktrain.snapshot.arena import NodeVolume, SlotReader
from ktrain.tier.location import open_tier
from ktrain.tier.parts import side_by_side

_NUM_RANKS_AT_ONCE = 4  # they share the node's rate
_SLOWEST_BYTES_PER_S = 1e6


class DrainReports:
    """The newest report on each upload, told again with each beat until newer drains push it out.

    Safe from any thread.
    """

    def __init__(self, limit: int = 128) -> None:
        self._limit = limit
        self._reports: dict[tuple[str, int], dict[str, Any]] = {}  # oldest first; guarded by _lock
        self._lock = threading.Lock()

    def add(self, report: dict[str, Any]) -> bool:
        """Takes a report; true where the head should hear it at once, which is not how far an upload is."""
        key = (str(report["write_id"]), int(report["rank"]))
        with self._lock:
            self._reports.pop(key, None)
            self._reports[key] = report
            while len(self._reports) > self._limit:
                del self._reports[next(iter(self._reports))]
        return "sent_nbytes" not in report

    def newest(self) -> list[dict[str, Any]]:
        """All reports that are kept."""
        with self._lock:
            return list(self._reports.values())

    def clear(self) -> None:
        """Forgets all."""
        with self._lock:
            self._reports.clear()


@dataclass(slots=True)
class _Work:
    """What this node has done of one drain, so that a wanted state is not carried out twice."""

    write_id: str
    identity: Identity
    begun: set[int] = field(default_factory=set)
    again: set[int] = field(default_factory=set)  # ranks that another keeper may have uploaded already
    retries: RetryBudget = field(default_factory=RetryBudget)  # of all ranks together
    num_at_once: int = 1

    def payload_name(self, rank: int) -> str:
        return records.payload_name(self.identity.step, self.identity.epoch, self.write_id, rank)

    def describe(self, manifest: Manifest) -> tuple[RankFiles, bytes]:
        """Names and proofs of a rank's two objects, and the bytes of the second, its manifest."""
        at, rank, data = self.identity, manifest.rank, manifest.to_bytes()
        files = RankFiles(
            rank,
            self.payload_name(rank),
            manifest.nbytes,
            manifest.payload_digest(),
            records.manifest_name(at.step, at.epoch, self.write_id, rank),
            len(data),
            digest_text(data),
        )
        return files, data


class _Described:
    """Names and proofs of what a rank uploads, and the bytes of its manifest: made once, by who asks first.

    That is the thread whose part of the payload is the first to arrive, while the others keep store or disk at work: it
    took 6 ms of a drain of 512 MiB. Safe from any thread.
    """

    def __init__(self, work: _Work, manifest: Manifest) -> None:
        self._work = work
        self._manifest = manifest
        self._lock = threading.Lock()
        self._made: tuple[RankFiles, bytes] | None = None  # guarded by _lock

    def get(self) -> tuple[RankFiles, bytes]:
        with self._lock:
            if self._made is None:
                self._made = self._work.describe(self._manifest)
            return self._made


class Uploader:
    """Uploads what the head assigns to this node. `work` is for one thread at a time.

    Args:
        emit: takes an event's kind and fields.
        report: takes what the head is to know of one rank: bytes sent so far, files, or a failure. Both from several
            threads.
    """

    def __init__(
        self,
        run_url: str,
        node: str,
        *,
        emit: Callable[..., None],
        report: Callable[[dict[str, Any]], None],
        timeouts: Timeouts,
        clock: Clock,
    ) -> None:
        self._run_url = run_url
        self._node = node
        self._emit = emit
        self._report = report
        self._timeouts = timeouts
        self._clock = clock
        self._pace = Pace(settings.drain_bytes_per_s(), clock)
        self._tier: Tier | None = None
        self._is_closed = False
        self._work: _Work | None = None
        self._lock = threading.Lock()  # guards counts: of faults in a plan, of bytes sent

    def work(self, drain: Mapping[str, Any] | None, volume: NodeVolume | None, faults: FaultPoints) -> None:
        """Uploads the ranks that are wanted and were not begun yet; returns when all of them have ended."""
        if drain is None:
            return
        work = self._work
        if work is None or work.write_id != drain["write_id"]:
            work = self._work = _Work(str(drain["write_id"]), Identity.from_json(drain["identity"]))
        ranks = [int(rank) for rank in drain["ranks"] if int(rank) not in work.begun]
        if not ranks:
            return
        work.begun.update(ranks)
        work.again.update(drain["again"])
        work.num_at_once = min(_NUM_RANKS_AT_ONCE, len(ranks))
        side_by_side(
            lambda rank: self._upload(work, rank, volume, faults),
            ranks,
            num_threads=work.num_at_once,
            name=f"ktrain-drain step {work.identity.step}",
        )

    def close(self) -> None:
        """Lets go of the store: an upload that still runs fails with its next call. Idempotent."""
        with self._lock:
            self._is_closed = True
            if self._tier is not None:
                self._tier.close()

    def _upload(self, work: _Work, rank: int, volume: NodeVolume | None, faults: FaultPoints) -> None:
        """Payload, then manifest, straight from the slot, which stays under lease meanwhile; then the report."""
        started_s, at = self._clock.monotonic(), work.identity
        about = {"write_id": work.write_id, "identity": at.to_json(), "rank": rank}
        with ExitStack() as stack:  # the slot is let go of after the report: that takes 20 ms a gigabyte
            try:
                if volume is None:
                    raise NotFoundError(f"rank {rank}, {at}: this node has no volume now")
                slot = stack.enter_context(volume.open(rank, at))
                described = _Described(work, slot.manifest)
                if rank not in work.again or not self._is_there(described.get()[0]):
                    self._write(work, described, slot, volume=volume, faults=faults)
                files, plan_digest = described.get()[0], slot.manifest.plan_digest
            except (KtrainError, OSError) as error:
                failure = f"rank {rank} on {self._node}: {type(error).__name__}: {error}"
                bad_copy = isinstance(error, NotFoundError | BadBytes)  # else it is the way to the store that failed
                self._report({**about, "failure": failure, "bad_copy": bad_copy})
                return
            seconds = self._clock.monotonic() - started_s
            where = {"rank": rank, "step": at.step, "tier": contract.TIER_BUCKET, "node": self._node}
            self._emit("drained", nbytes=files.nbytes, seconds=seconds, **where)
            fields = {name: getattr(files, name) for name in RankFiles.__slots__}
            self._report({**about, "plan_digest": plan_digest, "files": fields})

    def _is_there(self, files: RankFiles) -> bool:
        """Whether another keeper has finished this rank: the manifest is this snapshot's and the payload as long.

        The manifest is written after the payload; whoever wrote it held a snapshot with the same digests.
        """
        tier, folder = self._open_tier(), files.payload.rpartition("/")[0]
        try:
            found = Manifest.from_bytes(tier.read(files.manifest, deadline=self._deadline(0)))
            sizes = {stored.name: stored.nbytes for stored in tier.list(folder, deadline=self._deadline(0))}
        except KtrainError:
            return False  # not there, torn, or it cannot be told: it is uploaded, which names the trouble
        return found.digest() == files.manifest_digest and sizes.get(files.payload) == files.nbytes

    def _write(
        self,
        work: _Work,
        described: _Described,
        slot: SlotReader,
        *,
        volume: NodeVolume,
        faults: FaultPoints,
    ) -> None:
        manifest, step, rank = slot.manifest, work.identity.step, slot.manifest.rank
        name = work.payload_name(rank)
        tier = self._open_tier()
        self._reached(faults, "drain.payload", step, rank)
        deadline = self._deadline(2 * manifest.nbytes * work.num_at_once)  # a part of it may be read back
        try:
            if isinstance(tier, ProvesWrites):
                tier.write_proven(name, slot.memory, self._terms(work, manifest, described), deadline=deadline)
            else:
                self._write_plain(tier, name, slot, deadline)
        except BadBytes as error:
            refuse_slot(volume, manifest, error, emit=self._emit, node=self._node)
            raise
        self._reached(faults, "drain.manifest", step, rank)
        files, data = described.get()
        tier.write(files.manifest, data, deadline=self._deadline(len(data)))

    def _write_plain(self, tier: Tier, name: str, slot: SlotReader, deadline: Deadline) -> None:
        """For tiers of six calls: the proof of the whole slot first."""
        bad = bad_ranges(slot.manifest, slot.memory)
        if bad:
            begin, end = bad[0]
            raise BadBytes(f"rank {slot.manifest.rank}: bytes {begin} to {end} differ from the digest", begin, end)
        self._pace.take(slot.manifest.nbytes, deadline=deadline)
        tier.write(name, slot.memory, deadline=deadline)

    def _terms(self, work: _Work, manifest: Manifest, described: _Described) -> Terms:
        """What the upload of one rank has to keep; tells the head how far it is."""
        total = 0
        about = {"write_id": work.write_id, "identity": work.identity.to_json(), "rank": manifest.rank}

        def sent(nbytes: int) -> None:
            nonlocal total
            with self._lock:
                total += nbytes
                now = total
            self._report({**about, "sent_nbytes": now})
            described.get()

        chunks = Chunks(manifest.chunk_nbytes, manifest.chunks)
        return Terms(chunks, self._pace, work.retries, sent, is_taken_over=manifest.rank in work.again)

    def _deadline(self, nbytes: int) -> Deadline:
        slowest = min(_SLOWEST_BYTES_PER_S, self._pace.bytes_per_s or _SLOWEST_BYTES_PER_S)
        return Deadline.after(self._timeouts.storage_s + nbytes / slowest, self._clock)

    def _reached(self, faults: FaultPoints, point: str, step: int, rank: int) -> None:
        with self._lock:  # a plan counts, and is not made for several threads
            faults.reached(point, step=step, rank=rank)

    def _open_tier(self) -> Tier:
        with self._lock:
            if self._is_closed:
                raise UnavailableError(f"bucket of {self._node}: this node's uploads have ended")
            if self._tier is None:
                self._tier = open_tier(self._run_url, timeouts=self._timeouts)
            return self._tier


def refuse_slot(volume: NodeVolume, manifest: Manifest, bad: BadBytes, *, emit: Callable[..., None], node: str) -> None:
    """Marks a slot whose bytes are not those of its snapshot, and says which."""
    reason = f"bytes {bad.begin} to {bad.end} differ from the digest made at the snapshot"
    volume.discard(manifest.rank, manifest.identity, reason)
    where = {"step": manifest.identity.step, "rank": manifest.rank, "tier": contract.TIER_MEMORY, "where": node}
    emit("bad_copy", reason=reason, begin=bad.begin, end=bad.end, **where)

"""Which step goes into the bucket next, who carries it there, and what to do when that fails.

Guarded by its owner's lock. Everything follows from what keepers report with each beat, so that keepers and heads may
come and go in the middle of a drain (ADR 0013).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract, ids
from ktrain.base.clock import Clock
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.roster import Member
from ktrain.format.manifest import Identity
from ktrain.format.record import RankFiles

_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


class Furthest:
    """The farthest point that was reached, and since when: what goes over the same ground again stands still."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._at: tuple[int, ...] = ()
        self._since_s = clock.monotonic()

    def take(self, at: tuple[int, ...]) -> None:
        """Takes where it is now."""
        if at > self._at:
            self._at, self._since_s = at, self._clock.monotonic()

    def quiet_s(self) -> float:
        """Seconds since it came farther than ever."""
        return self._clock.monotonic() - self._since_s


@dataclass(slots=True)
class Drain:
    """One step on its way into the bucket, under a name that no other step or try has.

    Attributes:
        is_adopted: another head began it, and may have committed it before it died.
        takes_over: another keeper may upload what the first one did not: the store shows objects whole or not at all.
        uploaders: rank -> the instance of the keeper that uploads its files now.
        again: ranks that another instance may have uploaded in part.
        failures: rank -> instances that could not, and why; `bad_copies`: whose copy of the snapshot is no good.
    """

    identity: Identity
    started_s: float  # on the head's monotonic clock
    write_id: str = field(default_factory=ids.random_id)
    takes_over: bool = True
    is_adopted: bool = False
    files: dict[int, RankFiles] = field(default_factory=dict)
    plan_digests: dict[int, str] = field(default_factory=dict)
    failure: str | None = None
    uploaders: dict[int, str] = field(default_factory=dict)
    again: set[int] = field(default_factory=set)
    failures: dict[int, dict[str, str]] = field(default_factory=dict)
    bad_copies: set[tuple[int, str]] = field(default_factory=set)
    moved_s: float = 0.0  # when the last report brought something new
    _sent: dict[tuple[int, str], int] = field(default_factory=dict)
    _able: set[str] = field(default_factory=set)  # instances that have uploaded something whole

    def __post_init__(self) -> None:
        self.moved_s = self.started_s

    def wanted_from(self, instance: str) -> dict[str, Any] | None:
        """What one keeper is to upload; None where it has no part, or all is there."""
        ranks = sorted(rank for rank, uploader in self.uploaders.items() if uploader == instance)
        if not ranks or self.complete():
            return None
        again = sorted(self.again.intersection(ranks))
        return {"identity": self.identity.to_json(), "write_id": self.write_id, "ranks": ranks, "again": again}

    def complete(self) -> bool:
        """True when every rank's files are reported."""
        return len(self.files) == self.identity.world_size

    def nbytes(self) -> int:
        """Bytes that were sent, of each rank by the keeper that has come farthest."""
        sent = {rank: files.nbytes for rank, files in self.files.items()}
        for (rank, _), nbytes in self._sent.items():
            sent[rank] = max(sent.get(rank, 0), nbytes)
        return sum(sent.values())

    def take(self, instance: str, report: Mapping[str, Any], now_s: float) -> None:
        """Adds what a keeper says of one rank, if it is about this drain. Keepers say it again with each beat."""
        if report["write_id"] != self.write_id:
            return
        rank = int(report["rank"])
        if report.get("failure"):
            self.failures.setdefault(rank, {})[instance] = str(report["failure"])
            if report.get("bad_copy"):
                self.bad_copies.add((rank, instance))
        elif report.get("files"):
            if rank not in self.files:
                self.moved_s = now_s
            self.add(RankFiles(**report["files"]), str(report["plan_digest"]))
            self._able.add(instance)
        elif report["sent_nbytes"] > self._sent.get((rank, instance), 0):
            self._sent[(rank, instance)] = report["sent_nbytes"]
            self.moved_s = now_s

    def add(self, files: RankFiles, plan_digest: str) -> None:
        """Adds what is in the store of one rank."""
        self.files[files.rank] = files
        self.plan_digests[files.rank] = plan_digest

    def assign(self, members: Iterable[Member], *, now_s: float, lease_s: float) -> None:
        """Finds an uploader for every rank that has none, or one that fell silent or failed; fails where there is none.

        A rank's own keeper comes first. Others take over when it was not heard of for a lease, or when its copy is bad;
        when its store is away only a keeper that has proven that the store is there, so that a store in trouble is not
        asked by everybody in turn.
        """
        live = [member for member in members if now_s - member.heard_s <= lease_s]
        alive = {member.instance for member in live}
        waiting = [rank for rank in range(self.identity.world_size) if rank not in self.files]
        for rank in waiting:
            if not self._is_at_work(rank, alive):
                self._find_uploader(rank, live, patient=now_s - self.started_s < lease_s)
        at_work = {rank for rank in waiting if self._is_at_work(rank, alive)}
        for rank in waiting:
            failures = list(self.failures.get(rank, {}).values())
            if rank in at_work or self.failure is not None:
                continue
            if failures and (not at_work or not self.takes_over):
                self.failure = failures[-1]
            elif rank in self.uploaders and not self.takes_over:
                self.failure = f"the keeper that uploaded rank {rank} fell silent"
            elif now_s - self.moved_s > lease_s and not any((rank, self.identity) in member.held for member in live):
                self.failure = f"no node that answers holds rank {rank} of {self.identity} any more"

    def _is_at_work(self, rank: int, alive: Collection[str]) -> bool:
        uploader = self.uploaders.get(rank)
        return uploader in alive and uploader not in self.failures.get(rank, {})

    def _find_uploader(self, rank: int, live: Iterable[Member], *, patient: bool) -> None:
        failed = self.failures.get(rank, {})
        begun = rank in self.uploaders
        if begun and not self.takes_over:
            return
        holders = [one for one in live if (rank, self.identity) in one.held and one.instance not in failed]
        only_copies_failed = all((rank, instance) in self.bad_copies for instance in failed)
        if not only_copies_failed:
            holders = [one for one in holders if one.instance in self._able]
        own = [one for one in holders if rank in one.ranks]
        if own or (holders and self.takes_over and (failed or not patient)):
            self.uploaders[rank] = (own or holders)[0].instance
            if begun:
                self.again.add(rank)


class DrainSchedule:
    """The bucket takes the newest step committed in memory whenever its drain is idle; one drain at a time."""

    def __init__(self, *, timeouts: Timeouts, emit: Callable[..., None], clock: Clock, takes_over: bool = True) -> None:
        self._timeouts = timeouts
        self._emit = emit
        self._clock = clock
        self._takes_over = takes_over
        self.current: Drain | None = None
        self.last_done: Identity | None = None
        self._failures = 0
        self._last_failure: str | None = None
        self._furthest = Furthest(clock)
        self._after_s = 0.0
        self._own: set[str] = set()  # write ids of this head
        self._heard: dict[Identity, str] = {}  # what keepers upload for a head that is gone: its write id

    def new_attempt(self) -> None:
        """A new attempt begins, or one ends: the drain goes on; one that waits after a failure is tried anew."""
        self._after_s = 0.0
        self._furthest = Furthest(self._clock)  # it may have gone back to an older step

    def take(self, instance: str, reports: Iterable[Mapping[str, Any]]) -> None:
        """Takes what a keeper has uploaded."""
        for report in reports:
            if self.current is not None:
                self.current.take(instance, report, self._clock.monotonic())
            elif report["write_id"] not in self._own:
                self._heard[Identity.from_json(report["identity"])] = str(report["write_id"])
        if self.current is not None:
            self._furthest.take((self.current.identity.step, self.current.nbytes()))

    def quiet_s(self) -> float:
        """Seconds since something came nearer to the bucket than before; a drain that begins again has not."""
        return self._furthest.quiet_s()

    def to_json(self) -> dict[str, Any]:
        """What a rank that waits for the bucket is told."""
        word: dict[str, Any] = {"failure": self._last_failure}
        drain = self.current
        if drain is not None:
            word |= {"step": drain.identity.step, "nbytes": drain.nbytes()}
            word |= {"num_ranks": len(drain.files), "world_size": drain.identity.world_size}
        return word

    def begin(self, memory: Identity | None, bucket: Identity | None, *, every: int, last: bool) -> None:
        """Starts a drain of `memory` when it is due; `last` does not wait for the distance of `every` steps."""
        if self.current is not None or memory is None or memory == bucket or self._clock.monotonic() < self._after_s:
            return
        if bucket is not None and (memory.step, memory.epoch) < (bucket.step, bucket.epoch):
            return
        if last or bucket is None or memory.step - bucket.step >= every:
            write_id = self._heard.get(memory) if self._takes_over else None
            self.current = Drain(
                memory, self._clock.monotonic(), write_id=write_id or ids.random_id(), takes_over=self._takes_over
            )
            if write_id is not None:
                self.current.is_adopted = True
                self.current.again = set(range(memory.world_size))
            self._own.add(self.current.write_id)
            self._heard = {}

    def drop_unless(self, wanted: Callable[[Identity], bool]) -> None:
        """Forgets the current drain where its step is wanted no more (it is off the line of the attempt that runs)."""
        if self.current is not None and not wanted(self.current.identity):
            self.current = None

    def assign(self, members: Iterable[Member]) -> None:
        """Says who uploads what now."""
        if self.current is not None:
            now_s = self._clock.monotonic()
            self.current.assign(members, now_s=now_s, lease_s=self._timeouts.lease_s)

    def wanted_from(self, instance: str) -> dict[str, Any] | None:
        """What one keeper is to upload now."""
        return None if self.current is None else self.current.wanted_from(instance)

    def try_complete(self) -> Drain | None:
        """The current drain once all its files are reported; one that failed or stands still is given up here."""
        drain = self.current
        if drain is None:
            return None
        if drain.failure is None and self._clock.monotonic() - drain.moved_s > self._timeouts.drain_s:
            late = sorted(set(range(drain.identity.world_size)) - set(drain.files))
            drain.failure = f"ranks {late} uploaded nothing more for {self._timeouts.drain_s:g} s"
        if drain.failure is not None and not drain.complete():
            self.failed(drain, drain.failure)
            return None
        return drain if drain.complete() else None

    def failed(self, drain: Drain, reason: str) -> None:
        """Says once that the tier fails, and waits a little longer each time before the next try."""
        if self._failures == 0:
            self._emit("tier_failed", tier=contract.TIER_BUCKET, step=drain.identity.step, reason=reason)
        self._after_s = self._clock.monotonic() + _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
        self._failures += 1
        self._last_failure = reason
        if self.current is drain:
            self.current = None

    def done(self, drain: Drain) -> bool:
        """The drain is committed; false when it was dropped meanwhile, so that it means nothing to this attempt."""
        if self._failures:
            self._emit("tier_recovered", tier=contract.TIER_BUCKET)
        self._failures, self._last_failure = 0, None
        if self.current is not drain:
            return False
        self.current = None
        self.last_done = drain.identity
        self._emit(
            "committed",
            step=drain.identity.step,
            tier=contract.TIER_BUCKET,
            nbytes=sum(files.nbytes for files in drain.files.values()),
            seconds=self._clock.monotonic() - drain.started_s,
        )
        return True

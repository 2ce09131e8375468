"""Which step goes into the bucket next, and what to do when that fails. Guarded by its owner's lock."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract, ids
from ktrain.base.clock import Clock
from ktrain.base.settings import Timeouts
from ktrain.format.manifest import Identity
from ktrain.format.record import RankFiles

_RETRY_S = (1.0, 2.0, 5.0, 10.0, 30.0)


@dataclass(slots=True)
class Drain:
    """One step on its way into the bucket, under a name that no other try has."""

    identity: Identity
    started_s: float  # on the head's monotonic clock
    write_id: str = field(default_factory=ids.random_id)
    files: dict[int, RankFiles] = field(default_factory=dict)
    plan_digests: dict[int, str] = field(default_factory=dict)
    failure: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"identity": self.identity.to_json(), "write_id": self.write_id}

    def complete(self) -> bool:
        """True when every rank has reported its files."""
        return len(self.files) == self.identity.world_size

    def take(self, report: dict[str, Any]) -> None:
        """Adds one rank's report, if it is about this drain."""
        if report["write_id"] != self.write_id:
            return
        if report.get("failure"):
            self.failure = str(report["failure"])
            return
        files = RankFiles(**report["files"])
        self.files[files.rank] = files
        self.plan_digests[files.rank] = str(report["plan_digest"])


class DrainSchedule:
    """The bucket takes the newest step committed in memory whenever its drain is idle; one drain at a time."""

    def __init__(self, *, timeouts: Timeouts, emit: Callable[..., None], clock: Clock) -> None:
        self._timeouts = timeouts
        self._emit = emit
        self._clock = clock
        self.current: Drain | None = None
        self._failures = 0
        self._after_s = 0.0

    def reset(self) -> None:
        """A new attempt: what the old one was draining is dropped (its files were never committed)."""
        self.current = None
        self._after_s = 0.0

    def take(self, reports: Iterable[dict[str, Any]]) -> None:
        """Takes what ranks have uploaded."""
        if self.current is not None:
            for report in reports:
                self.current.take(report)

    def begin(self, memory: Identity | None, bucket: Identity | None, *, every: int, last: bool) -> None:
        """Starts a drain of `memory` when it is due; `last` does not wait for the distance of `every` steps."""
        if self.current is not None or memory is None or memory == bucket or self._clock.monotonic() < self._after_s:
            return
        if bucket is not None and (memory.step, memory.epoch) < (bucket.step, bucket.epoch):
            return
        if last or bucket is None or memory.step - bucket.step >= every:
            self.current = Drain(identity=memory, started_s=self._clock.monotonic())

    def try_complete(self) -> Drain | None:
        """The current drain once all its files are reported; one that failed or is late is given up here."""
        drain = self.current
        if drain is None:
            return None
        if drain.failure is None and self._clock.monotonic() - drain.started_s > self._timeouts.drain_s:
            late = sorted(set(range(drain.identity.world_size)) - set(drain.files))
            drain.failure = f"ranks {late} did not upload theirs within {self._timeouts.drain_s:g} s"
        if drain.failure is not None:
            self.failed(drain, drain.failure)
            return None
        return drain if drain.complete() else None

    def failed(self, drain: Drain, reason: str) -> None:
        """Says once that the tier fails, and waits a little longer each time before the next try."""
        if self._failures == 0:
            self._emit("tier_failed", tier=contract.TIER_BUCKET, step=drain.identity.step, reason=reason)
        self._after_s = self._clock.monotonic() + _RETRY_S[min(self._failures, len(_RETRY_S) - 1)]
        self._failures += 1
        if self.current is drain:
            self.current = None

    def done(self, drain: Drain) -> bool:
        """The drain is committed; false when a new attempt has begun meanwhile, to which it means nothing."""
        if self._failures:
            self._emit("tier_recovered", tier=contract.TIER_BUCKET)
        self._failures = 0
        if self.current is not drain:
            return False
        self.current = None
        self._emit(
            "committed",
            step=drain.identity.step,
            tier=contract.TIER_BUCKET,
            nbytes=sum(files.nbytes for files in drain.files.values()),
            seconds=self._clock.monotonic() - drain.started_s,
        )
        return True

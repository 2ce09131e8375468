"""Removing from the bucket what a policy gives up and what dead attempts left: plan, execute, verify (ADR 0012).

Invariant: what cannot be told stays. Nothing goes while the newest checkpoint of the line is not proven, and no object
goes whose name ktrain does not give.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace

from ktrain.abc.tier import Stored
from ktrain.base import ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import AttemptRecord, RunCatalog
from ktrain.checkpoint.commit import prove
from ktrain.checkpoint.marks import (
    Marks,
    MetricBook,
    Reader,
    ReaderWatch,
    Write,
    doomed_name,
    metrics_name,
    read_marks,
    remove_mark,
    write_mark,
)
from ktrain.checkpoint.removal import Removal, Seen, Terms, abandoned, given_up, off_line, unfinished, why_protected
from ktrain.errors import ConflictError, KtrainError, NotFoundError
from ktrain.format import record as records

_DELETES_AT_ONCE = 8  # of thousands of ranks' files, while the head's thread has commits to make


@dataclass(frozen=True, slots=True)
class Plan:
    """What goes, and why the rest of what could go does not.

    Attributes:
        spared: (step, reason) of what is superseded and stays all the same.
        doubts: reasons why nothing goes at all.
        waiting: uploads that go once they did not change for the grace.
        readers: who reads now, as far as can be told.
        stale: marks of readers that are dead, and of removals that are not wanted any more.
    """

    removals: tuple[Removal, ...] = ()
    spared: tuple[tuple[int, str], ...] = ()
    doubts: tuple[str, ...] = ()
    waiting: tuple[Write, ...] = ()
    readers: tuple[Reader, ...] = ()
    stale: tuple[str, ...] = ()


@dataclass(slots=True)
class Outcome:
    """What went. `failure` ended the work; what it left is gone on with by the next collection.

    `doubts` are those of the plan: reasons why nothing went at all.
    """

    removed: list[Removal] = field(default_factory=list)
    spared: list[tuple[int, str]] = field(default_factory=list)
    failure: KtrainError | None = None
    doubts: tuple[str, ...] = ()


class Collector:
    """Removes from one run. Remembers what it saw, so keep it as long as the run is watched. Use from one thread."""

    def __init__(
        self, catalog: RunCatalog, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK, grace_s: float | None = None
    ) -> None:
        self._catalog = catalog
        self._clock = clock
        self._watch = ReaderWatch(timeouts.lease_s, clock)
        self._lease_s = timeouts.lease_s
        self._grace_s = timeouts.drain_s if grace_s is None else grace_s
        self._uploads: dict[Write, tuple[tuple[Stored, ...], float]] = {}  # as seen, and since when unchanged

    def collect(self, terms: Terms, book: MetricBook | None = None) -> Outcome:
        """Records late metrics, then removes what goes now.

        Raises:
            UnavailableError, DeadlineError: the run could not be read; nothing was removed.
        """
        seen = Seen.read(self._catalog)
        if book is not None:
            seen = self._record_metrics(seen, book)
        return self.carry_out(self.plan(seen, terms), terms)

    def plan(self, seen: Seen, terms: Terms) -> Plan:
        """Decides what goes; reads manifests to prove the newest, changes nothing."""
        readers = tuple(self._watch.living(seen.marks))
        found = [*unfinished(seen), *given_up(seen, terms)]
        if terms.holds_run:
            found += off_line(seen, terms)
        grown, waiting = self._settled(abandoned(seen, terms))
        found += grown
        spared = [(removal, why_protected(removal, seen.marks, readers)) for removal in found]
        going = tuple(removal for removal, reason in spared if reason is None)
        dead = [reader.name for reader in seen.marks.readers if reader not in readers]
        unwanted = seen.marks.doomed - {removal.write for removal in going}
        stale = (*dead, *map(doomed_name, sorted(unwanted)))
        doubts = tuple(self._doubts(seen, terms)) if going or waiting or stale else ()
        return Plan(
            removals=() if doubts else going,
            spared=tuple((removal.step, reason) for removal, reason in spared if reason is not None),
            doubts=doubts,
            waiting=waiting,
            readers=readers,
            stale=() if doubts else stale,
        )

    def plan_watched(self, terms: Terms, say_wait: Callable[[float], None]) -> tuple[Seen, Plan]:
        """Like `plan`, for who looks only once: first watches uploads and readers until they are known to be dead.

        `say_wait` is told the seconds, where it takes any.
        """
        seen = Seen.read(self._catalog)
        plan = self.plan(seen, terms)
        waits = [self._grace_s] if plan.waiting else []
        waits += [max(self._lease_s, 3 * reader.renew_s) for reader in plan.readers]
        if waits and not plan.doubts:
            say_wait(max(waits))
            self._clock.sleep(max(waits))
            seen = Seen.read(self._catalog)
            plan = self.plan(seen, terms)
        return seen, plan

    def carry_out(self, plan: Plan, terms: Terms) -> Outcome:
        """Removes what the plan says, except what somebody has named since."""
        outcome = Outcome(spared=list(plan.spared), doubts=plan.doubts)
        try:
            if plan.stale or plan.removals:
                self._require_newest_attempt(terms)
            for name in plan.stale:
                remove_mark(self._catalog, name)
            for removal in plan.removals:
                write_mark(self._catalog, doomed_name(removal.write), {"by": ids.process_name()})
            self._remove(plan, terms, outcome)
        except KtrainError as error:
            outcome.failure = error
        return outcome

    def _remove(self, plan: Plan, terms: Terms, outcome: Outcome) -> None:
        looked_s, marks = 0.0, None
        for removal in plan.removals:
            if marks is None or self._clock.monotonic() - looked_s >= self._lease_s / 2:
                looked_s = self._clock.monotonic()
                marks = read_marks(self._catalog)
                self._require_newest_attempt(terms)
            reason = why_protected(removal, marks, self._watch.living(marks))
            if marks.unknown:
                reason = f"{marks.unknown[0]} is a mark of another ktrain"
            if reason is None and removal.record is None and self._is_committed(removal.write):
                reason = "its record was written meanwhile"
            if reason is not None:
                outcome.spared.append((removal.step, reason))
                remove_mark(self._catalog, doomed_name(removal.write))
                continue
            self._remove_one(removal, marks, outcome)

    def _remove_one(self, removal: Removal, marks: Marks, outcome: Outcome) -> None:
        if removal.record is not None:
            self._delete(removal.record)
        outcome.removed.append(removal)  # from here on it is no checkpoint, whatever becomes of its files
        with ThreadPoolExecutor(_DELETES_AT_ONCE, thread_name_prefix="ktrain-collect") as pool:
            list(pool.map(self._delete, [stored.name for stored in removal.files]))
        step, epoch, _ = removal.write
        if (step, epoch) in marks.metrics:
            remove_mark(self._catalog, metrics_name(step, epoch))
        remove_mark(self._catalog, doomed_name(removal.write))

    def _delete(self, name: str) -> None:
        self._catalog.tier.delete(name, deadline=self._catalog.transfer_deadline(0))

    def _is_committed(self, write: Write) -> bool:
        """Whether there is a record of this try; read by its name, which no listing can hide."""
        try:
            self._catalog.tier.read(records.commit_name(*write), deadline=self._catalog.transfer_deadline(0))
        except NotFoundError:
            return False
        return True

    # Doubts

    def _doubts(self, seen: Seen, terms: Terms) -> Iterable[str]:
        line = terms.usable(seen.line())
        if seen.listing.newer:
            yield f"{seen.listing.newer[0]} is of a newer ktrain"
        if seen.marks.unknown:
            yield f"{seen.marks.unknown[0]} is a mark of another ktrain"
        for attempt in seen.attempts:
            if attempt.epoch > terms.epoch:
                yield f"attempt {attempt.epoch} is newer than this one, {terms.epoch}"
            elif attempt.restored_step is None and (attempt.committed is not None or attempt.durable is not None):
                yield f"attempt {attempt.epoch} has committed, and what it continued from cannot be read"
            elif attempt.committed is None and _made_durable(attempt):
                yield f"attempt {attempt.epoch} has a durable commit, and its first commit cannot be read"
        if not line:
            yield "no checkpoint of the line is there"
            return
        if terms.newest is not None and line[-1].identity != terms.newest:
            yield f"the newest in the listing is {line[-1].identity}, not the one just committed, {terms.newest}"
        try:
            prove(self._catalog, line[-1])
        except KtrainError as error:
            yield f"the newest checkpoint cannot be proven: {error}"

    def _require_newest_attempt(self, terms: Terms) -> None:
        newest = self._catalog.newest_epoch()
        if newest > terms.epoch:
            raise ConflictError(f"attempt {terms.epoch}: attempt {newest} has begun; what goes is for that one to say")

    # Uploads that never became a checkpoint

    def _settled(self, uploads: list[Removal]) -> tuple[list[Removal], tuple[Write, ...]]:
        """Those that did not change while they were watched for the grace, and those that are watched still."""
        now = self._clock.monotonic()
        known, self._uploads = self._uploads, {}
        settled, waiting = [], []
        for upload in uploads:
            files, since_s = known.get(upload.write, ((), now))
            since_s = since_s if files == upload.files else now
            self._uploads[upload.write] = (upload.files, since_s)
            if now - since_s >= self._grace_s:
                settled.append(upload)
            else:
                waiting.append(upload.write)
        return settled, tuple(waiting)

    # Metrics

    def _record_metrics(self, seen: Seen, book: MetricBook) -> Seen:
        """Values that came after their commit are written beside it, so that the next head knows them too."""
        fresh: dict[tuple[int, int], Mapping[str, float]] = {}
        for commit in seen.listing.commits:
            key = (commit.identity.step, commit.identity.epoch)
            have, said = seen.metrics_of(commit), book.of(*key)
            if any(have.get(name) != value for name, value in said.items()):
                fresh[key] = {**have, **said}
                write_mark(self._catalog, metrics_name(*key), {"metrics": fresh[key]})
        return replace(seen, marks=replace(seen.marks, metrics={**seen.marks.metrics, **fresh}))


def _made_durable(attempt: AttemptRecord) -> bool:
    """Whether what it brought into the bucket first was its own; else it was the step that it continued from."""
    return attempt.durable is not None and attempt.durable.get("step") != attempt.restored_step

"""The head's word on what goes from the nodes' own disks (ADR 0023).

Invariant: what cannot be told stays. The newest checkpoint that is whole on the disks is never named.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace

from ktrain.base.clock import Clock
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import lineage
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.commits import Commits
from ktrain.checkpoint.direct import RestoreDirector
from ktrain.checkpoint.lineage import Inventories
from ktrain.checkpoint.log import read_backwards
from ktrain.checkpoint.marks import MetricBook
from ktrain.checkpoint.policy import Keep
from ktrain.checkpoint.quarantine import Quarantine, Review, read_marks
from ktrain.checkpoint.retention import Committed, Retention, needs_facts, superseded
from ktrain.checkpoint.roster import Attempt, Roster
from ktrain.errors import KtrainError
from ktrain.format.manifest import Identity

Key = tuple[int, int]  # (step, epoch)


@dataclass(frozen=True, slots=True)
class DiskView:
    """What one decision is made of.

    Attributes:
        disks: what every node's disk holds, as its keeper last said.
        restored: what the attempt continued from; None where it began anew, or where that is not known.
        review: the run's attempts and what was set aside, as the restore found them.
    """

    attempt: Attempt
    disks: Inventories
    restored: Identity | None
    review: Review
    policy: Retention


def view_of(
    attempt: Attempt, commits: Commits, roster: Roster, director: RestoreDirector | None, keep: Keep
) -> DiskView | None:
    """What to decide on; None while nothing may go.

    That is until the attempt has a whole checkpoint of its own on the disks, while steps are in doubt, and while a node
    has not said what its disk holds.
    """
    newest = commits.disk
    if director is None or newest is None or newest.epoch != attempt.epoch:
        return None
    if director.review.trouble.doubts(newest.step) or not roster.all_disks_seen(attempt.nodes):
        return None
    return DiskView(attempt, roster.disks(), director.restored, director.review, keep.on_disk)


def key_of(identity: Identity) -> Key:
    """Names a step as nodes name it."""
    return identity.step, identity.epoch


def is_on_line(view: DiskView, identity: Identity) -> bool | None:
    """Whether a restore could choose it; None where that cannot be told."""
    epoch = view.attempt.epoch
    if identity.epoch == epoch:
        return True
    if view.restored is None or identity.epoch > epoch:
        return None
    earlier = [attempt for attempt in view.review.attempts if attempt.epoch < epoch]
    return identity.step <= view.restored.step and lineage.on_line(identity, earlier)


def given_up(
    view: DiskView, set_aside: Callable[[Identity], bool], fact_of: Callable[[Identity], Committed | None]
) -> list[Key]:
    """What goes from the disks, oldest first.

    That is what the policy gives up of the whole checkpoints of the line; and what is not whole or off the line, where
    a newer one is whole. What is set aside, or cannot be told, neither goes nor counts.
    """
    home = view.attempt.home
    found = {at: ranks for at, ranks in lineage.copies_by_rank(view.disks).items() if not set_aside(at)}
    lines = {identity: is_on_line(view, identity) for identity in found}
    whole = [
        identity
        for identity, ranks in found.items()
        if lines[identity]
        and identity.world_size == len(home)
        and all(node in ranks.get(rank, ()) for rank, node in home.items())
    ]
    if not whole:
        return []
    newest = max(whole, key=_age)
    facts = [fact for identity in whole if (fact := fact_of(identity)) is not None]
    policy_gone = {(old.step, old.epoch) for old in superseded(facts, view.policy)} - {key_of(newest)}
    rest = {
        key_of(identity)
        for identity in found
        if identity not in whole and lines[identity] is not None and _age(identity) < _age(newest)
    }
    return sorted(policy_gone | rest)


def _age(identity: Identity) -> Key:
    return identity.epoch, identity.step


class DiskSweep:
    """Decides for one run on the nodes' disks, again and again. `decide` is for one thread, the rest for any."""

    def __init__(self, catalog: RunCatalog, *, emit: Callable[..., None], timeouts: Timeouts, clock: Clock) -> None:
        self._catalog = catalog
        self._emit = emit
        self._timeouts = timeouts
        self._clock = clock
        self._news = _News()
        self._facts: dict[Key, Committed] = {}  # of what lies on disks
        self._looked_for: set[Key] = set()  # in the log
        self._quarantine: Quarantine | None = None  # as last read while this attempt ran
        self._decided_on: object = None
        self._gone: tuple[int, tuple[Key, ...]] = (0, ())  # epoch, and what is to go within it; replaced whole
        self._is_in_trouble = False  # said once

    def take(self, event: Event) -> None:
        """Takes when a step was made, its loss, and values that were logged."""
        self._news.take(event)

    def gone(self, epoch: int) -> tuple[Key, ...]:
        """(step, epoch) of what is to go from every disk now, while the attempt of `epoch` runs."""
        decided_for, keys = self._gone
        return keys if decided_for == epoch else ()

    def decide(self, view: DiskView | None) -> None:
        """Decides anew where something has changed. Without a view nothing may go for now."""
        if view is None:
            self._gone, self._decided_on = (0, ()), None
            return
        if view.attempt.epoch != self._gone[0]:
            self._quarantine = None
        held = frozenset((node, rank, identity) for node, found in view.disks.items() for rank, identity in found)
        if (view.attempt.epoch, view.policy, held) == self._decided_on:
            return
        self._refresh({key_of(identity) for _, _, identity in held}, needs_facts(view.policy))
        facts = self._facts if needs_facts(view.policy) else None
        quarantine = self._quarantine or view.review.quarantine

        def fact_of(identity: Identity) -> Committed | None:
            return Committed(*key_of(identity)) if facts is None else facts.get(key_of(identity))

        self._gone = view.attempt.epoch, tuple(given_up(view, quarantine.holds, fact_of))
        self._decided_on = (view.attempt.epoch, view.policy, held)

    def _refresh(self, keys: set[Key], needs: bool) -> None:
        """Brings what is known beside the disks up to date: what is set aside, and where needed times and metrics."""
        trouble: KtrainError | OSError | None = None
        self._facts = {key: fact for key, fact in self._facts.items() if key in keys}
        self._news.learn(keys, self._facts)
        try:
            self._quarantine = read_marks(self._catalog)
            missing = keys - self._facts.keys() - self._looked_for
            if needs and missing:
                self._read_log(missing)
        except (KtrainError, OSError) as error:
            trouble = error
        if trouble is not None and not self._is_in_trouble:
            self._emit("notice", message=f"what is not known of steps on the nodes' disks keeps them there: {trouble}")
        self._is_in_trouble = trouble is not None

    def _read_log(self, keys: set[Key]) -> None:
        """What an earlier head saw of these steps; what the log does not have keeps them there."""
        tier, news = self._catalog.tier, _News()
        blocks = list(read_backwards(tier.url, tier, timeouts=self._timeouts, clock=self._clock))
        for event in itertools.chain.from_iterable(reversed(blocks)):
            if (event.fields.get("step"), event.attempt) in keys:
                news.take(event)
        news.learn(keys, self._facts)
        self._looked_for |= keys


class _News:
    """When the newest steps were made, and their metrics, until they are asked for. Safe from any thread."""

    def __init__(self, limit: int = 2000) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._times: dict[Key, float] = {}  # oldest first; guarded by _lock
        self._metrics = MetricBook(limit)

    def take(self, event: Event) -> None:
        self._metrics.take(event)
        if event.kind == "step":
            with self._lock:
                self._times[int(event.fields["step"]), event.attempt] = event.time
                while len(self._times) > self._limit:
                    del self._times[next(iter(self._times))]

    def learn(self, keys: set[Key], facts: dict[Key, Committed]) -> None:
        """Adds to `facts` what is known of these. A step of whose end nothing was heard is not known."""
        with self._lock:
            times = {key: self._times[key] for key in keys & self._times.keys()}
        for key in keys & (times.keys() | facts.keys()):
            known = facts.get(key) or Committed(*key, times[key])
            facts[key] = replace(known, metrics={**known.metrics, **self._metrics.of(*key)})

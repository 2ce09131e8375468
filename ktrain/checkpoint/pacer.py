"""The head's side of `every="auto"` (ADR 0019): measures from events that pass by, decides, has the ranks agree.

Not thread-safe; its owner holds the lock.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from statistics import median
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import cadence
from ktrain.checkpoint.cadence import Cadence, ChangeAgreement, History, Measured
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.policy import Every
from ktrain.errors import NotFoundError

_WINDOW = 64  # samples that a median is taken of
_SAVES = 16  # the same for saves, which are rare
_LEAST_SAVES = 4  # before the first decision
_LEAST_STEPS = 8
_SLOWDOWN_PRIOR = 0.02  # by a drain, before steps with and without one were seen


class _Samples:
    """The newest samples of one duration."""

    def __init__(self) -> None:
        self._values: deque[float] = deque(maxlen=_WINDOW)

    def add(self, value: float) -> None:
        self._values.append(value)

    def __len__(self) -> int:
        return len(self._values)

    def median(self) -> float:
        """Of the samples; 0 without any."""
        return median(self._values) if self._values else 0.0


class Pacer:
    """The cadence of one run, attempt after attempt. Without `Every.auto` it passes the numbers on as they are."""

    def __init__(self, emit: Callable[..., None], *, timeouts: Timeouts, clock: Clock) -> None:
        self._emit = emit
        self._timeouts = timeouts
        self._clock = clock
        self._declared = Every()
        self._chosen: Cadence | None = None  # None: nothing was decided yet
        self._agreement = ChangeAgreement()
        self._history = History()
        self._began_s = clock.monotonic()
        self._stalls: dict[int, float] = {}  # step -> stall of the slowest rank so far
        self._own_stall: tuple[int, float] = (-1, 0.0)  # rank 0's last save: step, stall
        self._last_step: tuple[int, int, float] | None = None  # attempt, step, its time on rank 0's clock
        self._quiet_steps, self._drained_steps = _Samples(), _Samples()
        self._copies, self._drains, self._disks, self._restores = (_Samples() for _ in range(4))
        self._committed_s: dict[int, float] = {}  # step -> when memory had it
        self._num_saves = 0  # committed since the last decision
        self.draining = False

    # What the rest of the head asks

    @property
    def every(self) -> Every:
        """The cadence that holds now, in numbers."""
        found = self._chosen
        return self._declared if found is None else Every(found.memory, found.bucket, found.disk, self._declared.auto)

    @property
    def is_auto(self) -> bool:
        return self._declared.auto is not None

    def to_json(self) -> list[int] | None:
        """The newest change, for the ranks; None where there is none."""
        return None if self._agreement.change is None else self._agreement.change.to_json()

    # What it is told

    def begin_attempt(self) -> None:
        """A new attempt: its ranks follow the newest cadence from their first step on."""
        self._agreement = ChangeAgreement()
        self._began_s = self._clock.monotonic()
        self._last_step = None
        self._stalls, self._committed_s, self._num_saves = {}, {}, 0
        self._announce_at_start()

    def declare(self, every: Every) -> None:
        """Takes the cadence that the run's first rank declared."""
        if every == self._declared:
            return
        self._declared, self._chosen = every, None
        self._agreement = ChangeAgreement()

    def recall(self, history: History, last: Cadence | None) -> None:
        """What is known of the run's earlier attempts, and what they chose last; before any rank trains."""
        self._history = history
        if self._declared.auto is None or self._chosen is not None or last is None:
            return
        auto = self._declared.auto
        self._chosen = replace(last, memory=min(auto.most, max(auto.least, last.memory)))
        self._announce_at_start()

    def _announce_at_start(self) -> None:
        if self._chosen is not None:
            self._agreement.announce(self._chosen.memory, at_step=0, lead=1)

    def hear(self, views: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes the changes that some ranks follow; what another head has chosen is gone on with."""
        if self._declared.auto is None or not views:
            return
        self._agreement.hear(views)
        change = self._agreement.change
        if change is not None and self._chosen is None:
            self._chosen = Cadence(change.memory, self._declared.disk, self._declared.bucket)

    def take(self, events: Iterable[Event]) -> None:
        """Takes events of ranks, keepers and head."""
        for event in events:
            handler = _HANDLERS.get(event.kind)
            if handler is not None:
                handler(self, event.fields, event)

    def _on_step(self, fields: Mapping[str, Any], event: Event) -> None:
        step = int(fields["step"])
        known, self._last_step = self._last_step, (event.attempt, step, event.time)
        if known is None or known[:2] != (event.attempt, step - 1):
            return
        took_s = event.time - known[2] - (self._own_stall[1] if self._own_stall[0] == step - 1 else 0.0)
        if took_s > 0:  # a wall clock may be set back
            (self._drained_steps if self.draining else self._quiet_steps).add(took_s)

    def _on_snapshot(self, fields: Mapping[str, Any], event: Event) -> None:
        step, stall_s = int(fields["step"]), float(fields["stall_s"])
        self._stalls[step] = max(stall_s, self._stalls.get(step, 0.0))
        if len(self._stalls) > _SAVES:
            del self._stalls[min(self._stalls)]
        if fields["rank"] == 0:
            self._own_stall = (step, stall_s)

    def _on_committed(self, fields: Mapping[str, Any], event: Event) -> None:
        step, tier, now_s = int(fields["step"]), fields["tier"], self._clock.monotonic()
        if tier == contract.TIER_MEMORY:
            self._num_saves += 1
            self._committed_s = {**dict(list(self._committed_s.items())[-_SAVES:]), step: now_s}
        elif tier == contract.TIER_DISK and step in self._committed_s:
            self._disks.add(now_s - self._committed_s[step])
        elif tier == contract.TIER_BUCKET:
            self._drains.add(float(fields["seconds"]))

    def _on_replicated(self, fields: Mapping[str, Any], event: Event) -> None:
        self._copies.add(float(fields["seconds"]))

    def _on_restored(self, fields: Mapping[str, Any], event: Event) -> None:
        self._restores.add(float(fields["seconds"]))

    # Decisions

    def measured(self) -> Measured | None:
        """What a decision is made from; None while too little was seen."""
        num_steps = len(self._quiet_steps) + len(self._drained_steps)
        if len(self._stalls) < _LEAST_SAVES or num_steps < _LEAST_STEPS:
            return None
        quiet_s, drained_s = self._quiet_steps.median(), self._drained_steps.median()
        seen = min(len(self._quiet_steps), len(self._drained_steps)) >= _LEAST_STEPS
        before = self._history
        return Measured(
            step_s=quiet_s or drained_s,
            stall_s=median(self._stalls.values()),
            copy_s=self._copies.median(),
            drain_s=self._drains.median(),
            disk_s=self._disks.median(),
            slowdown=max(0.0, drained_s / quiet_s - 1) if seen else _SLOWDOWN_PRIOR,
            restore_s=self._restores.median(),
            history=History(
                before.failures, before.losses, before.observed_s + self._clock.monotonic() - self._began_s
            ),
        )

    def decide(self, views_of: Callable[[], Mapping[int, Mapping[str, Any]]]) -> tuple[int, Cadence] | None:
        """Chooses again, once enough was saved since the last time, and announces what is better by more than a bit.

        Returns the newest step and what was chosen; None where all stays as it is.
        """
        auto = self._declared.auto
        if auto is None or self._num_saves < _LEAST_SAVES:
            return None
        measured, views = self.measured(), views_of()
        if measured is None or not views:
            return None
        self._num_saves = 0
        first = self._chosen is None
        current = Cadence(self.every.memory, self.every.disk, self.every.bucket)
        found = cadence.choose(current, measured, auto)
        if found == current and not first:
            return None
        self._chosen = found
        from_step = None
        newest = max(int(view["step"]) for view in views.values())
        if found.memory != current.memory:
            lead = 2 + int(2 * self._timeouts.beat_s / measured.step_s)  # so far ranks get while word travels
            from_step = self._agreement.announce(found.memory, at_step=newest, lead=lead).from_step
        self._emit(
            "cadence",
            memory=found.memory,
            disk=found.disk,
            bucket=found.bucket,
            from_step=from_step,
            reason=cadence.reason(found, measured, auto),
            measured=asdict(measured),
            formula=cadence.FORMULA,
        )
        return newest, found


# The run's record of what was chosen, for the next launch


def read_last(catalog: RunCatalog) -> Cadence | None:
    """The cadence that the run chose last; None where it never did.

    Raises:
        UnavailableError, DeadlineError: the store could not be asked.
    """
    found = catalog.tier.list(f"{contract.CADENCE_DIR}/", deadline=catalog.transfer_deadline(0))
    for name in sorted((stored.name for stored in found), reverse=True):
        try:
            return Cadence(**json.loads(catalog.tier.read(name, deadline=catalog.transfer_deadline(0))))
        except (ValueError, TypeError, NotFoundError):
            continue  # torn: the one before it
    return None


def write_last(catalog: RunCatalog, epoch: int, step: int, chosen: Cadence) -> None:
    """Records what an attempt chose at a step."""
    name = f"{contract.CADENCE_DIR}/{epoch:06d}-{step:012d}.json"
    catalog.tier.write(name, json.dumps(asdict(chosen)).encode(), deadline=catalog.transfer_deadline(0))


_HANDLERS: dict[str, Callable[[Pacer, Mapping[str, Any], Event], None]] = {
    "step": Pacer._on_step,
    "snapshot": Pacer._on_snapshot,
    "committed": Pacer._on_committed,
    "replicated": Pacer._on_replicated,
    "restored": Pacer._on_restored,
}

"""The head's removals: what the run's policies give up goes from the bucket (ADR 0012) and from disks (ADR 0023)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ktrain.base import contract
from ktrain.base.clock import Clock
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.collect import Collector, Outcome
from ktrain.checkpoint.disks import DiskSweep
from ktrain.checkpoint.marks import MetricBook
from ktrain.checkpoint.quarantine import read_marks
from ktrain.checkpoint.removal import Terms
from ktrain.errors import KtrainError


class Sweeps:
    """Both removals of a head, and what it heard of steps, which policies may judge by."""

    def __init__(self, catalog: RunCatalog, *, emit: Callable[..., None], timeouts: Timeouts, clock: Clock) -> None:
        self.bucket = BucketSweep(catalog, emit=emit, timeouts=timeouts, clock=clock)
        self.disks = DiskSweep(catalog, emit=emit, timeouts=timeouts, clock=clock)

    def take(self, event: Event) -> None:
        """Takes what a rank said. Safe from any thread."""
        self.bucket.metrics.take(event)
        self.disks.take(event)


class BucketSweep:
    """Collects for a head that runs on whatever comes of it. `collect` is for one thread.

    Attributes:
        metrics: what the ranks logged, which a policy may judge by; takes values from any thread.
    """

    def __init__(self, catalog: RunCatalog, *, emit: Callable[..., None], timeouts: Timeouts, clock: Clock) -> None:
        self._catalog = catalog
        self._emit = emit
        self._collector = Collector(catalog, timeouts=timeouts, clock=clock)
        self._keeps_all = False  # the last collection could not be carried out; said once
        self.metrics = MetricBook()

    def collect(self, terms: Terms) -> None:
        """Removes what goes, except what is set aside; what stays for want of certainty is said once."""
        try:
            terms = replace(terms, set_aside=read_marks(self._catalog).holds)
            outcome = self._collector.collect(terms, self.metrics)
        except KtrainError as error:
            outcome = Outcome(failure=error)
        for step in [removal.step for removal in outcome.removed if removal.why != "never committed"]:
            self._emit("collected", tier=contract.TIER_BUCKET, step=step)
        reason = outcome.failure or next(iter(outcome.doubts), None)
        if reason is not None and not self._keeps_all:
            self._emit("notice", message=f"nothing more is removed from the bucket for now: {reason}")
        self._keeps_all = reason is not None

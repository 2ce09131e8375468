"""The events of a run, wherever it lies: one file in a directory, or objects under a prefix in a bucket."""

from __future__ import annotations

from ktrain.abc.tier import Tier
from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.events import Event, parse_lines
from ktrain.base.settings import Timeouts
from ktrain.errors import NotFoundError
from ktrain.tier.bucket import open_tier


def read_events(run: str, *, timeouts: Timeouts, clock: Clock = SYSTEM_CLOCK) -> list[Event]:
    """All events of the run at `run`, oldest first; none where the run has no events yet.

    Raises:
        UnavailableError, DeadlineError: the store could not be asked.
    """
    tier = open_tier(run, timeouts=timeouts, clock=clock)
    try:
        return sorted(parse_lines(_lines(tier, timeouts, clock)), key=lambda event: event.time)
    finally:
        tier.close()


def _lines(tier: Tier, timeouts: Timeouts, clock: Clock) -> list[bytes]:
    def deadline() -> Deadline:
        return Deadline.after(timeouts.storage_s, clock)

    names = [stored.name for stored in tier.list(f"{contract.EVENTS_DIR}/", deadline=deadline())]
    lines = []
    for name in [contract.EVENTS_FILE, *sorted(names)]:
        try:
            lines += tier.read(name, deadline=deadline()).splitlines()
        except NotFoundError:
            continue
    return lines

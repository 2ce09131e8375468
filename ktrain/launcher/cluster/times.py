"""Times as objects carry them: UTC, whole seconds."""

from __future__ import annotations

from datetime import UTC, datetime

from ktrain.base.clock import Clock

_FORM = "%Y-%m-%dT%H:%M:%SZ"


def timestamp(wall_s: float) -> str:
    """`2026-11-27T18:00:00Z` for seconds since the epoch."""
    return datetime.fromtimestamp(wall_s, UTC).strftime(_FORM)


def seconds(text: str) -> float:
    """Seconds since the epoch; a fraction of a second is dropped."""
    return datetime.strptime(text.partition(".")[0].rstrip("Z") + "Z", _FORM).replace(tzinfo=UTC).timestamp()


def monotonic(text: str, clock: Clock) -> float:
    """A time that an object carries, on this process's monotonic clock."""
    return clock.monotonic() + seconds(text) - clock.wall()

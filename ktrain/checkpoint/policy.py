"""When to save and what to keep: pure decisions, as values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Every:
    """Cadence of saves in steps, per tier.

    Attributes:
        memory: a snapshot is taken at every multiple of this step.
        bucket: least distance in steps between two drains; 0 drains the newest committed step whenever the
            drain is idle. The last step before `close()` is always drained.
        disk: the same for the nodes' disks, where there are any.
    """

    memory: int = 10
    bucket: int = 0
    disk: int = 0

    def __post_init__(self) -> None:
        if self.memory < 1 or min(self.bucket, self.disk) < 0:
            raise ConfigError(
                f"every: expected memory >= 1, bucket >= 0 and disk >= 0 steps, found memory={self.memory}, "
                f"bucket={self.bucket}, disk={self.disk}"
            )

    def due(self, step: int) -> bool:
        """True where a snapshot of `step` is to be taken."""
        return step % self.memory == 0


@dataclass(frozen=True, slots=True)
class Keep:
    """How many checkpoints stay, per tier: the newest `bucket` in the bucket, `memory` slots per rank in memory.

    Attributes:
        bucket: at least 1.
        memory: slots per rank, at least 3 (newest in memory, newest at peers, one to write); one more is made
            for the drain, which reads a slot while it uploads.
        disk: snapshots of a rank on its node's disk, at least 1.
        kept: slots per rank kept for another node, at least 2 (one proven copy while the next arrives).
    """

    bucket: int = 3
    memory: int = 3
    kept: int = 2
    disk: int = 2

    def __post_init__(self) -> None:
        if self.bucket < 1 or self.memory < 3 or self.kept < 2 or self.disk < 1:
            raise ConfigError(
                f"keep: expected bucket >= 1, memory >= 3, kept >= 2 and disk >= 1, found bucket={self.bucket}, "
                f"memory={self.memory}, kept={self.kept}, disk={self.disk}"
            )


class Capture(Enum):
    """When the bytes of a snapshot are copied."""

    HIDDEN = "hidden"
    """What only an announced optimizer step changes is copied beside forward and backward, all else in `step()`."""

    AT_ONCE = "at_once"
    """Everything is copied before `step()` returns."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Cadence and retention of a run, as its first rank declared them."""

    every: Every = Every()
    keep: Keep = Keep()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Policies:
        return cls(every=Every(**value["every"]), keep=Keep(**value["keep"]))


def as_every(value: int | Every) -> Every:
    """`every=10` means every ten steps in memory."""
    return value if isinstance(value, Every) else Every(memory=value)


def as_keep(value: int | Keep) -> Keep:
    """`keep=3` means the newest three in the bucket."""
    return value if isinstance(value, Keep) else Keep(bucket=value)


def as_capture(value: str | Capture) -> Capture:
    """`capture="hidden"` or `capture="at_once"`.

    Raises:
        ConfigError: it is neither.
    """
    try:
        return Capture(value)
    except ValueError as error:
        said = ", ".join(repr(choice.value) for choice in Capture)
        raise ConfigError(f"capture: expected one of {said}, found {value!r}") from error


def superseded(committed: Collection[tuple[int, int]], keep: int) -> list[tuple[int, int]]:
    """The (step, epoch) that retention may remove, oldest first; the newest `keep` and so at least one stay."""
    assert keep >= 1
    return sorted(committed)[:-keep]

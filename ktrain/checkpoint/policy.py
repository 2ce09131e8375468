"""When to save and what to keep: pure decisions, as values."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import asdict, dataclass
from typing import Any

from ktrain.checkpoint.cadence import Auto
from ktrain.checkpoint.gate import Gate
from ktrain.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Every:
    """Cadence of saves in steps, per tier.

    Attributes:
        memory: a snapshot is taken at every multiple of this step.
        bucket: least distance in steps between two drains; 0 drains the newest committed step whenever the
            drain is idle. The last step before `close()` is always drained.
        disk: the same for the nodes' disks, where there are any.
        auto: with it, the numbers above are only what is begun with: the head measures and chooses.
    """

    memory: int = 10
    bucket: int = 0
    disk: int = 0
    auto: Auto | None = None

    def __post_init__(self) -> None:
        if self.memory < 1 or min(self.bucket, self.disk) < 0:
            raise ConfigError(
                f"every: expected memory >= 1, bucket >= 0 and disk >= 0 steps, found memory={self.memory}, "
                f"bucket={self.bucket}, disk={self.disk}"
            )


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


@dataclass(frozen=True, slots=True)
class Policies:
    """Cadence, retention and gate of a run, as its first rank declared them."""

    every: Every = Every()
    keep: Keep = Keep()
    gate: Gate = Gate()

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Policies:
        auto = value["every"].get("auto")
        every = Every(**{**value["every"], "auto": None if auto is None else Auto(**auto)})
        return cls(every=every, keep=Keep(**value["keep"]), gate=Gate(**value["gate"]))


def as_every(value: int | str | Every) -> Every:
    """`every=10` means every ten steps in memory, `every="auto"` as often as measurements say."""
    if isinstance(value, str):
        if value != "auto":
            raise ConfigError(f"every: expected a number of steps, 'auto' or an Every, found {value!r}")
        return Every(auto=Auto())
    return value if isinstance(value, Every) else Every(memory=value)


def as_keep(value: int | Keep) -> Keep:
    """`keep=3` means the newest three in the bucket."""
    return value if isinstance(value, Keep) else Keep(bucket=value)


def superseded(committed: Collection[tuple[int, int]], keep: int) -> list[tuple[int, int]]:
    """The (step, epoch) that retention may remove, oldest first; the newest `keep` and so at least one stay."""
    assert keep >= 1
    return sorted(committed)[:-keep]

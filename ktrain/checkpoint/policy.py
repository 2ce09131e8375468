"""When to save and what to keep: pure decisions, as values."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from enum import Enum
from typing import Any

from ktrain.checkpoint import retention
from ktrain.checkpoint.cadence import Auto
from ktrain.checkpoint.gate import Gate
from ktrain.checkpoint.retention import Retention, as_retention
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
    """What stays, per tier: checkpoints in the bucket and on disks by a policy, a number of slots in memory.

    Attributes:
        bucket: a policy of `checkpoint.retention` or its text; a number means the newest so many, at least 1.
        memory: slots per rank, at least 3 (newest in memory, newest at peers, one to write); one more is made
            for the drain, which reads a slot while it uploads.
        kept: slots per rank kept for another node, at least 2 (one proven copy while the next arrives).
        disk: what stays on the nodes' own disks, said as for the bucket.
    """

    bucket: int | str | Retention = 3
    memory: int = 3
    kept: int = 2
    disk: int | str | Retention = 2

    def __post_init__(self) -> None:
        for name, least in (("memory", 3), ("kept", 2)):
            _require_slots(name, getattr(self, name), least)
        for name in ("bucket", "disk"):
            try:
                as_retention(getattr(self, name))
            except ConfigError as error:
                raise ConfigError(f"{error} (of the {name})") from None

    @property
    def in_bucket(self) -> Retention:
        """The policy of the bucket."""
        return as_retention(self.bucket)

    @property
    def on_disk(self) -> Retention:
        """The policy of the nodes' disks."""
        return as_retention(self.disk)


def _require_slots(name: str, value: object, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(
            f"keep: {name}: expected a number of slots of at least {least}, found {value!r}; memory is made in slots "
            "before training, so no policy can say what stays there; the bucket and disks take one"
        )


class Capture(Enum):
    """When the bytes of a snapshot are copied."""

    HIDDEN = "hidden"
    """What only an announced optimizer step changes is copied beside forward and backward, all else in `step()`."""

    AT_ONCE = "at_once"
    """Everything is copied before `step()` returns."""


@dataclass(frozen=True, slots=True)
class Policies:
    """Cadence, retention and gate of a run, as its first rank declared them."""

    every: Every = Every()
    keep: Keep = Keep()
    gate: Gate = Gate()

    def to_json(self) -> dict[str, Any]:
        keep = self.keep
        slots = {"memory": keep.memory, "kept": keep.kept}
        said = {"bucket": _plain(keep.bucket), "disk": _plain(keep.disk), **slots}
        return {"every": asdict(self.every), "keep": said, "gate": asdict(self.gate)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Policies:
        keep: dict[str, Any] = {}
        for name, at in value["keep"].items():
            keep[name] = retention.from_json(at) if isinstance(at, dict) else at
        auto = value["every"].get("auto")
        every = Every(**{**value["every"], "auto": None if auto is None else Auto(**auto)})
        return cls(every=every, keep=Keep(**keep), gate=Gate(**value["gate"]))


def _plain(keep: int | str | Retention) -> Any:
    return keep if isinstance(keep, int | str) else retention.to_json(keep)


def as_every(value: int | str | Every) -> Every:
    """`every=10` means every ten steps in memory, `every="auto"` as often as measurements say."""
    if isinstance(value, str):
        if value != "auto":
            raise ConfigError(f"every: expected a number of steps, 'auto' or an Every, found {value!r}")
        return Every(auto=Auto())
    return value if isinstance(value, Every) else Every(memory=value)


def as_keep(value: int | str | Retention | Keep) -> Keep:
    """`keep=3` means the newest three in the bucket; a policy or a text alone is the bucket's."""
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

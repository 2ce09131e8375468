"""What a restored step has to show before it is trusted (ADR 0018). Pure; imports neither torch nor ray."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from ktrain.base.events import Event
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.errors import ConfigError
from ktrain.format.manifest import Identity


class OnMismatch(StrEnum):
    """What follows when the losses after a restore are not those of before."""

    REPORT = "report"  # an event, and training goes on
    STEP_BACK = "step-back"  # the restored step is set aside; the next attempt begins from an older one


@dataclass(frozen=True, slots=True)
class Gate:
    """When a step is set aside.

    Attributes:
        failures: attempts that failed from it, by their own fault and without a newer commit; 0 for never.
        steps: so many losses after a restore are compared with those of before; 0 for none.
        then: what follows when one differs.
        tolerance: relative difference that is none where bits cannot be expected to be equal (another layout, a
            device that is not deterministic).
    """

    failures: int = 2
    steps: int = 3
    then: OnMismatch | str = OnMismatch.REPORT
    tolerance: float = 0.05

    def __post_init__(self) -> None:
        if min(self.failures, self.steps) < 0 or not self.tolerance >= 0:
            raise ConfigError(
                f"gate: expected failures >= 0, steps >= 0 and tolerance >= 0, found failures={self.failures}, "
                f"steps={self.steps}, tolerance={self.tolerance}"
            )
        try:
            object.__setattr__(self, "then", OnMismatch(self.then))
        except ValueError:
            known = ", ".join(repr(str(member)) for member in OnMismatch)
            raise ConfigError(f"gate: expected {known}, found {self.then!r}") from None


def as_gate(value: str | Gate) -> Gate:
    """`gate="step-back"` means the usual gate with that consequence."""
    return value if isinstance(value, Gate) else Gate(then=value)


@dataclass(frozen=True, slots=True)
class Mismatch:
    """A loss after a restore that is not the one of before."""

    step: int
    expected: float
    found: float
    exact: bool  # bits were compared


class LossGate:
    """The first losses after one restore, against those that the run had recorded. Not thread-safe."""

    def __init__(self, gate: Gate, *, restored: int) -> None:
        self._gate = gate
        self._restored = restored
        self._recorded: Mapping[int, tuple[float, bool]] | None = None  # step -> loss, whether bits may be compared
        self._waiting: dict[int, float] = {}

    @property
    def steps(self) -> range:
        """The steps whose losses are compared."""
        return range(self._restored + 1, self._restored + 1 + self._gate.steps)

    @property
    def is_known(self) -> bool:
        """Whether it was looked up what to expect."""
        return self._recorded is not None

    def know(self, recorded: Mapping[int, tuple[float, bool]]) -> None:
        """What the run had recorded for these steps; one that it has never made is absent."""
        self._recorded = recorded

    def take(self, step: int, loss: float | None) -> None:
        """Takes a loss of now."""
        if loss is not None and step in self.steps:
            self._waiting[step] = loss

    def compare(self) -> list[Mismatch]:
        """What differs among the losses that came since the last call."""
        if self._recorded is None:
            return []
        arrived, self._waiting = self._waiting, {}
        known = [(step, found, *self._recorded[step]) for step, found in arrived.items() if step in self._recorded]
        return [
            Mismatch(step, expected, found, exact)
            for step, found, expected, exact in sorted(known)
            if not is_same(expected, found, 0.0 if exact else self._gate.tolerance)
        ]


def is_same(expected: float, found: float, tolerance: float) -> bool:
    """Whether two losses agree within a relative tolerance; not-a-number agrees with itself."""
    if math.isnan(expected) or math.isnan(found) or math.isinf(expected) or math.isinf(found):
        return expected == found or (math.isnan(expected) and math.isnan(found))
    return abs(expected - found) <= tolerance * max(abs(expected), abs(found))


def recorded_losses(
    blocks: Iterable[Sequence[Event]], restored: Identity, attempts: Sequence[AttemptRecord], steps: range
) -> dict[int, tuple[float, bool]]:
    """Step -> the newest loss that an attempt found on the restored state, and whether its layout was that state's.

    These attempts are the one that made the state and went on, and those that restored it. `blocks` are read, the
    newest first, only as far as there may be something to find.
    """
    maker = restored.epoch
    same = {maker} | {found.epoch for found in attempts if (found.restored or {}).get("identity") == restored.to_json()}
    losses: dict[int, tuple[float, bool]] = {}
    for block in blocks:
        for event in reversed(block):
            if event.kind != "step" or event.attempt not in same:
                continue
            step, loss = int(event.fields["step"]), event.fields.get("loss")
            if step in steps and step not in losses and isinstance(loss, float | int):
                losses[step] = (float(loss), event.attempt == maker)
            if event.attempt == maker and step < steps.start:
                return losses  # what comes now was made before the restored state
        # Not where older attempts speak: what was said in them may be logged late.
        begins = any(event.kind == "attempt_started" and event.attempt <= maker for event in block)
        if begins or len(losses) == len(steps):
            return losses
    return losses

"""What a restored step has to show before it is trusted (ADR 0018). Pure; imports neither torch nor ray."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from ktrain.errors import ConfigError


class OnMismatch(StrEnum):
    """What follows when the losses after a restore are not those of before."""

    REPORT = "report"  # an event, and training goes on
    STEP_BACK = "step-back"  # the restored step is set aside; the next attempt begins from an older one


@dataclass(frozen=True, slots=True)
class Gate:
    """When a step is set aside.

    Attributes:
        failures: attempts that failed from it, by their own fault and without getting farther; 0 for never.
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

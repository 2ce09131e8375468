"""Writes plans for `ktrain.base.faults`: which process fails, at which moment, and how."""

from __future__ import annotations

from dataclasses import dataclass

from ktrain.base import contract, faults
from ktrain.base.faults import Fault


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Faults to come; each `fail_at` gives a longer plan.

    env = FaultPlan().fail_at("save.staged", rank=1, step=20).environment()
    """

    faults: tuple[Fault, ...] = ()

    def fail_at(
        self,
        point: str,
        *,
        action: str = "kill",
        step: int | None = None,
        rank: int | None = None,
        epoch: int = 1,
    ) -> FaultPlan:
        """One more fault; a step or rank that is not named means any.

        Raises:
            ConfigError: there is no such point or action.
        """
        parsed = faults.parse(Fault(action, point, step, rank, epoch).to_text())
        return FaultPlan((*self.faults, *parsed))

    def text(self) -> str:
        """The plan as `KTRAIN_FAULTS` carries it."""
        return ";".join(fault.to_text() for fault in self.faults)

    def environment(self) -> dict[str, str]:
        """The variable that carries the plan into a process, whatever starts it."""
        return {contract.ENV_FAULTS: self.text()}

"""How often to save, from what a save costs and what a failure loses (ADR 0019). Pure; imports neither torch nor ray.

Young, J. W., "A first order approximation to the optimum checkpoint interval", CACM 17(9), 1974. Daly, J. T., "A higher
order estimate of the optimum checkpoint interval for restart dumps", FGCS 22(3), 2006.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ktrain.base import contract
from ktrain.checkpoint.catalog import AttemptRecord
from ktrain.errors import ConfigError

FORMULA = "Daly 2006, eq. 37: sqrt(2 c M) (1 + sqrt(c / 2M) / 3 + c / 18M) - c"
HYSTERESIS = 0.05  # of the expected loss: below it another cadence is not worth a change
_RUNGS = (1, 1.25, 1.5, 2, 2.5, 3, 4, 5, 6, 8)  # a decade of the ladder: neighbours up to one half apart
LADDER = tuple(sorted({round(rung * 10**power) for power in range(7) for rung in _RUNGS if rung * 10**power % 1 == 0}))
_LOSS_PRIOR = 0.1  # of failures, the part that takes all memory with it, before any was seen


@dataclass(frozen=True, slots=True)
class Auto:
    """Bounds of a cadence that is chosen by measurement.

    Attributes:
        least: steps between two snapshots in memory.
        most: the same.
        mtbf_s: what is believed of the time between two failures before any was seen.
    """

    least: int = 1
    most: int = 1000
    mtbf_s: float = 6 * 3600.0

    def __post_init__(self) -> None:
        if not 1 <= self.least <= self.most or not 0 < self.mtbf_s < math.inf:
            raise ConfigError(
                f"every: expected 1 <= least <= most and mtbf_s > 0, found least={self.least}, most={self.most}, "
                f"mtbf_s={self.mtbf_s}"
            )


@dataclass(frozen=True, slots=True)
class History:
    """What a run's attempts say about failures; `losses` are those that took the memory of all nodes with them."""

    failures: int = 0
    losses: int = 0
    observed_s: float = 0.0

    def mtbf_s(self, prior_s: float) -> float:
        """Time between failures: the mean rate of a gamma distribution that began with one failure in `prior_s`."""
        return (prior_s + self.observed_s) / (1 + self.failures)

    def loss_mtbf_s(self, prior_s: float) -> float:
        """The same for failures that take all memory."""
        return (prior_s + self.observed_s) / (_LOSS_PRIOR + self.losses)


def history_of(attempts: Sequence[AttemptRecord]) -> History:
    """Failures and time of the attempts that are over; the last one runs. Only one host's times are compared.

    An attempt that ended without a word counts as a failure that took all memory: it cannot be told.
    """
    failures = losses = 0
    observed_s = 0.0
    for attempt in attempts[:-1]:
        parts = (attempt.start, attempt.restored, attempt.committed, attempt.durable, attempt.end)
        times = [float(part["time"]) for part in parts if part is not None and "time" in part]
        observed_s += max(times, default=0.0) - min(times, default=0.0)
        end = attempt.end or {"outcome": "failed", "cause": contract.CAUSE_ALL_LOST}
        failures += end.get("outcome") == "failed"
        losses += end.get("outcome") == "failed" and end.get("cause") == contract.CAUSE_ALL_LOST
    return History(failures, losses, observed_s)


@dataclass(frozen=True, slots=True)
class Measured:
    """What a cadence is computed from.

    Attributes:
        step_s: a step without what a save takes.
        stall_s: what a save in memory takes from the loop, on the slowest rank.
        copy_s: until a peer has its copy; 0 where there is none.
        drain_s: until the bucket has committed a step.
        disk_s: until the nodes' disks have one; 0 where there are none.
        slowdown: part by which steps are longer while a drain runs.
        restore_s: of the last restore.
    """

    step_s: float
    stall_s: float
    copy_s: float = 0.0
    drain_s: float = 0.0
    disk_s: float = 0.0
    slowdown: float = 0.0
    restore_s: float = 0.0
    history: History = History()


def young_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Young's optimum of the time between two saves."""
    return math.sqrt(2 * cost_s * mtbf_s)


def daly_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Daly's optimum of the time between two saves, the saves themselves not counted."""
    if cost_s >= 2 * mtbf_s:
        return mtbf_s
    root = math.sqrt(cost_s / (2 * mtbf_s))
    return young_interval_s(cost_s, mtbf_s) * (1 + root / 3 + root * root / 9) - cost_s


def lost_share(interval_s: float, cost_s: float, mtbf_s: float, restart_s: float = 0.0) -> float:
    """Expected time lost over useful time, for failures at a constant rate (Daly 2006, eq. 20)."""
    exponent = (interval_s + cost_s) / mtbf_s
    if exponent > 500:
        return math.inf
    return mtbf_s / interval_s * math.exp(min(restart_s / mtbf_s, 500.0)) * math.expm1(exponent) - 1


@dataclass(frozen=True, slots=True)
class Costs:
    """One tier: what a save costs the loop, how often it is needed, and the least time between two saves."""

    cost_s: float
    mtbf_s: float
    least_s: float = 0.0


def choose_steps(current: int, costs: Costs, *, step_s: float, least: int, most: int) -> int:
    """Steps between two saves: a rung of the ladder near Daly's optimum, or the current number if that is as good."""
    least = min(most, max(least, math.ceil(costs.least_s / step_s)))
    wanted = daly_interval_s(costs.cost_s, costs.mtbf_s) / step_s

    def lost(steps: int) -> float:
        return lost_share(steps * step_s, costs.cost_s, costs.mtbf_s)

    at = bisect_left(LADDER, wanted)
    near = {min(most, max(least, steps)) for steps in LADDER[max(0, at - 1) : at + 1]}
    best = min(near, key=lambda steps: (lost(steps), steps))
    stays = least <= current <= most and lost(current) <= lost(best) * (1 + HYSTERESIS)
    return current if stays else best


@dataclass(frozen=True, slots=True)
class Cadence:
    """Steps between two saves, per tier; 0 in disk or bucket: whenever the last one is done."""

    memory: int
    disk: int = 0
    bucket: int = 0


def choose(current: Cadence, measured: Measured, auto: Auto) -> Cadence:
    """The cadence to go on with; the current one where no other is worth a change."""
    history, step_s = measured.history, measured.step_s
    memory = choose_steps(
        current.memory,
        Costs(measured.stall_s, history.mtbf_s(auto.mtbf_s), measured.copy_s),
        step_s=step_s,
        least=auto.least,
        most=auto.most,
    )

    def behind(current: int, seconds: float) -> int:
        """The distance of a tier that is written in the background and takes `seconds` for it."""
        if not seconds:
            return current
        costs = Costs(measured.slowdown * seconds, history.loss_mtbf_s(auto.mtbf_s), seconds)
        found = choose_steps(current, costs, step_s=step_s, least=memory, most=max(LADDER))
        return 0 if found <= memory else found

    return Cadence(memory, behind(current.disk, measured.disk_s), behind(current.bucket, measured.drain_s))


def reason(found: Cadence, measured: Measured, auto: Auto) -> str:
    """The choice in one sentence for people."""
    mtbf_s = measured.history.mtbf_s(auto.mtbf_s)
    best_s = daly_interval_s(measured.stall_s, mtbf_s)
    lost = lost_share(found.memory * measured.step_s, measured.stall_s, mtbf_s, measured.restore_s)
    return (
        f"a save takes {measured.stall_s:.3g} s from the loop, a failure comes every {mtbf_s:.3g} s: best every "
        f"{best_s:.3g} s, that is {best_s / measured.step_s:.3g} steps of {measured.step_s:.3g} s; {lost:.2%} of the "
        "time is lost to saves, steps done again and restores"
    )


@dataclass(frozen=True, slots=True)
class Change:
    """From `from_step` on, a snapshot is taken at every multiple of `memory` steps."""

    number: int
    from_step: int
    memory: int

    def to_json(self) -> list[int]:
        return [self.number, self.from_step, self.memory]


class Schedule:
    """The steps that a rank saves. `due` is for the training thread, `take` for one other at a time."""

    def __init__(self, memory: int) -> None:
        self._changes: tuple[Change, ...] = (Change(0, 0, memory),)  # replaced whole
        self.said: list[Any] | None = None
        """For the head: the newest change as it was announced, and whether this rank heard of it in time."""

    def take(self, word: Sequence[int], step: int) -> bool:
        """Takes an announcement, while the rank is at `step` and cannot leave it; true where it is new."""
        told = Change(*map(int, word))
        if told.number <= self._changes[-1].number:
            return False
        in_time = step < told.from_step
        change = told if in_time else Change(told.number, step + 1, told.memory)
        present = [known for known in self._changes if known.from_step <= step][-1]
        ahead = [known for known in self._changes if step < known.from_step < change.from_step]
        self._changes = (present, *ahead, change)
        self.said = [*told.to_json(), in_time]
        return True

    def due(self, step: int) -> bool:
        """True where a snapshot of `step` is to be taken."""
        change = next(known for known in reversed(self._changes) if known.from_step <= step)
        return step % change.memory == 0


@dataclass(slots=True)
class ChangeAgreement:
    """The head's side of a change: announced until every rank has heard of it in time. The owner holds the lock."""

    change: Change | None = None
    lead: int = 2  # steps between the newest one heard of and the announced one

    def announce(self, memory: int, *, at_step: int, lead: int) -> Change:
        """A new change, `lead` steps beyond the newest step."""
        number = 1 if self.change is None else self.change.number + 1
        self.lead = lead
        self.change = Change(number, at_step + lead, memory)
        return self.change

    def hear(self, views: Mapping[int, Mapping[str, Any]]) -> None:
        """Takes what some of the ranks follow: one that heard too late has the change announced again, further ahead.

        A number beyond the own one is of the head before this one: it is gone on with.
        """
        steps = [int(view["step"]) for view in views.values()]
        for view in views.values():
            if not view.get("cadence"):
                continue
            number, from_step, memory, in_time = view["cadence"]
            if self.change is None or number > self.change.number:
                self.change = Change(number, from_step, memory)
            if number == self.change.number and not in_time:
                self.announce(memory, at_step=max(steps), lead=self.lead * 2)

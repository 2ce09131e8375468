"""A cell of the fault matrix: what goes wrong where, what must be said, and how it must end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tests.faults.job import Alarm, Job, Resumed, Stopped

PHASES = ("stage", "seal", "replicate", "drain", "commit", "collect", "restore")


@dataclass(frozen=True, slots=True)
class Case:
    """One fault at one point.

    Attributes:
        fault: its name, the same wherever it strikes.
        tier, phase, point: where it strikes; the point is in words.
        play: puts the fault into a job that was trained to step 20 (or is new, where `is_new`) and lets happen what
            comes before the restart.
        end: what the restart after it gives.
        seen: everything that is said to be wrong, no more and no less.
        how: how it is noticed, in words, where nothing needs to be said.
        gap: why it cannot be noticed; an open point, shown as such.
        words: what the message of a stop has to name.
        keep: checkpoints that retention keeps.
        has_disk: the nodes have a disk tier.
    """

    fault: str
    tier: str
    phase: str
    point: str
    play: Callable[[Job], None]
    end: Resumed | Stopped
    seen: frozenset[Alarm] = frozenset()
    how: str = ""
    gap: str = ""
    words: tuple[str, ...] = ()
    is_new: bool = False
    keep: int = 3
    has_disk: bool = False

    def __post_init__(self) -> None:
        assert self.phase in PHASES, self.phase
        assert self.seen or self.how or self.gap or isinstance(self.end, Stopped), f"{self.name}: noticed by nothing"

    @property
    def name(self) -> str:
        return f"{self.fault}, {self.tier}, {self.phase}: {self.point}"

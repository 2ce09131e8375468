"""What is asked of a job, wherever it runs: the answers, and who gives them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from ktrain.base.clock import Clock, Deadline
from ktrain.launcher.states import FINAL as FINAL
from ktrain.launcher.states import State as State


@dataclass(frozen=True, slots=True)
class Node:
    """One node of a job."""

    name: str
    machine: str | None  # None: it has none yet
    said: str  # what it does, in words


@dataclass(frozen=True, slots=True)
class Look:
    """A job at one time, as the place where it runs shows it."""

    state: State
    reasons: tuple[str, ...] = ()  # what it waits for
    nodes: tuple[Node, ...] | None = None  # None: they are not shown
    exit_code: int | None = None  # where it is final
    message: str | None = None  # why it ended


class Host(Protocol):
    """Where a job runs. Call from one thread."""

    @property
    def run(self) -> str:
        """URL of the job's run."""

    @property
    def name(self) -> str:
        """Of the job."""

    @property
    def where(self) -> str:
        """In words."""

    @property
    def clock(self) -> Clock: ...

    def look(self) -> Look:
        """The job as it is now. Raises NotFoundError, UnavailableError."""

    def logs(self, rank: int | None, attempt: int | None) -> str:
        """What its ranks wrote. Raises NotFoundError where there is nothing."""

    def wait(self, deadline: Deadline, observe: Callable[[Look], None]) -> Look:
        """Its end; `observe` is called with every look. Raises DeadlineError."""

    def cancel(self, deadline: Deadline) -> None:
        """Stops it after a save, and returns when it has ended. Raises DeadlineError."""

    def resume(self, deadline: Deadline) -> tuple[str, ...]:
        """Sends it again where it has ended; returns what is otherwise than before, in words.

        Raises ConfigError where this place has no way to do so, or the job is done; ConflictError where it is live.
        """

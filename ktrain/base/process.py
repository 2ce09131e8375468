"""Small facts about processes: who is alive, and who is really who.

A pid alone names nobody, because pids are reused; a pid with its start time does.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class ProcessId:
    """A process that cannot be mistaken for a later one with the same pid."""

    pid: int
    start_ticks: int

    @classmethod
    def of(cls, pid: int) -> ProcessId | None:
        """The process that has this pid now, or None when there is none (or it is a zombie)."""
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat[stat.rindex(")") + 2 :].split()  # the command name may hold spaces and parentheses
        return None if fields[0] in "ZX" else cls(pid, int(fields[19]))

    @classmethod
    def current(cls) -> ProcessId:
        found = cls.of(os.getpid())
        assert found is not None
        return found

    @property
    def number(self) -> int:
        """Both in one, for places where pids begin anew (containers): pids end at 2^22."""
        return self.start_ticks << 22 | self.pid

    def alive(self) -> bool:
        """True while this very process exists, also when it is stopped."""
        return ProcessId.of(self.pid) == self

    def signal(self, signum: int) -> bool:
        """Sends a signal if this very process still exists; false when it does not."""
        try:
            fd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            import signal as signal_module

            signal_module.pidfd_send_signal(fd, signum)
        except ProcessLookupError:
            return False
        finally:
            os.close(fd)
        return True


def let_training_first() -> None:
    """The calling thread, and those that it starts, take no processor from another thread when they are woken.

    They get the same share of time as before. Without it, where all processors are busy, a copy that `step()` hands to
    a thread stops the thread that trains for a slice of some milliseconds. Where the system refuses nothing changes.
    """
    with contextlib.suppress(OSError):
        if os.sched_getscheduler(0) == os.SCHED_OTHER:
            os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))

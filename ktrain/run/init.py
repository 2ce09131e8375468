"""The first process of a container: starts one child, hands it every signal, and reaps what is left to it.

Process 1 gets no signal that it has no handler for, and inherits every orphan of its container; so the process that
does the work is not it, and may wait for its own children as if it were alone.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType

from ktrain.base import settings
from ktrain.base.process import ProcessId

_HANDED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT, signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True, slots=True)
class Ended:
    """How the child ended."""

    process: ProcessId | None  # None: it was gone before anybody could look, or was never started
    exit_code: int  # 128 and the signal's number where one ended it, as a shell says it
    told: bool  # a signal asked for the end of the container


def run_as_init(
    command: Sequence[str],
    note: Callable[[ProcessId], None] = lambda child: None,
    begin: Callable[[], None] = lambda: None,
) -> Ended:
    """Runs a command to its end. Call once, from the main thread; the child dies with it if it asks for that.

    `begin` is done before there is a child, and takes its time: where SIGTERM comes meanwhile, none is started.
    `note` is told which process that is as soon as it is there. It may not raise: nobody would wait for the child.
    The wait has no deadline: it is as long as the container's life, and whoever runs the container ends that.
    """
    told: list[int] = []
    child_fd: int | None = None

    def hand_on(signum: int, frame: FrameType | None) -> None:
        del frame
        told.append(signum)
        if child_fd is not None:
            _send(child_fd, signum)

    old = {signum: signal.signal(signum, hand_on) for signum in _HANDED_ON}
    try:
        begin()
        if signal.SIGTERM in told:
            return Ended(None, 128 + signal.SIGTERM, told=True)
        pid = os.posix_spawn(command[0], list(command), settings.child_environment({}))
        process = ProcessId.of(pid)
        child_fd = os.pidfd_open(pid)  # ours until it is reaped below
        if process is not None:
            note(process)
        for signum in list(told):  # came before there was a child; twice does no harm
            _send(child_fd, signum)
        code = _reap_until(pid)
    finally:
        for signum, handler in old.items():
            signal.signal(signum, handler)
        if child_fd is not None:
            os.close(child_fd)
    return Ended(process, code if code >= 0 else 128 - code, told=signal.SIGTERM in told)


def _send(child_fd: int, signum: int) -> None:
    try:
        signal.pidfd_send_signal(child_fd, signum)
    except ProcessLookupError:
        pass  # it has ended, and the wait is about to say so


def _reap_until(child: int) -> int:
    """Reaps whatever ends, the child last; returns its exit code, negative for a signal."""
    while True:
        pid, status = os.waitpid(-1, 0)
        if pid == child:
            return os.waitstatus_to_exitcode(status)

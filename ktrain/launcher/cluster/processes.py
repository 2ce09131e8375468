"""Containers as processes: each below a shim of its own, in a session of its own, with a log file."""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError

_SHIM = Path(__file__).with_name("shim.py")
_END_S = 10.0  # for killed processes to vanish
EXIT_NOT_STARTED = 128  # what a kubelet reports for a command that cannot be started
EXIT_KILLED = 137


@dataclass(frozen=True, slots=True)
class Command:
    """What a container runs. `environment` is all of it: nothing is inherited."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]
    directory: str
    log: Path


@dataclass(frozen=True, slots=True)
class Ended:
    """How a container's first process ended; `message` says why it was never started."""

    exit_code: int
    message: str = ""


class Process(Protocol):
    """A container that was started."""

    def pid(self) -> int | None:
        """Of the container's first process; None before it is known."""

    def ended(self) -> Ended | None:
        """None while it runs."""

    def terminate(self) -> None:
        """Sends SIGTERM to the first process."""

    def kill(self) -> None:
        """Kills all processes of the container."""


class Runtime(Protocol):
    """Starts containers; `ProcessRuntime` is the real one."""

    def start(self, command: Command) -> Process:
        """Starts a container; a command that is not found is an `Ended`, not an error."""

    def wait(self, timeout_s: float) -> None:
        """Returns when a container has news, when it was woken, or after the time."""

    def wake(self) -> None:
        """Makes a `wait` return; safe from any thread."""

    def close(self) -> None:
        """Kills all containers."""


class _ShimProcess:
    """One container. Its news arrive through `ProcessRuntime.wait`."""

    def __init__(self, shim: subprocess.Popen[bytes], control: int, status: int) -> None:
        self.shim = shim
        self.control = control  # -1 once closed
        self.status = status
        self._said = b""
        self._pid: int | None = None
        self._ended: Ended | None = None

    def pid(self) -> int | None:
        return self._pid

    def ended(self) -> Ended | None:
        return self._ended

    def terminate(self) -> None:
        self._tell(b"T")

    def kill(self) -> None:
        self._tell(b"K")

    def _tell(self, order: bytes) -> None:
        if self.control >= 0 and self._ended is None:
            try:
                os.write(self.control, order)
            except BrokenPipeError:
                pass  # it has just ended; its last word is on the way

    def hear(self) -> bool:
        """Reads the shim's words; true at their end, when shim and container are gone."""
        data = os.read(self.status, 4096)
        self._said += data
        *lines, self._said = self._said.split(b"\n")
        for line in lines:
            word, _, rest = line.decode(errors="replace").partition(" ")
            if word == "started":
                self._pid = int(rest)
            else:
                self._ended = Ended(int(rest)) if word == "exited" else Ended(EXIT_NOT_STARTED, rest)
        if data:
            return False
        self.shim.wait()
        if self._ended is None:
            self._ended = Ended(EXIT_KILLED, "the container's shim was killed")
        return True

    def release(self) -> None:
        """Closes the pipes; with the control pipe closed the shim kills what still runs."""
        if self.control >= 0:
            os.close(self.control)
            os.close(self.status)
            self.control = self.status = -1


class ProcessRuntime:
    """Containers as processes of this machine.

    One thread starts and waits; `wake` may come from any. `close` kills everything; so does the death of this process.
    """

    def __init__(self, python: str = sys.executable) -> None:
        self._python = python
        self._selector = selectors.DefaultSelector()
        self._waking, self._woken = os.pipe()
        os.set_blocking(self._waking, False)
        os.set_blocking(self._woken, False)
        self._selector.register(self._waking, selectors.EVENT_READ, None)
        self._live: set[_ShimProcess] = set()

    def start(self, command: Command) -> Process:
        control_read, control_write = os.pipe()
        status_read, status_write = os.pipe()
        command.log.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(command.log, "ab") as log:
                shim = subprocess.Popen(
                    [
                        *(self._python, "-I", "-S", str(_SHIM), str(control_read), str(status_write)),
                        command.directory,
                        *command.argv,
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=dict(command.environment),
                    pass_fds=(control_read, status_write),
                    start_new_session=True,
                )
        except OSError:
            os.close(control_write)
            os.close(status_read)
            raise
        finally:
            os.close(control_read)
            os.close(status_write)
        process = _ShimProcess(shim, control_write, status_read)
        self._live.add(process)
        self._selector.register(status_read, selectors.EVENT_READ, process)
        return process

    def wait(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is None:
                self._drain_wakes()
            elif key.data.hear():
                self._forget(key.data)

    def wake(self) -> None:
        """Makes a `wait` return; safe from any thread."""
        try:
            os.write(self._woken, b"!")
        except BlockingIOError:
            pass  # full of wakes already

    def close(self) -> None:
        """Kills all containers and returns when they are gone.

        Raises:
            DeadlineError: one of them does not end, which only a process stuck in the kernel does.
        """
        for process in self._live:
            process.kill()
        deadline = Deadline.after(_END_S)
        while self._live:
            if deadline.expired():
                raise DeadlineError(
                    f"pod runner: {len(self._live)} containers did not end within {_END_S:g} s of SIGKILL"
                )
            self.wait(deadline.remaining_s())
        self._selector.close()
        os.close(self._waking)
        os.close(self._woken)

    def _forget(self, process: _ShimProcess) -> None:
        self._selector.unregister(process.status)
        process.release()
        self._live.discard(process)

    def _drain_wakes(self) -> None:
        try:
            while os.read(self._waking, 4096):
                pass
        except BlockingIOError:
            pass

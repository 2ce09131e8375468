"""The parent of one container's processes: a script that Python runs by its path, so it imports nothing of ktrain.

    python -I -S shim.py CONTROL_FD STATUS_FD DIRECTORY COMMAND [ARGUMENT...]

It stands where a container runtime's shim stands. The container ends with its first process; whatever that left behind
is killed. When the pod runner dies, the control pipe ends and everything is killed as well.

Control, one byte each: `T` asks the first process to end, `K` kills all. Status, one line each: `started PID`,
`failed WORDS` when the command could not be started, `exited CODE` (128 + the signal's number for a death by signal).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys

_SET_DEATH_SIGNAL = 1  # prctl(2)
_SET_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError):  # not Linux: a crash of the runner may then leave processes
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _children() -> list[int]:
    """Direct children, adopted ones included."""
    me, found = str(os.getpid()), []
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else []:
        if not entry.isdigit():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{entry}/stat") as file:
            stat = file.read()
            if stat[stat.rindex(")") + 2 :].split()[1] == me:
                found.append(int(entry))
    return found


def _kill_all(first: int) -> None:
    """Kills and reaps every descendant: what a killed parent leaves is adopted here, and killed next."""
    while True:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(first, signal.SIGKILL)
        for pid in _children():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


def _start(directory: str, command: list[str]) -> tuple[int, str]:
    """Returns the pid, and why the command could not be started, or nothing."""
    reading, writing = os.pipe()  # closed by a successful exec
    parent = os.getpid()
    pid = os.fork()
    if pid:
        os.close(writing)
        with open(reading, errors="replace") as file:
            return pid, file.read()
    try:
        os.setsid()
        _prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)
        for signum in (signal.SIGPIPE, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGCHLD):
            signal.signal(signum, signal.SIG_DFL)
        os.chdir(directory)
        os.execvp(command[0], command)  # noqa: S606 -- this is what a container's command is
    except OSError as error:
        os.write(writing, f"{error.filename or command[0]}: {error.strerror}".encode())
    finally:
        os._exit(127)


def _say(status: int, line: str) -> None:
    with contextlib.suppress(BrokenPipeError):
        os.write(status, f"{line}\n".encode())


def _follow(first: int, control: int, wake: int) -> int:
    """Returns the exit code of the first process; obeys the control pipe meanwhile."""
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            os.read(wake, 512)
        told = os.read(control, 64) if control in ready else b"-"
        if told == b"" or b"K" in told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGKILL)
            return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])
        if b"T" in told:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)
        while True:
            try:
                pid, code = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == first:
                return os.waitstatus_to_exitcode(code)
            if pid == 0:
                break


def main(arguments: list[str]) -> None:
    """Runs one container to its end."""
    control, status, directory = int(arguments[0]), int(arguments[1]), arguments[2]
    for fd in (control, status):
        os.set_inheritable(fd, False)
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(signum, signal.SIG_IGN)
    _prctl(_SET_SUBREAPER, 1)
    wake, waking = os.pipe()
    os.set_blocking(waking, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(waking)
    first, problem = _start(directory, arguments[3:])
    if problem:
        os.waitpid(first, 0)
        _say(status, f"failed {problem}")
        return
    _say(status, f"started {first}")
    code = _follow(first, control, wake)
    _kill_all(first)
    _say(status, f"exited {code if code >= 0 else 128 - code}")


if __name__ == "__main__":
    main(sys.argv[1:])

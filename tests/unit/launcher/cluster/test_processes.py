"""Containers as processes: exit codes, signals, logs, and that nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base.clock import Deadline
from ktrain.base.process import ProcessId
from ktrain.launcher.cluster.processes import Command, Ended, Process, ProcessRuntime

ENVIRONMENT = {"PATH": "/usr/bin:/bin"}


@pytest.fixture
def runtime() -> Iterator[ProcessRuntime]:
    made = ProcessRuntime()
    yield made
    made.close()


def command(tmp_path: Path, *argv: str, directory: str = "/") -> Command:
    return Command(argv, ENVIRONMENT, directory, tmp_path / "logs" / "0.log")


def wait_ended(runtime: ProcessRuntime, process: Process) -> Ended:
    deadline = Deadline.after(20)
    while (ended := process.ended()) is None:
        deadline.check("end of a container")
        runtime.wait(deadline.remaining_s())
    return ended


def wait_line(runtime: ProcessRuntime, path: Path) -> str:
    """The first line of a file that a container is about to write."""
    deadline = Deadline.after(20)
    while not path.exists() or not path.read_text().endswith("\n"):
        deadline.check(f"line in {path}")
        runtime.wait(0.01)
    return path.read_text().strip()


def wait_gone(pid: int) -> None:
    deadline = Deadline.after(20)
    while ProcessId.of(pid) is not None:
        deadline.check(f"end of process {pid}")
        deadline.clock.sleep(0.01)


def test_process_runtime_command_ends_gives_code_and_log(runtime: ProcessRuntime, tmp_path: Path) -> None:
    process = runtime.start(
        command(tmp_path, "sh", "-c", "pwd; echo $0 $HOME; exit 3", "word", directory=str(tmp_path))
    )
    assert wait_ended(runtime, process) == Ended(3)
    assert (tmp_path / "logs" / "0.log").read_text() == f"{tmp_path}\nword\n"


@pytest.mark.parametrize(
    ("argv", "directory", "words"), [(("no-such",), "/", "no-such"), (("true",), "/no/such", "/no/such")]
)
def test_process_runtime_command_or_directory_missing_is_not_started(
    runtime: ProcessRuntime, tmp_path: Path, argv: tuple[str, ...], directory: str, words: str
) -> None:
    ended = wait_ended(runtime, runtime.start(command(tmp_path, *argv, directory=directory)))
    assert ended == Ended(128, f"{words}: No such file or directory")


def test_process_runtime_terminate_reaches_first_process(runtime: ProcessRuntime, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"trap 'exit 9' TERM; echo up > {ready}; while :; do sleep 0.01; done"
    process = runtime.start(command(tmp_path, "sh", "-c", script))
    wait_line(runtime, ready)
    process.terminate()
    assert wait_ended(runtime, process) == Ended(9)


def test_process_runtime_container_killed_from_outside_is_137(runtime: ProcessRuntime, tmp_path: Path) -> None:
    process = runtime.start(command(tmp_path, "sleep", "600"))
    while process.pid() is None:
        runtime.wait(1)
    os.kill(process.pid() or 0, signal.SIGKILL)
    assert wait_ended(runtime, process) == Ended(137)


def test_process_runtime_first_process_ends_kills_the_rest(runtime: ProcessRuntime, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(setsid sleep 600 & echo $! ) > {pids}; exit 0"
    wait_ended(runtime, runtime.start(command(tmp_path, "sh", "-c", script)))
    wait_gone(int(pids.read_text()))


def test_process_runtime_close_kills_containers_that_ignore_signals(tmp_path: Path) -> None:
    runtime = ProcessRuntime()
    pids = tmp_path / "pid"
    process = runtime.start(
        command(tmp_path, "sh", "-c", f"trap '' TERM; echo $$ > {pids}; while :; do sleep 0.01; done")
    )
    pid = int(wait_line(runtime, pids))
    runtime.close()
    assert process.ended() == Ended(137)
    assert ProcessId.of(pid) is None


def test_process_runtime_killed_leaves_no_process(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    script = f"(setsid sleep 600 & echo $!) > {pids}.new; mv {pids}.new {pids}; sleep 600"
    program = f"""
        from pathlib import Path
        from ktrain.launcher.cluster.processes import Command, ProcessRuntime
        runtime = ProcessRuntime()
        runtime.start(Command(("sh", "-c", {script!r}), {ENVIRONMENT!r}, "/", Path({str(tmp_path)!r}) / "log"))
        runtime.wait(60)
        runtime.wait(60)
    """
    runner = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    deadline = Deadline.after(20)
    while not pids.exists():
        deadline.check("start of the container")
        deadline.clock.sleep(0.01)
    runner.kill()
    runner.wait(20)
    wait_gone(int(pids.read_text()))

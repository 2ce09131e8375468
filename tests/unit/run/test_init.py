"""The first process of a container: exit codes, signals, orphans."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline

WITHIN_S = 60.0
INIT = "import sys; from ktrain.run.init import run_as_init; e = run_as_init(sys.argv[1:]); print(e.told); "
EXIT = INIT + "sys.exit(e.exit_code)"
# What is done before there is a child takes until the test has sent its signal.
BEGINS = (
    "import os, pathlib, sys, time; from ktrain.run.init import run_as_init\n"
    "ready, go = sys.argv.pop(), sys.argv.pop()\n"
    "def begin():\n"
    "    pathlib.Path(ready).touch()\n"
    "    while not os.path.exists(go): time.sleep(0.02)\n"
    "e = run_as_init(sys.argv[1:], begin=begin); print(e.told, e.process is None); sys.exit(e.exit_code)"
)
# The init takes in orphans of its own, as process 1 does of all its container (prctl PR_SET_CHILD_SUBREAPER).
ADOPTS = "import ctypes; assert ctypes.CDLL(None).prctl(36, 1, 0, 0, 0) == 0; " + EXIT


def start(program: str, child: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, sys.executable, "-c", child, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    out, _ = process.communicate(timeout=WITHIN_S)
    return process.returncode, out


def await_file(path: Path) -> None:
    deadline = Deadline.after(WITHIN_S)
    while not path.exists():
        deadline.check(f"{path.name}")
        SYSTEM_CLOCK.sleep(0.02)


@pytest.mark.parametrize("code", [0, 3, 74])
def test_init_child_that_ends_gives_its_exit_code(code: int) -> None:
    assert end(start(EXIT, f"raise SystemExit({code})")) == (code, "False\n")


def test_init_child_that_is_killed_gives_128_and_the_signal() -> None:
    child = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    assert end(start(EXIT, child)) == (128 + signal.SIGKILL, "False\n")


@pytest.mark.parametrize(("signum", "told"), [(signal.SIGTERM, "True\n"), (signal.SIGUSR1, "False\n")])
def test_init_signal_reaches_the_child(signum: signal.Signals, told: str, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    child = (
        "import pathlib, signal, sys\n"
        f"signal.signal({int(signum)}, lambda s, f: sys.exit(9))\n"
        "pathlib.Path(sys.argv[1]).touch()\n"
        "while True: signal.pause()"
    )
    process = start(EXIT, child, str(ready))
    await_file(ready)

    process.send_signal(signum)

    assert end(process) == (9, told)


def test_init_told_to_end_before_there_is_a_child_starts_none(tmp_path: Path) -> None:
    ready, go, started = tmp_path / "ready", tmp_path / "go", tmp_path / "started"
    process = start(BEGINS, f"open({str(started)!r}, 'w')", str(go), str(ready))
    await_file(ready)

    process.send_signal(signal.SIGTERM)
    go.touch()

    assert end(process) == (128 + signal.SIGTERM, "True True\n")
    assert not started.exists()


def test_init_other_signal_before_there_is_a_child_is_handed_on(tmp_path: Path) -> None:
    ready, go = tmp_path / "ready", tmp_path / "go"
    process = start(BEGINS, "import signal\nwhile True: signal.pause()", str(go), str(ready))
    await_file(ready)

    process.send_signal(signal.SIGUSR1)
    go.touch()

    assert end(process) == (128 + signal.SIGUSR1, "False False\n")


def test_init_orphan_is_reaped_while_the_child_lives(tmp_path: Path) -> None:
    orphan, go = tmp_path / "orphan", tmp_path / "go"
    child = (
        "import os, pathlib, sys, time\n"
        "middle = os.fork()\n"
        "if middle == 0:\n"
        "    pid = os.fork()\n"
        "    if pid:\n"
        "        pathlib.Path(sys.argv[1] + '.part').write_text(str(pid))\n"
        "        os.rename(sys.argv[1] + '.part', sys.argv[1])\n"
        "    os._exit(0)\n"
        "os.waitpid(middle, 0)\n"
        "while not os.path.exists(sys.argv[2]): time.sleep(0.02)"
    )
    process = start(ADOPTS, child, str(orphan), str(go))
    await_file(orphan)
    pid = int(orphan.read_text())
    deadline = Deadline.after(WITHIN_S)

    while os.path.exists(f"/proc/{pid}"):  # a zombie is still there
        deadline.check(f"end of process {pid}")
        SYSTEM_CLOCK.sleep(0.02)
    assert process.poll() is None
    go.touch()

    assert end(process) == (0, "False\n")

"""Starts real launches for tests, in places of their own, and looks for what they leave behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from ktrain.base.clock import SYSTEM_CLOCK, Deadline

ENDS_WITHIN_S = 100.0  # generous: CI shares two cores


@dataclass
class Place:
    """A run, a script, a temporary directory and a volume for one test."""

    root: Path  # short: socket paths are bounded
    volume: Path
    launches: list[subprocess.Popen[str]] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def script(self) -> Path:
        return self.root / "train.py"

    def environment(self, **extra: str) -> dict[str, str]:
        (self.root / "tmp").mkdir(exist_ok=True)
        own = {"TMPDIR": str(self.root / "tmp"), "KTRAIN_VOLUME": str(self.volume), "PYTHONUNBUFFERED": "1"}
        return {**os.environ, **own, **extra}

    def ktrain(self, *arguments: str, **extra: str) -> subprocess.CompletedProcess[str]:
        """Runs a command to its end."""
        command = [sys.executable, "-m", "ktrain.cli.main", *arguments]
        return subprocess.run(
            command, env=self.environment(**extra), capture_output=True, text=True, timeout=ENDS_WITHIN_S
        )

    def launch(self, *options: str, args: tuple[str, ...] = (), **extra: str) -> subprocess.Popen[str]:
        """Starts `ktrain launch` of the script."""
        command = [sys.executable, "-m", "ktrain.cli.main", "launch", str(self.script), "--run", str(self.run)]
        output = open(self.root / f"launch-{len(self.launches)}.out", "w")
        with output:
            process = subprocess.Popen(
                [*command, *options, "--", *args],
                env=self.environment(**extra),
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
            )
        self.launches.append(process)
        return process

    def output(self, index: int = 0) -> str:
        return (self.root / f"launch-{index}.out").read_text()

    def end(self, process: subprocess.Popen[str]) -> int:
        """The exit code of a launch, which must come soon."""
        try:
            return process.wait(ENDS_WITHIN_S)
        except subprocess.TimeoutExpired:
            logs = "".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in self.run.glob("logs/*.log"))
            raise AssertionError(f"the launch does not end:\n{self.output()}\n{logs}") from None

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        path = self.run / "events.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines]
        return [event for event in found if kind in (None, event["kind"])]

    def await_that(self, what: str, condition: Callable[[], Any], *, after_end: bool = False) -> Any:
        """Waits, bounded, until the condition gives something true; returns that.

        A launch that failed ends the wait, unless it is one for what comes `after_end`.
        """
        deadline = Deadline.after(ENDS_WITHIN_S)
        while not (found := condition()):
            ended = not after_end and self.launches and self.launches[-1].poll() not in (None, 0)
            if deadline.expired() or (ended and not condition()):
                how = "the launch ended" if ended else f"not within {ENDS_WITHIN_S:g} s"
                raise AssertionError(f"{what}: {how}\n{self.output(len(self.launches) - 1)}")
            SYSTEM_CLOCK.sleep(0.05)
        return found

    def processes(self, name: str = "") -> list[psutil.Process]:
        """Living processes of this place's launches whose command line has `name` in it."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            line = " ".join(process.info["cmdline"] or ())
            if str(self.root) in line and name in line and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
        return found

    def pid(self, role: str) -> int:
        """The one process of a role: head, agent, supervisor."""
        (process,) = self.processes(f"ktrain.run.{role} ")
        return process.pid

    def await_nothing_left(self) -> None:
        """No process of any launch lives."""
        self.await_that("end of all processes", lambda: not self.processes(), after_end=True)

    def leftovers(self) -> list[str]:
        """Files of launches and of the memory tier."""
        return [*self.launch_files(), *_files(self.volume)]

    def launch_files(self) -> list[str]:
        """Sockets, tokens and the like. (A run that is not finished keeps its memory tier: it will be continued.)"""
        return _files(self.root / "tmp")


def _files(folder: Path) -> list[str]:
    return [str(path) for path in folder.rglob("*") if not path.is_dir()]


@contextmanager
def place() -> Iterator[Place]:
    root = Path(tempfile.mkdtemp(prefix="kt-", dir="/tmp"))
    shm = Path("/dev/shm")
    volume = Path(tempfile.mkdtemp(prefix="kt-", dir=shm if shm.is_dir() else None))
    made = Place(root, volume)
    try:
        yield made
    finally:
        for launch in made.launches:
            if launch.poll() is None:
                launch.kill()
                launch.wait()
        for process in made.processes():
            os.kill(process.pid, signal.SIGKILL)
        shutil.rmtree(root, ignore_errors=True)
        shutil.rmtree(volume, ignore_errors=True)

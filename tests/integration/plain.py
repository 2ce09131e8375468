"""Runs `plain_worker.py` as a user would run a script, and reads what it left."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ktrain.base.events import Event, parse_lines
from ktrain.testing.fault_plan import FaultPlan

ROOT = Path(__file__).parents[2]
DEFAULTS = {
    "steps": 10,
    "every": 2,
    "keep": 3,
    "width": 8,
    "await_bucket": [],
    "await_disk": [],
    "hold_at": 0,
    "fail_at": 0,
    "gate": "report",
    "spoil": False,
    "linger_s": 0.0,
}
TIMEOUT_S = 150


@dataclass(frozen=True)
class Place:
    """A run and the volume that goes with it."""

    folder: Path

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def volume(self) -> Path:
        return self.folder / "volume"

    def copy(self, folder: Path) -> Place:
        shutil.copytree(self.folder, folder, dirs_exist_ok=True)
        return Place(folder)

    def environment(self, plan: FaultPlan | None = None) -> dict[str, str]:
        own = {name: value for name, value in os.environ.items() if not name.startswith("KTRAIN_")}
        own |= {"PYTHONPATH": str(ROOT), "KTRAIN_VOLUME": str(self.volume), "KTRAIN_PATIENCE_S": "30"}
        return own if plan is None else {**own, **plan.environment()}

    def command(self, **changed: Any) -> list[str]:
        args = {**DEFAULTS, "run": str(self.run), **changed}
        return [sys.executable, "-m", "tests.integration.plain_worker", json.dumps(args)]

    def start(self, plan: FaultPlan | None = None, **changed: Any) -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        environment = self.environment(plan)
        return subprocess.Popen(
            self.command(**changed), env=environment, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )

    def train(self, plan: FaultPlan | None = None, **changed: Any) -> Outcome:
        """One process from start to end."""
        process = self.start(plan, **changed)
        try:
            out, err = process.communicate(timeout=TIMEOUT_S)
        finally:
            process.kill()
        said = [json.loads(line) for line in out.splitlines()]
        return Outcome(process.returncode, err, {name: value for line in said for name, value in line.items()})

    def events(self, kind: str | None = None) -> list[Event]:
        path = self.run / "events.jsonl"
        found = parse_lines(path.read_bytes().splitlines()) if path.exists() else []
        return [event for event in found if kind in (None, event.kind)]

    def losses(self) -> dict[int, list[float]]:
        """Step -> its loss in every attempt that came so far."""
        found: dict[int, list[float]] = {}
        for event in self.events("step"):
            found.setdefault(event.fields["step"], []).append(event.fields["loss"])
        return found

    def checkpoints(self) -> dict[str, bytes]:
        """Every file below the run's checkpoints."""
        folder = self.run / "checkpoints"
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def one_of(self, pattern: str) -> Path:
        """The one file of the run that matches."""
        (found,) = self.run.glob(pattern)
        return found

    def slot_of(self, step: int) -> Path:
        """The payload of the slot in memory that holds a step."""
        for manifest in self.volume.rglob("*.manifest.json"):
            if f'"step":{step},' in manifest.read_text():
                return manifest.with_name(manifest.name.replace(".manifest.json", ".safetensors"))
        raise AssertionError(f"no slot holds step {step}")


@dataclass(frozen=True)
class Outcome:
    code: int
    err: str
    said: dict[str, Any]


def flip(path: Path) -> None:
    """Changes one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def same_losses(found: dict[int, list[float]], whole: dict[int, list[float]], *, unsaid: Collection[int] = ()) -> None:
    """Every loss of every attempt is that of the run that was never disturbed, bit for bit.

    `unsaid` are the last steps before a SIGKILL: what a process had not passed on yet is lost with it.
    """
    assert set(whole) - set(unsaid) <= set(found) <= set(whole)
    different = {step: values for step, values in found.items() if set(values) != set(whole[step])}
    assert not different, f"expected { ({step: whole[step] for step in different}) }"

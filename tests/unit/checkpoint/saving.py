"""A Saver with a volume of its own, whose capture a test can hold open at named moments."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.line import AgentLine
from ktrain.checkpoint.policy import Keep, Policies
from ktrain.checkpoint.pulse import Pulse
from ktrain.checkpoint.save import Saver
from ktrain.format.document import FORMAT
from ktrain.format.manifest import Identity, Manifest, verify_payload
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState

RUN = "ab" * 16
PATIENCE_S = 60.0
COPYING, STAGED, SEALED = "save.copying", "save.staged", "save.sealed"


class Gate:
    """Fault points that hold the capture until the test opens them; those in `fails` raise once instead."""

    def __init__(self) -> None:
        self._held: dict[str, threading.Event] = {}
        self._reached: dict[str, threading.Event] = {}
        self.fails: dict[str, Exception] = {}

    def hold(self, *points: str) -> None:
        for point in points:
            self._held[point], self._reached[point] = threading.Event(), threading.Event()

    def await_reached(self, point: str) -> None:
        assert self._reached[point].wait(PATIENCE_S), f"the capture never came to {point}"

    def open(self, *points: str) -> None:
        for point in points:
            self._held[point].set()

    def reached(self, point: str, *, step: int | None = None, rank: int | None = None) -> None:
        del step, rank
        if point in self.fails:
            raise self.fails.pop(point)
        if point in self._held and not self._held[point].is_set():
            self._reached[point].set()
            assert self._held[point].wait(PATIENCE_S), f"the test never opened {point}"


class Keeper:
    """Takes every event and answers that all is well."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.logs = True  # the head answers, and has put them into the run's log

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        del name, timeout_s
        self.events.extend(params["events"])
        logged = len(self.events) if self.logs else 0
        events = {"events_taken": len(self.events), "events_heard": logged, "events_logged": logged}
        return {"ready": True, "committed": {}, "stop": None, "restore": None, **events}


class Rig:
    """A rank alone in its world. As a context manager it ends everything that it started."""

    def __init__(self, folder: Path, parts: Mapping[str, Any], gate: Gate | None = None) -> None:
        self.gate = gate or Gate()
        self.keeper = Keeper()
        self.pulse = Pulse(self.keeper, rank=0, epoch=1, policies=Policies(), timeouts=Timeouts(), clock=SYSTEM_CLOCK)
        self.pulse.start()
        line = AgentLine(self.keeper, 1, "node-0", folder)
        faults: Any = self.gate
        self.saver = Saver(TrainState(parts), Topology(0, 1), Keep(), line=line, pulse=self.pulse, faults=faults)
        self.saver.open_volume("runs/net", RUN, FORMAT)
        self.saver.wait_s = PATIENCE_S

    def events(self, kind: str) -> list[dict[str, Any]]:
        assert self.pulse.flush(Deadline.after(PATIENCE_S))
        return [event for event in self.keeper.events if event["kind"] == kind]

    def snapshot(self, step: int) -> dict[str, torch.Tensor]:
        """The sealed snapshot of a step, proven, as an independent reader finds it."""
        assert self.saver.volume is not None
        with self.saver.volume.open(0, Identity(RUN, step, 1, 1)) as slot:
            verify_payload(slot.manifest, slot.memory)
            return load(bytes(slot.memory))

    def manifest(self, step: int) -> Manifest:
        assert self.saver.volume is not None
        with self.saver.volume.open(0, Identity(RUN, step, 1, 1)) as slot:
            return slot.manifest

    def steps_held(self) -> list[int]:
        assert self.saver.volume is not None
        return sorted(held.identity.step for held in self.saver.volume.scan())

    def __enter__(self) -> Rig:
        return self

    def __exit__(self, *_: object) -> None:
        for point in list(self.gate._held):
            self.gate.open(point)
        self.saver.close()
        self.pulse.end()


def same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> bool:
    """Whether every expected tensor is found with the same bits."""
    return all(name in found and torch.equal(_bits(found[name]), _bits(value)) for name, value in expected.items())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).contiguous().view(torch.uint8)

"""Fault points: named moments at which a process can be made to fail, for tests and demonstrations.

A plan is text in `KTRAIN_FAULTS`, so that it reaches a worker through any launcher: entries separated by `;`, each
`ACTION@POINT[,step=N][,rank=R][,epoch=E]` with the actions kill (SIGKILL), stop (SIGSTOP) and raise. An entry fires
once in a process, and only in epoch 1 unless it names another, so that the resumed attempt gets past it.
`ktrain.testing.FaultPlan` writes such plans.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from typing import NoReturn

from ktrain.base import contract, settings
from ktrain.errors import ConfigError, InternalError

POINTS = (
    "step",  # Checkpointer.step was called
    "save.begin",  # before a slot is taken
    "save.copying",  # step() has copied what may change at any moment; the thread that does the rest begins
    "save.staged",  # bytes are in the slot, no manifest yet
    "save.sealed",  # the snapshot exists
    "drain.payload",  # before a payload is written to the bucket
    "drain.manifest",  # after the payload, before the manifest
    "commit.begin",  # all files are there, no record yet
    "commit.record",  # the record is written, nothing knows of it
    "disk.doomed",  # a node has marked a step of its disk for removal
    "disk.manifest",  # its manifests are gone, its payloads are not
    "events.taken",  # a node's agent has a worker's events, the head has not; step is that of the newest one
    "events.logged",  # the head has logged an event, and has not said so
    "restore.fill",  # before a node's agent brings a payload from the bucket into its volume for all nodes
    "replica.pull",  # before a node's agent brings a replica of a peer's snapshot into its volume
    "log.part",  # a node's agent has written a new part of a rank's log to the bucket
    "read.parts",  # before a node's agent reads parts of a peer's snapshot for a rank
    "restore.loaded",  # bytes are proven, nothing is applied
    "restore.applied",  # applied here, perhaps not yet on other ranks
    "code.archive",  # before an archive of code is written to the bucket
    "code.record",  # it is there and read back, nothing says so
    "code.fetched",  # it has arrived in a pod, nothing of it is proven or unpacked
    "pod.prepared",  # process 1 of a container knows the job, and nobody knows of it (rank: the node, epoch: its start)
    "pod.begun",  # before it starts its child
    "pod.ended",  # its child has ended, the head is not told
)
ACTIONS = ("kill", "stop", "raise")


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of a plan; None matches every step or rank."""

    action: str
    point: str
    step: int | None = None
    rank: int | None = None
    epoch: int = 1

    def to_text(self) -> str:
        fields = [f"{name}={value}" for name in ("step", "rank", "epoch") if (value := getattr(self, name)) is not None]
        return ",".join([f"{self.action}@{self.point}", *fields])


def _refuse(entry: str, why: str) -> NoReturn:
    raise ConfigError(
        f"{contract.ENV_FAULTS}: entry {entry!r}: {why}; expected ACTION@POINT[,step=N][,rank=R][,epoch=E] with an "
        f"action of {', '.join(ACTIONS)} and a point of {', '.join(POINTS)}"
    )


def parse(text: str) -> list[Fault]:
    """The entries of a plan.

    Raises:
        ConfigError: an entry is malformed.
    """
    faults = []
    for entry in filter(None, (part.strip() for part in text.split(";"))):
        head, *pairs = entry.split(",")
        action, _, point = head.partition("@")
        if action not in ACTIONS:
            _refuse(entry, f"unknown action {action!r}")
        if point not in POINTS:
            _refuse(entry, f"unknown point {point!r}")
        numbers: dict[str, int] = {}
        for pair in pairs:
            name, _, value = pair.partition("=")
            if name not in ("step", "rank", "epoch") or not (value.isascii() and value.isdecimal()):
                _refuse(entry, f"cannot read {pair!r}")
            numbers[name] = int(value)
        faults.append(Fault(action, point, **numbers))
    return faults


class FaultPoints:
    """The plan of one process. `reached` costs a truth test where there is no plan."""

    def __init__(self, plan: list[Fault], *, epoch: int) -> None:
        self._plan = [fault for fault in plan if fault.epoch == epoch]

    @classmethod
    def from_environment(cls, epoch: int) -> FaultPoints:
        return cls(parse(settings.env(contract.ENV_FAULTS) or ""), epoch=epoch)

    def reached(self, point: str, *, step: int | None = None, rank: int | None = None) -> None:
        """Fires what the plan holds for this moment."""
        if not self._plan:
            return
        for fault in list(self._plan):
            if fault.point == point and fault.step in (None, step) and fault.rank in (None, rank):
                self._plan.remove(fault)
                _fire(fault)


def _fire(fault: Fault) -> None:
    if fault.action == "raise":
        raise InternalError(f"fault plan: {fault.to_text()}")
    os.kill(os.getpid(), signal.SIGKILL if fault.action == "kill" else signal.SIGSTOP)

"""The head with 1,024 ranks on 128 nodes: one commit and one restore, from beats alone."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.packed import unpack
from ktrain.checkpoint.policy import Every, Policies
from ktrain.format.manifest import Identity
from ktrain.testing.fake_clock import FakeClock
from tests.unit.checkpoint.builders import snapshot
from tests.unit.checkpoint.cluster import ListLog

NUM_NODES, PER_NODE = 128, 8
WORLD = NUM_NODES * PER_NODE
STEPS = (10, 20, 30)  # of three slots


@dataclass
class Keeper:
    """What one node says, and what it was told."""

    name: str
    ranks: range
    kept: range  # the ranks of another node whose snapshots it keeps
    held: list[tuple[int, Identity]] = field(default_factory=list)
    restore: dict[str, Any] = field(default_factory=dict)
    answer: dict[str, Any] = field(default_factory=dict)
    long_parts: int = 0

    def beat(self, coordinator: Coordinator, epoch: int) -> None:
        wanted = self.answer.get("want_manifests", [])
        view = {"step": 0, "phase": "train", "silent_s": 0.0, "moved_s": 0.0, "closed": False, "stop_ack": None}
        policies = Policies(Every(10)).to_json()
        ranks = {
            str(rank): {**view, "stop_wanted": None, "cadence": None, "policies": policies, "restore": self.restore}
            for rank in self.ranks
        }
        said = {
            "member": self.name,
            "node": self.name,
            "host": self.name,
            "instance": self.name,
            "epoch": epoch,
            "wire": f"{self.name}:1",
            "held": [[rank, identity.to_json()] for rank, identity in self.held],
            "on_disk": [],
            "manifests": [_manifest(entry) for entry in wanted],
            "ranks": ranks,
            "restore_round": self.restore.get("round", 0),
            "drained": [],
            "filled": [],
            "has_looked": True,
            "freed": False,
            "events_from": 0,
            "events_logged": 0,
            "events": [],
        }
        self.answer = coordinator.handlers()["beat"](said)
        self.long_parts += "manifests" in (self.answer["restore"] or {})


def _manifest(wanted: dict[str, Any]) -> dict[str, Any]:
    _, manifest = snapshot(wanted["rank"], Identity.from_json(wanted["identity"]))
    return {**wanted, "text": manifest.to_bytes().decode()}


class Job:
    """All nodes beat, then the head's thread works once: no thread, no time but the clock's."""

    def __init__(self, folder: Path) -> None:
        self.clock, self.events = FakeClock(), list[Event]()
        timeouts = Timeouts(patience_s=20)
        self.catalog = RunCatalog.open(str(folder / "run"), timeouts=timeouts, clock=self.clock)
        intake = Intake(ListLog(self.events.append))
        self.coordinator = Coordinator(self.catalog, timeouts=timeouts, intake=intake, clock=self.clock)
        blocks = [range(index * PER_NODE, (index + 1) * PER_NODE) for index in range(NUM_NODES)]
        self.keepers = [Keeper(f"node-{index}", block, kept=blocks[index - 1]) for index, block in enumerate(blocks)]
        self.epoch = 0

    def begin(self) -> None:
        self.epoch = self.catalog.next_epoch({"by": "test"})
        self.coordinator.begin_attempt(self.epoch, {keeper.name: keeper.ranks for keeper in self.keepers})

    def hold(self, steps: tuple[int, ...], *, replicas: bool) -> None:
        for keeper in self.keepers:
            ranks = [*keeper.ranks, *keeper.kept] if replicas else keeper.ranks
            keeper.held = [(rank, Identity(self.catalog.run_id, step, 1, WORLD)) for rank in ranks for step in steps]

    def turn(self) -> None:
        for keeper in self.keepers:
            keeper.beat(self.coordinator, self.epoch)
        self.coordinator._work_once()
        self.clock.advance(0.5)

    def report(self, status: str, **fields: Any) -> None:
        for keeper in self.keepers:
            keeper.restore = {"round": (keeper.answer.get("restore") or {}).get("round", 0), "status": status, **fields}


def test_head_of_a_large_job_commits_in_memory_and_among_peers(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.begin()
    job.hold(STEPS[:-1], replicas=True)
    job.turn()
    job.hold(STEPS, replicas=False)
    job.turn()
    assert {tier: step for tier, (step, _) in job.coordinator.committed().items()} == {"memory": 30, "peer": 20}
    job.turn()
    assert all(len(keeper.answer["pull"]) == PER_NODE for keeper in job.keepers)
    uploads = [rank for keeper in job.keepers for rank in keeper.answer["drain"]["ranks"]]
    assert sorted(map(int, uploads)) == list(range(WORLD)), "every rank is uploaded, by one node"
    changes = job.coordinator._roster.num_changes
    job.turn()
    assert job.coordinator._roster.num_changes == changes, "no inventory is joined anew for beats that say the same"


def test_head_of_a_large_job_has_all_ranks_restore_one_step(tmp_path: Path) -> None:
    job = Job(tmp_path)
    job.begin()
    job.hold(STEPS, replicas=True)
    job.turn()
    job.begin()
    job.report("waiting")
    for _ in range(3):
        job.turn()  # all have asked; the manifests are asked for; they are there
    job.turn()
    loading = [keeper.answer["restore"] for keeper in job.keepers]
    assert {(word["state"], word["identity"]["step"]) for word in loading} == {("loading", 30)}
    assert all(len(unpack(word["manifests"])) == len(word["sources"]) == WORLD for word in loading)
    job.report("ready")
    for _ in range(3):
        job.turn()
    assert {keeper.answer["restore"]["state"] for keeper in job.keepers} == {"go"}
    assert {keeper.long_parts for keeper in job.keepers} == {1}, "the long part goes out once a round"

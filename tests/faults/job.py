"""The job that faults are put into: two nodes with one rank each, a store that can fail, and processes that can die.

It is the in-process job of `tests.unit.checkpoint.cluster` with a bucket behind a `FaultyTier`, a directory on each
node where a case wants one, and what a real job has beside it: an agent, a head or a worker that dies is replaced.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.base.control import LocalCaller
from ktrain.base.events import Event
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.policy import Every, Keep, Policies
from ktrain.errors import CapacityError, KtrainError, UnavailableError
from ktrain.snapshot.slots import SlotCalls
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, Killed, TierFault
from ktrain.testing.local_transport import LocalWire
from ktrain.testing.tier_url import publish, withdraw
from ktrain.tier.disk import NodeDisk
from tests.unit.checkpoint.cluster import Cluster, Node, RestoreFailed, Worker

ALWAYS = 10**6
NEWEST = 20  # the newest step of a job that was trained, and the one before it
OLDER = 10
Alarm = tuple[str, str | None, int | None, int | None]  # kind of event, tier, rank, step
_ALARMS = ("bad_copy", "tier_failed", "tier_recovered", "save_skipped", "notice")


class ThreadDied(Exception):
    """What no layer below expects: it ends the work of a thread, whose loop records it and goes on."""


class WorkerDied(Exception):
    """A worker died by the fault; its attempt is over."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """All ranks continue from `step`; `tiers` says where each read its part."""

    step: int
    tiers: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Stopped:
    """Every rank, or the start itself, was told an error."""

    kind: str
    message: str = field(default="", compare=False)


class Job(Cluster):
    """A cluster whose parts may die at any call."""

    def __init__(self, folder: Path, *, keep: int = 3, disk: Path | None = None) -> None:
        clock = FakeClock()
        self.bucket = FakeBucket()
        self.store = FaultyTier(self.bucket, clock=clock)
        self.when_committed: Callable[[], None] = lambda: None  # called when a step is said to be in the bucket
        super().__init__(folder, url=publish(self.store, clock=clock), clock=clock)
        every = Every(10)
        self.policies = Policies(every, Keep(bucket=keep))
        self.disk_root = disk
        self.disk_faults: list[TierFault] = []  # of the disks that workers open from now on
        self.refused_saves: set[Alarm] = set()
        self.turns = 0
        self.at_turn: dict[int, Callable[[], None]] = {}  # what happens before a turn, counted over the whole job

    def hear(self, event: Event) -> None:
        super().hear(event)
        if event.kind == "committed" and event.fields["tier"] == contract.TIER_BUCKET:
            self.when_committed()

    def close(self) -> None:
        self.store.heal()
        super().close()
        withdraw(self.url)

    # What happens to it

    def train(self) -> None:
        """Steps 10 and 20 are in every tier."""
        assert self.restore() == 0
        self.save_until_drained(OLDER)
        self.save_until_drained(NEWEST)
        assert self.committed() == dict.fromkeys(self.tiers(), NEWEST)

    def tiers(self) -> list[str]:
        return [tier for tier in contract.TIERS if tier != contract.TIER_DISK or self.disk_root is not None]

    def fail(self, operation: str, fault: Fault, **fields: Any) -> None:
        """A fault of the store, from now on."""
        self.store.add(TierFault(operation, fault, **fields))

    def save_until_drained(self, step: int, turns: int = 40) -> None:
        """A save, and as many turns as it takes until it is in every tier, at most `turns`."""
        self.save(step)
        for _ in range(turns):
            self.turn()
            if self.committed() == dict.fromkeys(self.tiers(), step):
                return

    def turn(self, count: int = 1) -> None:
        """Like the cluster's, with an agent or a head that dies replaced by a new one."""
        for _ in range(count):
            self.turns += 1
            self.at_turn.pop(self.turns, lambda: None)()
            for worker in self.workers:
                try:
                    worker.pulse()
                    worker.take_part(self)
                except Killed as death:
                    raise WorkerDied(str(death)) from death
            for node in self.nodes:
                node.keeper.flush()
            try:
                self.coordinator._work_once()
            except Killed:
                self.replace_head()
            except KtrainError:
                self.clock.advance(1.0)
            for index, node in enumerate(self.nodes):
                try:
                    node.carry(drain=self.drains)
                except Killed:
                    self.replace_agent(index)
                except ThreadDied:
                    continue
            self.clock.advance(0.5)

    def save(self, step: int) -> None:
        for worker in self.workers:
            self.save_of(worker, step)

    def save_of(self, worker: Worker, step: int) -> bool:
        """One rank's save; what a volume refuses is kept for `alarms`, as the saver says it in an event."""
        try:
            return worker.save(self.catalog.run_id, step, self.world_size)
        except Killed as death:
            raise WorkerDied(str(death)) from death
        except (CapacityError, UnavailableError):
            self.refused_saves.add(("tier_failed", contract.TIER_MEMORY, worker.rank, None))
            return False

    def new_worker(self, rank: int, node: Node) -> Worker:
        worker = super().new_worker(rank, node)
        if worker.disk is not None and self.disk_faults:
            worker.disk.tier = FaultyTier(worker.disk.tier, *self.disk_faults, clock=self.clock)
        return worker

    def fail_disk(self, index: int, *faults: TierFault) -> None:
        """Faults of a node's disk, as its agent sees it from now on."""
        disk = self.nodes[index].keeper._disk
        assert disk is not None
        disk.tier = FaultyTier(disk.tier, *faults, clock=self.clock)

    def use_calls(self, index: int, calls: SlotCalls) -> None:
        """The border of a node's workers to the system, from now on."""
        node = self.nodes[index]
        node.volume.close()
        node.calls = calls
        node.volume = node.open_volume(calls)
        for worker in self.workers:
            if worker.rank in self.assignment[node.name]:
                worker.volume = node.volume

    def replace_head(self) -> None:
        """The head is dead; a new one knows nothing and takes the attempt over."""
        self.head.coordinator = self.new_coordinator()
        self.coordinator.adopt_attempt(self.epoch, self.assignment)

    def replace_agent(self, index: int) -> None:
        """A node's agent is dead, without a last word; a new one finds what lies in the volume."""
        node = self.nodes[index]
        self.head.is_away = True
        node.end_agent()
        self.head.is_away = False
        node.start_agent()
        for worker in self.workers:
            if worker.rank in self.assignment[node.name]:
                worker.caller = LocalCaller(node.keeper.handlers())

    def heal(self) -> None:
        """Whatever was broken from outside works again."""
        self.store.heal()
        self.disk_faults = []
        self.wire.cut.clear()
        whole = LocalWire()
        self.wire.before_piece, self.wire.on_piece = whole.before_piece, whole.on_piece

    def policies_keep(self, bucket: int) -> None:
        """From the next pulses on retention keeps this many checkpoints in the bucket."""
        self.policies = Policies(Every(10), Keep(bucket=bucket))
        for worker in self.workers:
            worker.policies = self.policies

    def open_anew(self) -> None:
        """The run's directory as it is now, opened under another URL, by new heads and agents."""
        for node in self.nodes:
            node.close()
        withdraw(self.url)
        self.url = publish(self.store, clock=self.clock)
        self.catalog = RunCatalog.open(self.url, timeouts=self.timeouts, clock=self.clock)
        self.head.coordinator = self.new_coordinator()
        self.nodes = [Node(self, node.name) for node in self.nodes]

    def lose_node(self, index: int) -> None:
        """The machine is gone with its memory and its disk."""
        name = self.nodes[index].name
        super().lose_node(index)
        if self.disk_root is not None:
            shutil.rmtree(self.disk_root / self.catalog.run_id / name, ignore_errors=True)

    def lose_all(self) -> None:
        for index in range(len(self.nodes)):
            self.lose_node(index)

    def reboot(self) -> None:
        """Both machines restart: memory is gone, their disks are not."""
        for index in range(len(self.nodes)):
            super().lose_node(index)

    def end_processes(self) -> None:
        """All workers end; agents and volumes stay."""
        for node in self.nodes:
            node.volume.close()
            node.volume = node.open_volume(node.calls)
        self.workers = []

    def restart(self) -> Resumed | Stopped:
        """A new attempt up to the word on what it continues from, with a new try for each that died."""
        for _ in range(20):
            self.end_processes()
            try:
                step = self.restore()
            except WorkerDied:
                continue
            except Killed:  # the one that was starting the attempt: its launcher gives the same command again
                continue
            except RestoreFailed as error:
                return Stopped(error.kind, str(error))
            except KtrainError as error:
                return Stopped(error.kind, str(error))
            return Resumed(step, tuple(worker.tiers.get(worker.rank, "none") for worker in self.workers))
        raise AssertionError("the attempts die again and again")

    # What is there

    def contents(self) -> set[tuple[str, int, bytes]]:
        """(what, step, bytes) of what nobody may delete on a doubt: the bucket's objects, and good copies in memory."""
        objects = [(name, data) for name, data in self.bucket.objects.items() if name.startswith("checkpoints/step-")]
        keeps_all = self.policies.keep.bucket > 1  # more than a case commits
        found = {(name, ALWAYS if keeps_all else int(name.split("-")[1][:8]), data) for name, data in objects}
        for node in self.nodes:
            for held in node.volume.scan():
                (payload, manifest), _ = self.takes(held.rank, held.identity)
                if (node.volume.path / f"{held.slot}.safetensors").read_bytes()[: len(payload)] == payload:
                    what = f"{node.name} rank {held.rank} {held.identity}"
                    found.add((what, held.identity.step, manifest.to_bytes()))
        return found

    def disk_of(self, index: int) -> NodeDisk:
        """The directory of a node, as anybody may open it."""
        assert self.disk_root is not None
        return NodeDisk(
            self.disk_root,
            run=self.catalog.run_id,
            node=self.nodes[index].name,
            timeouts=self.timeouts,
            clock=self.clock,
        )

    def slot_of(self, node: int, rank: int, step: int) -> Path:
        """The payload file of a snapshot in a node's volume; its manifest lies beside it."""
        volume = self.nodes[node].volume
        held = [held for held in volume.scan() if (held.rank, held.identity.step) == (rank, step)]
        return volume.path / f"{max(held, key=lambda one: one.identity.epoch).slot}.safetensors"

    def object_of(self, what: str, rank: int, step: int) -> str:
        """The name in the bucket of a payload, manifest or record."""
        ends = "" if what == "record" else f"rank-{rank:05d}"
        names = [name for name in self.bucket.objects if kind_of(name) == what and f"step-{step:08d}/" in name]
        return next(name for name in sorted(names) if ends in name)

    def deadline(self) -> Deadline:
        return Deadline.after(10.0, self.clock)

    def alarms(self) -> set[Alarm]:
        """Everything that was said to be wrong."""
        found = {
            (event.kind, event.fields.get("tier"), event.fields.get("rank"), event.fields.get("step"))
            for event in self.events
            if event.kind in _ALARMS
        }
        found |= self.refused_saves
        for failure in self.refused:  # by a rank that restores; `checkpoint.restore` says the same as events
            kind = "bad_copy" if failure.corrupt else "notice"
            found.add((kind, failure.copy.tier, failure.copy.rank, failure.copy.identity.step))
        return found


def kind_of(name: str) -> str:
    """What an object of the run is: "record", "payload", "manifest", "attempt start" and so on."""
    head, _, last = name.rpartition("/")
    if name == contract.RUN_FILE:
        return "run"
    if head in (contract.MARKS_DIR, contract.QUARANTINE_DIR):
        return "mark"
    if name in (contract.MARKS_DIR, contract.QUARANTINE_DIR):
        return name
    if head == contract.ATTEMPTS_DIR:
        return f"attempt {last.removesuffix('.json').rpartition('-')[2]}"
    if last.startswith("commit-"):
        return "record"
    if last.startswith("rank-"):
        return "payload" if last.endswith(".safetensors") else "manifest"
    return {"": "run", contract.ATTEMPTS_DIR: "attempts", contract.CHECKPOINTS_DIR: "checkpoints"}.get(name, "data")

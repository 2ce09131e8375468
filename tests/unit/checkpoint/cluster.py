"""A whole job in one process without threads or torch: a coordinator, a keeper per node, and workers that seal.

Everything moves only when a test says so: `turn()` is one pulse of each worker, one beat of each node, one round of
the coordinator's storage work and one round of carrying.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.abc.transport import PartialRead
from ktrain.base import contract, settings
from ktrain.base.clock import Deadline
from ktrain.base.control import Caller, LocalCaller
from ktrain.base.events import Event
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.cadence import Schedule
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.node import NodeKeeper, NodePlace
from ktrain.checkpoint.packed import unpack
from ktrain.checkpoint.policy import Every, Keep, Policies
from ktrain.checkpoint.pulse import keep_known
from ktrain.checkpoint.relay import newest_numbers
from ktrain.checkpoint.source import Fetched, NearestSource, Openers, PeerCalls
from ktrain.errors import CorruptionError, KtrainError, UnavailableError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import copies_begin
from ktrain.snapshot.arena import NodeVolume
from ktrain.snapshot.slots import SlotCalls
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.local_transport import LocalTransport, LocalWire
from ktrain.tier.disk import NodeDisk, open_disk
from tests.unit.checkpoint.builders import snapshot

NUM_SLOTS = 4

Takes = Callable[[int, Identity], tuple[tuple[bytes, Manifest], tuple[bytes, Manifest] | None]]
"""What a rank saves of a step: its share, and the copies beside it."""


def undivided(rank: int, at: Identity) -> tuple[tuple[bytes, Manifest], None]:
    """What no other rank holds."""
    return snapshot(rank, at), None


class ListLog:
    """A log that writes at once, by a call."""

    def __init__(self, write: Callable[[Event], None]) -> None:
        self._write = write
        self.num_emitted = 0

    def emit(self, event: Event) -> None:
        self.num_emitted += 1
        self._write(event)

    def num_waiting(self) -> int:
        return 0

    def flush(self) -> None:
        """All is written."""

    def close(self) -> None:
        """Nothing is open."""


class Head:
    """The way to the head; a test may cut it, or put another head there."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.coordinator = coordinator
        self.lose_answers = 0
        self.is_away = False

    def call(self, name: str, params: dict[str, Any], *, timeout_s: float) -> dict[str, Any]:
        if self.is_away:
            raise UnavailableError("the head does not answer")
        answer = LocalCaller(self.coordinator.handlers()).call(name, params, timeout_s=timeout_s)
        if self.lose_answers:
            self.lose_answers -= 1
            raise UnavailableError("the answer was lost")
        return answer


@dataclass
class Worker:
    """One rank, as its keeper sees it."""

    rank: int
    epoch: int
    caller: Caller
    volume: NodeVolume
    step: int = 0
    phase: str = "start"
    closed: bool = False
    stop_wanted: str | None = None
    stop_ack: list[Any] | None = None
    restore: dict[str, Any] | None = None
    policies: Policies = Policies()
    schedule: Schedule = field(init=False)
    deaf: bool = False  # to changes of the cadence
    exact: bool = True  # its device and its layout give the same bits again
    answer: dict[str, Any] = field(default_factory=dict)
    events: list[dict[str, Any]] = field(default_factory=list)
    restored: int | None = None
    error: tuple[str, str] | None = None
    tiers: dict[int, str] = field(default_factory=dict)
    ready_round: int = 0
    wanted: dict[int, tuple[int, int]] = field(default_factory=dict)  # by saved rank; its own snapshot where empty
    wire_nbytes: int = 0  # of the last restore
    disk: NodeDisk | None = None  # this process's own, as `checkpoint.restore` opens it
    reached: Callable[[str], None] = lambda moment: None  # called in the middle of a save; may raise
    takes: Takes = undivided

    def __post_init__(self) -> None:
        self.schedule = Schedule(self.policies.every.memory)

    def pulse(self) -> None:
        said = {
            "rank": self.rank,
            "epoch": self.epoch,
            "step": self.step,
            "phase": self.phase,
            "closed": self.closed,
            "stop_ack": self.stop_ack,
            "cadence": self.schedule.said,
            "restore": self.restore,
            "stop_wanted": self.stop_wanted,
            "policies": self.policies.to_json(),
            "news": False,
            "instance": f"{self.rank}/{self.epoch}",
            "events_from": 0,
            "events_logged": 0,
            "events": self.events,
        }
        answer = self.caller.call("pulse", said, timeout_s=1.0)
        keep_known(answer, self.answer)
        self.answer = answer
        if self.answer["cadence"] is not None and not self.deaf:
            self.schedule.take(self.answer["cadence"], self.step)

    def save(self, run_id: str, step: int, world_size: int) -> bool:
        """Seals a snapshot; false where no slot is free."""
        (payload, manifest), beside = self.takes(self.rank, Identity(run_id, step, self.epoch, world_size))
        protect = [(int(at), int(epoch)) for at, epoch in self.answer.get("protect", [])]
        begin = copies_begin(len(payload))
        nbytes = len(payload) if beside is None else begin + len(beside[0])
        writer = self.volume.acquire(self.rank, nbytes, protect=protect, limit=NUM_SLOTS)
        if writer is None:
            return False
        with writer:
            half = len(payload) // 2
            writer.memory[:half] = payload[:half]
            self.reached("half staged")
            writer.memory[half : len(payload)] = payload[half:]
            if beside is not None:
                writer.memory[begin:] = beside[0]
            self.reached("staged")
            writer.seal(manifest, None if beside is None else beside[1])
        self.reached("sealed")
        self.step = step
        return True

    def take_part(self, cluster: Cluster) -> None:
        """One look at the head's word on the restore, as `checkpoint.restore` does it."""
        word = self.answer.get("restore")
        if word is None or self.restored is not None or self.error is not None:
            return
        number, state = int(word["round"]), word["state"]
        if state == "failed":
            self.error = (word["error"]["kind"], word["error"]["message"])
        elif state == "fresh":
            self.restored = 0
            self.restore = applied(number, "none", self.exact)
        elif state == "weighing" and self.ready_round != number and "manifests" in word:
            self.ready_round = number
            self.restore = {"round": number, "status": "wants", "wants": self._wants(word)}
        elif state == "loading" and self.ready_round != number and "sources" in word:
            self.ready_round = number
            self._load(word, cluster, number)
        elif state == "go" and number == self.ready_round:
            self.restored = self.step = int(word["identity"]["step"])
            self.phase = "train"
            self.restore = applied(number, max(self.tiers.values(), key=contract.TIERS.index), self.exact)

    def _wants(self, word: dict[str, Any]) -> dict[int, list[int]]:
        sizes = {rank: manifest.nbytes for rank, manifest in _manifests_of(word).items()}
        wanted = self.wanted or {self.rank: (0, sizes[self.rank])}
        return {rank: [end - begin, sizes[rank]] for rank, (begin, end) in wanted.items()}

    def _load(self, word: dict[str, Any], cluster: Cluster, number: int) -> None:
        manifests = _manifests_of(word)
        copies = {int(rank): [Copy.from_json(value) for value in values] for rank, values in word["sources"].items()}
        openers = Openers(
            volume=self.volume,
            tier=cluster.catalog.tier,
            disk=self.disk,
            peers=PeerCalls(self._fetch, self._read_parts, self.rank),
            deadline_of=lambda nbytes: Deadline.after(10.0),
            num_threads=1,
        )
        source = NearestSource(manifests, copies, openers, lambda failure: self._refused(failure, cluster))
        try:
            wanted = self.wanted or {self.rank: (0, manifests[self.rank].nbytes)}
            source.fetch({rank: [span] for rank, span in wanted.items()}, deadline=Deadline.after(10.0))
            for rank, (begin, end) in wanted.items():
                (expected, _), _ = self.takes(rank, manifests[rank].identity)
                assert bytes(source.view(rank, begin, end)) == expected[begin:end], (
                    "bytes that nobody saved were loaded"
                )
            self.tiers = dict(source.tiers)
            self.wire_nbytes = source.tally.wire_nbytes
            self.restore = {"round": number, "status": "ready"}
        except (CorruptionError, UnavailableError):
            failures = [failure.to_json() for failure in source.failures]
            self.restore = {"round": number, "status": "failed", "copies": failures}
        finally:
            source.close()

    def _fetch(self, copy: Copy, wanted: PartialRead) -> Fetched:
        said = {"copy": copy.to_json(), "wanted": wanted.to_json(), "timeout_s": 5.0}
        return Fetched.from_json(self.caller.call("fetch", said, timeout_s=5.0))

    def _read_parts(self, copy: Copy, wanted: PartialRead, deadline: Deadline) -> int:
        del deadline
        said = {"copy": copy.to_json(), "wanted": wanted.to_json(), "timeout_s": 5.0}
        return int(self.caller.call("read", said, timeout_s=5.0)["wire_nbytes"])

    def _refused(self, failure: Any, cluster: Cluster) -> None:
        cluster.refused.append(failure)
        if failure.corrupt and failure.copy.tier == contract.TIER_MEMORY:
            self.volume.discard(failure.copy.rank, failure.copy.identity, failure.reason)
        elif failure.corrupt and failure.copy.tier == contract.TIER_DISK and self.disk is not None:
            self.disk.discard(failure.copy.rank, failure.copy.identity)


def _manifests_of(word: dict[str, Any]) -> dict[int, Manifest]:
    return {rank: Manifest.from_bytes(text.encode()) for rank, text in unpack(word["manifests"]).items()}


def applied(number: int, tier: str, exact: bool) -> dict[str, Any]:
    read = {"nbytes": 1, "wanted_nbytes": 1, "num_reads": 1, "wire_nbytes": 0, "bucket_nbytes": 0}
    return {"round": number, "status": "applied", "tier": tier, **read, "seconds": 0.1, "exact": exact}


class Node:
    """A machine: a volume root, a keeper, and the workers that run there now."""

    def __init__(self, cluster: Cluster, name: str) -> None:
        self.name = name
        self.root = cluster.folder / name
        self._cluster = cluster
        self.calls = SlotCalls()  # of the workers; a test puts faults there
        self.agent_calls = SlotCalls()  # of the agent, which lands replicas
        self.volume = self.open_volume(self.calls)  # the workers' own
        self.fills = True  # slots from the bucket, where the head wants it
        self.at_fill: Callable[[], None] | None = None  # once, before the next fill
        self.start_agent()

    def open_volume(self, calls: SlotCalls) -> NodeVolume:
        return NodeVolume(self.root, node=self.name, run=self._cluster.catalog.run_id, calls=calls)

    def start_agent(self) -> None:
        """A new keeper on what lies here."""
        cluster = self._cluster
        self.transport = LocalTransport(cluster.wire, self.open_volume(self.agent_calls))
        place = NodePlace(self.name, self.name, self.root, host=self.name)
        self.keeper = NodeKeeper(
            cluster.url,
            place=place,
            head=cluster.head,
            transport=self.transport,
            timeouts=cluster.timeouts,
            clock=cluster.clock,
        )
        self.drained: dict[Any, Any] = {}
        self.pulled: dict[Any, Any] = {}
        self.stored: dict[Any, Any] = {}

    def end_agent(self) -> None:
        self.keeper.close()
        self.transport._volume.close()

    def carry(self, *, drain: bool) -> None:
        carrier = self.keeper._carrier  # its threads are not started here
        carrier._pull_once(self.pulled)
        carrier._disk_once(self.stored)
        if carrier._wanted.fill.copies:
            act, self.at_fill = self.at_fill, None
            if act is not None:
                act()
        if self.fills:
            self.keeper._carrier._fill_once({})
        if drain:
            carrier._drain_once(self.drained)

    def held(self) -> list[tuple[int, Identity]]:
        return [(held.rank, held.identity) for held in self.volume.scan()]

    def close(self) -> None:
        self.volume.close()
        self.end_agent()


class Cluster:
    """`num_nodes` nodes with `per_node` ranks each, and a run at `url`."""

    def __init__(
        self,
        folder: Path,
        *,
        num_nodes: int = 2,
        per_node: int = 1,
        url: str | None = None,
        clock: FakeClock | None = None,
    ) -> None:
        self.folder = folder
        self.url = url or str(folder / "run")
        self.timeouts = Timeouts(patience_s=20)
        self.clock = clock or FakeClock()
        self.events: list[Event] = []
        self.refused: list[Any] = []
        self.wire = LocalWire()
        self.policies = Policies(Every(10), Keep(bucket=3))
        self.catalog = RunCatalog.open(self.url, timeouts=self.timeouts, clock=self.clock)
        self.per_node = per_node
        self.world_size = num_nodes * per_node
        self.head = Head(self.new_coordinator())
        self.nodes = [Node(self, contract.node_name(index)) for index in range(num_nodes)]
        self.workers: list[Worker] = []
        self.epoch = 0
        self.drains = True
        self.wanted: dict[int, dict[int, tuple[int, int]]] = {}  # what ranks want of saved ranks; else their own
        self.takes: Takes = undivided  # what the ranks of the next attempts save

    def new_coordinator(self) -> Coordinator:
        intake = Intake(ListLog(self.hear), known=newest_numbers(self.events))
        return Coordinator(self.catalog, timeouts=self.timeouts, intake=intake, clock=self.clock)

    def hear(self, event: Event) -> None:
        """An event has come into the log."""
        self.events.append(event)

    @property
    def coordinator(self) -> Coordinator:
        return self.head.coordinator

    @property
    def assignment(self) -> dict[str, range]:
        each = self.per_node
        return {node.name: range(index * each, (index + 1) * each) for index, node in enumerate(self.nodes)}

    def begin(self) -> None:
        """A new attempt with fresh workers on all nodes."""
        self.epoch = self.catalog.next_epoch({"by": "test"})
        self.coordinator.begin_attempt(self.epoch, self.assignment)
        self.workers = [
            self.new_worker(rank, node)
            for node, ranks in zip(self.nodes, self.assignment.values(), strict=True)
            for rank in ranks
        ]
        for worker in self.workers:
            worker.restore = {"round": 0, "status": "waiting"}

    def new_worker(self, rank: int, node: Node) -> Worker:
        run, root = self.catalog.run_id, settings.env(contract.ENV_DISK)
        disk = open_disk(root, run=run, node=node.name, timeouts=self.timeouts)
        caller = LocalCaller(node.keeper.handlers())
        wanted = self.wanted.get(rank, {})
        return Worker(
            rank,
            self.epoch,
            caller,
            node.volume,
            policies=self.policies,
            disk=disk,
            wanted=wanted,
            takes=self.takes,
        )

    def turn(self, count: int = 1) -> None:
        for _ in range(count):
            for worker in self.workers:
                worker.pulse()
                worker.take_part(self)
            for node in self.nodes:
                node.keeper.flush()
            try:
                self.coordinator._work_once()
            except KtrainError:
                self.clock.advance(1.0)
            for node in self.nodes:
                node.carry(drain=self.drains)
            self.clock.advance(0.5)

    def restore(self, turns: int = 60) -> int:
        """A new attempt up to the step that all ranks agree on; an error of theirs is raised."""
        self.begin()
        for _ in range(turns):
            self.turn()
            if all(worker.restored is not None for worker in self.workers):
                self.turn(2)
                (step,) = {worker.restored for worker in self.workers}
                assert step is not None
                return step
            errors = [worker.error for worker in self.workers if worker.error is not None]
            if len(errors) == len(self.workers):
                raise RestoreFailed(*errors[0])
        raise AssertionError(f"no end: {[worker.restore for worker in self.workers]}")

    def save(self, step: int) -> None:
        for worker in self.workers:
            assert worker.save(self.catalog.run_id, step, self.world_size), f"no slot for step {step}"

    def save_and_settle(self, step: int) -> None:
        """A save that reaches memory, peers and (unless drains are off) the bucket."""
        self.save(step)
        self.turn(8)

    def lose_node(self, index: int) -> None:
        """The machine is gone with its memory; an empty one of the same name takes its place."""
        node = self.nodes[index]
        node.close()
        shutil.rmtree(node.root)
        self.coordinator.forget_node(node.name)
        self.nodes[index] = Node(self, node.name)

    def spoil_memory(self, index: int, rank: int, step: int) -> None:
        """Flips a bit of what a node holds of a rank's step."""
        volume = self.nodes[index].volume
        found = [held for held in volume.scan() if (held.rank, held.identity.step) == (rank, step)]
        slot = max(found, key=lambda held: held.identity.epoch).slot  # of the newest attempt that made this step
        flip_file(volume.path / f"{slot}.safetensors")

    def spoil_bucket(self, step: int, rank: int) -> None:
        for commit in self.catalog.listing().commits:
            if commit.identity.step == step:
                name = commit.ranks[rank].payload
                deadline = Deadline.after(10.0)
                data = bytearray(self.catalog.tier.read(name, deadline=deadline))
                data[len(data) // 2] ^= 1
                self.catalog.tier.write(name, bytes(data), deadline=deadline)

    def committed(self) -> dict[str, int]:
        return {tier: step for tier, (step, _) in self.coordinator.committed().items()}

    def said(self, kind: str) -> list[dict[str, Any]]:
        return [event.fields for event in self.events if event.kind == kind]

    def close(self) -> None:
        for node in self.nodes:
            node.close()


class RestoreFailed(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}")
        self.kind = kind


def flip_file(path: Path) -> None:
    flip_at(path, path.stat().st_size // 2)


def flip_at(path: Path, at: int) -> None:
    """Flips a bit of one byte."""
    with open(path, "r+b") as file:
        file.seek(at)
        value = file.read(1)[0]
        file.seek(at)
        file.write(bytes([value ^ 1]))

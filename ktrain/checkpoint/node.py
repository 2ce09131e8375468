"""A node's snapshot duties: tell the head what lies here, keep replicas, drain to the bucket, serve the ranks.

One NodeKeeper runs in each node's agent; in plain python and torchrun, where there is no agent, one runs inside each
rank's process. It imports neither torch nor ray, and takes from the head only wanted states, so that either side may
die and come back at any moment.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.abc.transport import Transport
from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.control import Caller, Handler
from ktrain.base.process import let_training_first
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.carry import Carrier, Ends, Wanted
from ktrain.checkpoint.fill import WantedFills
from ktrain.checkpoint.relay import Relay
from ktrain.checkpoint.replicas import WantedReplicas
from ktrain.checkpoint.upload import DrainReports
from ktrain.errors import ConflictError, CorruptionError, KtrainError
from ktrain.format.manifest import Identity
from ktrain.snapshot.arena import NodeVolume, ProblemKind
from ktrain.tier.disk import NodeDisk, open_disk

_LOG = logging.getLogger(__name__)
_PASSED_ON = ("step", "phase", "closed", "stop_ack", "stop_wanted", "restore", "policies")  # of a pulse, to the head
_MEMORY_TIERS = (contract.TIER_MEMORY, contract.TIER_PEER)
_DAMAGED = (ProblemKind.UNREADABLE, ProblemKind.FOREIGN, ProblemKind.SHORT)


@dataclass(slots=True)
class _Rank:
    """A worker of this node, as its own pulses tell."""

    heard_s: float
    moved_s: float
    said: dict[str, Any] = field(default_factory=dict)

    def to_json(self, now_s: float) -> dict[str, Any]:
        """What the head is to know of it."""
        return {
            **{name: self.said[name] for name in _PASSED_ON},
            "cadence": self.said.get("cadence"),
            "silent_s": now_s - self.heard_s,
            "moved_s": now_s - self.moved_s,
        }


@dataclass(slots=True)
class _RestoreWord:
    """The head's word on the restore, whose long part comes once for each round.

    Attributes:
        newest: of the newest round, with its long part; None while nothing is restored.
        round: of which the long part is here; -1 before there is one.
    """

    newest: dict[str, Any] | None = None
    round: int = -1

    def take(self, word: dict[str, Any] | None) -> None:
        """Takes the word of one answer."""
        if word is None:
            self.newest, self.round = None, -1
            return
        if "sources" in word or word["round"] != self.round:
            self.newest = word
        elif self.newest is not None:
            self.newest = {**self.newest, **word}
        if "sources" in word or "identity" not in word:
            self.round = int(word["round"])

    def of(self, report: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The word for a rank that reported so; the long part only where it has not seen this round."""
        if self.newest is None or report is None:
            return None
        if int(report["round"]) == int(self.newest["round"]):
            return {key: value for key, value in self.newest.items() if key not in ("manifests", "sources")}
        return self.newest


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where a keeper is: `node` names the volume's folder, `member` the keeper (a node may have several)."""

    node: str
    member: str
    volume_root: Path
    host: str = field(default_factory=ids.host_name)


class NodeKeeper:
    """Keeps one node's part of the memory, peer and bucket tiers. Safe from any thread."""

    def __init__(
        self,
        run_url: str,
        *,
        place: NodePlace,
        head: Caller,
        transport: Transport | None,
        timeouts: Timeouts,
        clock: Clock = SYSTEM_CLOCK,
    ) -> None:
        self._run_url = run_url
        self._place = place
        self._head = head
        self._transport = transport
        self._timeouts = timeouts
        self._clock = clock
        self._instance = ids.random_id()
        self._relay = Relay(place.member, clock)
        self.on_wire: Callable[[dict[str, Any]], None] | None = None
        """Called with each word of the head on the Ray cluster (address, generation); set by the agent."""
        self._lock = threading.RLock()  # guards the fields below; never held across I/O
        self._view: dict[str, Any] = {}  # the head's last answer
        self._ranks: dict[int, _Rank] = {}
        self._drained = DrainReports()
        self._wanted_manifests: list[dict[str, Any]] = []
        self._restore = _RestoreWord()
        self._freed = threading.Event()
        self._volume: NodeVolume | None = None
        self._disk: NodeDisk | None = None
        self._volume_failure: str | None = None  # why there is none
        self._damage = _Damage(self.emit)
        self._head_away = False
        self._wake = threading.Event()
        self._closed = threading.Event()
        self._beat_lock = threading.Lock()  # one beat at a time
        self._thread: threading.Thread | None = None
        self._carrier = Carrier(
            Ends(run_url, place.node, lambda: self._volume, lambda: self._disk, transport),
            emit=self.emit,
            drained=self._note_drained,
            filled=self._wake.set,
            timeouts=timeouts,
            clock=clock,
        )

    # Life

    def start(self) -> None:
        """Starts the threads that beat and that carry bytes."""
        self._thread = threading.Thread(target=self._beat_loop, name="ktrain-beat", daemon=True)
        self._thread.start()
        self._carrier.start()

    def close(self) -> None:
        """Says the last word to the head, ends the threads and lets go of the volume. Idempotent."""
        if self._closed.is_set():
            return
        self.flush()
        self._closed.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(self._timeouts.call_s)
        self._carrier.close()
        for end in (self._transport, self._disk, self._volume):
            if end is not None:
                end.close()

    def flush(self) -> None:
        """One beat now, so that what was said so far is with the head; a head that is away is not waited for."""
        try:
            self._beat()
        except KtrainError as error:
            _LOG.debug("flush: %s", error)

    @property
    def joined(self) -> bool:
        """Whether the head has answered and the volume was looked at, for better or worse."""
        return self._volume is not None or self._volume_failure is not None or self._freed.is_set()

    def wait_freed(self, deadline: Deadline) -> bool:
        """Waits, bounded, until the head has had this node's memory freed; false when it has not."""
        return self._clock.wait(self._freed, deadline.remaining_s())

    def emit(self, kind: str, **fields: Any) -> None:
        """An event of this node, on its way to the head."""
        self._relay.emit(kind, int(self._view.get("epoch", 0)), **fields)
        self._wake.set()

    def _note_drained(self, report: dict[str, Any]) -> None:
        if self._drained.add(report):
            self._wake.set()

    # For the ranks

    def handlers(self) -> dict[str, Handler]:
        """Calls that workers of this node make."""
        return {"pulse": self._pulse, **self._carrier.replicas.handlers()}

    def _pulse(self, said: dict[str, Any]) -> dict[str, Any]:
        """A worker's sign of life with its news; the answer is what it must know."""
        rank, now = int(said["rank"]), self._clock.monotonic()
        events = self._relay.take(said)  # also of a worker that is fenced below
        with self._lock:
            view = self._view
            epoch = int(view.get("epoch", 0))
            if epoch > int(said["epoch"]):
                raise ConflictError(
                    f"rank {rank}: it belongs to epoch {said['epoch']}, the run is in epoch {epoch}; this process is "
                    "of an older attempt and must end"
                )
            if epoch == int(said["epoch"]):
                known = self._ranks.get(rank)
                moved = known is None or any(known.said.get(key) != said[key] for key in ("step", "phase"))
                self._ranks[rank] = _Rank(now, now if known is None or moved else known.moved_s, said)
        if said["news"]:
            self._wake.set()
        with self._lock:
            # A volume that cannot be opened costs the memory tier, not the training.
            opened = self._volume is not None or self._volume_failure is not None
            ready = epoch == int(said["epoch"]) and opened
            return {
                "ready": ready,
                **events,
                "run": view.get("run"),
                "format": view.get("format"),
                "world_size": view.get("world_size"),
                "node_sizes": view.get("node_sizes") if ready else None,
                "committed": view.get("committed"),  # None until the head has answered this agent, which may be new
                "protect": view.get("protect"),
                "draining": view.get("draining"),
                "stop": view.get("stop") if ready else None,
                "cadence": view.get("cadence") if ready else None,
                "refusal": view.get("refusal") if ready else None,
                "restore": self._restore.of(said["restore"]) if ready else None,
            }

    # Beats

    def _beat_loop(self) -> None:
        let_training_first()
        while not self._closed.is_set():
            self._clock.wait(self._wake, self._timeouts.beat_s)
            self._wake.clear()
            try:
                self._beat()
                self._head_away = False
            except KtrainError as error:
                if not self._head_away:
                    _LOG.warning("head of %s: %s", self._run_url, error)
                self._head_away = True
            except Exception:  # noqa: BLE001 -- top of the thread: recorded, the next beat tries again
                _LOG.exception("beat: unexpected failure")

    def _beat(self) -> None:
        with self._beat_lock:
            answer = self._head.call("beat", self._beat_message(), timeout_s=self._timeouts.call_s)
            self._relay.settle(answer)
            self._take(answer)

    def _beat_message(self) -> dict[str, Any]:
        held = [] if self._volume is None else self._volume.scan()
        wanted, now = self._wanted_manifests, self._clock.monotonic()
        manifests = [text for want in wanted if (text := _manifest_text(want, self._volume, self._disk)) is not None]
        with self._lock:
            ranks = {str(rank): known.to_json(now) for rank, known in self._ranks.items()}
            have_read = all(
                _has_read(ranks.get(str(rank)), self._restore.round) for rank in self._view.get("ranks", ())
            )
            message = {
                "member": self._place.member,
                "node": self._place.node,
                "host": self._place.host,
                "instance": self._instance,
                "epoch": int(self._view.get("epoch", 0)),
                "wire": None if self._transport is None else self._transport.address(),
                "has_looked": self.joined,
                "held": [[entry.rank, entry.identity.to_json()] for entry in held],
                "on_disk": _on_disk(self._carrier.on_disk),
                "manifests": manifests,
                "ranks": ranks,
                "restore_round": self._restore.round,
                "drained": self._drained.newest(),
                "filled": list(self._carrier.fills),
                "freed": self._freed.is_set(),
                **self._relay.message(),
            }
        if have_read:
            self._carrier.replicas.end_loans()  # before the head can know, and let anybody train
        return message

    def _take(self, answer: dict[str, Any]) -> None:
        if self._volume is None and not self._freed.is_set():
            self._open_volume(str(answer["run"]))
        with self._lock:
            is_new = answer["epoch"] != self._view.get("epoch")
            if is_new:
                self._ranks, self._restore = {}, _RestoreWord()
                self._relay.begin(int(answer["epoch"]))
            fresh_manifests = answer["want_manifests"] != self._wanted_manifests
            self._wanted_manifests = answer["want_manifests"]
            moved = [rank for rank in answer["ranks"] if rank not in self._view.get("ranks", [])]
            self._view = answer
            self._restore.take(answer["restore"])
        if self._volume is not None:
            if is_new:
                self._carrier.replicas.end_loans()  # who borrowed is dead
                self._damage.look(self._volume, self._disk)  # as found by those who restore now
            for rank in moved:
                self._volume.release(rank)  # kept for another node so far: now its own process writes these slots
                self._carrier.replicas.release(rank)
        if self.on_wire is not None and answer["wire"] is not None:
            self.on_wire(answer["wire"])
        if self._volume is not None and answer["committed"]:
            _announce(self._volume, answer)
        if fresh_manifests and self._wanted_manifests:
            self._wake.set()
        self._carrier.want(
            Wanted(
                drain=answer["drain"],
                ranks=[rank for rank in answer["ranks"] if rank in self._ranks],
                replicas=WantedReplicas(
                    own=answer["ranks"],
                    keeps=answer["keeps"],
                    pull=answer["pull"],
                    peers=answer["peers"],
                    protect=[(int(step), int(epoch)) for step, epoch in answer["protect"]],
                    protect_kept=[(int(step), int(epoch)) for step, epoch in answer["protect_kept"]],
                ),
                disk=answer["disk"],
                disk_gone=[(int(step), int(epoch)) for step, epoch in answer["disk_gone"]],
                fill=WantedFills.from_json(answer["fill"], self._restore.newest),
                epoch=int(answer["epoch"]),
            )
        )
        if answer["free"] and not self._freed.is_set():
            self._free()

    def _free(self) -> None:
        """After success the volume's memory goes back; while somebody still has it open the next beat tries again."""
        if self._transport is not None:
            self._transport.close()
        if self._volume is not None:
            try:
                self._volume.remove()
            except ConflictError as error:
                _LOG.info("free: %s", error)
                return
        if self._disk is not None:
            self._carrier.remove_disk(self._disk)
            self._disk.close()
            self._disk = None
        self._volume = None
        self._freed.set()
        self._wake.set()

    def _open_volume(self, run_id: str) -> None:
        place = self._place
        try:
            volume = NodeVolume(place.volume_root, node=place.node, run=run_id, uri=self._run_url)
        except KtrainError as error:
            if self._volume_failure is None:
                _LOG.warning("volume of %s: %s", place.node, error)
            self._volume_failure = str(error)
            return
        self._disk = open_disk(settings.env(contract.ENV_DISK), run=run_id, node=place.node, timeouts=self._timeouts)
        self._carrier.look_at_disk()  # before any rank asks what there is to restore
        self._volume = volume
        self._damage.look(volume, self._disk)


def _has_read(rank: Mapping[str, Any] | None, number: int) -> bool:
    """Whether a rank has read what it restores in this round, as far as it could."""
    said = None if rank is None else rank["restore"]
    return said is not None and said["status"] in ("ready", "failed", "applied") and int(said["round"]) >= number


def _on_disk(found: Sequence[tuple[int, Identity]] | None) -> list[list[Any]] | None:
    return None if found is None else [[rank, identity.to_json()] for rank, identity in found]


class _Damage:
    """Names the copies of a node that cannot be offered, each once: nobody else will come across them."""

    def __init__(self, emit: Callable[..., None]) -> None:
        self._emit = emit
        self._said: set[Any] = set()

    def look(self, volume: NodeVolume, disk: NodeDisk | None) -> None:
        for copy, fields in _damaged(volume, disk):
            if copy not in self._said:
                self._said.add(copy)
                self._emit("bad_copy", **fields)


def _damaged(volume: NodeVolume, disk: NodeDisk | None) -> Iterator[tuple[Any, dict[str, Any]]]:
    """What names a damaged copy, and the fields of its event. An unreadable manifest says nothing of the step."""
    for problem in volume.problems():
        if problem.kind in _DAMAGED:
            where = {"rank": problem.rank, "tier": contract.TIER_MEMORY, "where": f"{volume.node} {problem.slot}"}
            yield problem, {"step": None, "reason": f"{problem.kind}: {problem.message}", **where}
    for (step, epoch, rank), reason in {} if disk is None else disk.damaged.items():
        where = {"rank": rank, "tier": contract.TIER_DISK, "where": volume.node}
        yield (step, epoch, rank), {"step": step, "reason": reason, **where}


def _manifest_text(want: dict[str, Any], volume: NodeVolume | None, disk: NodeDisk | None) -> dict[str, Any] | None:
    """The manifest that the head asks for, with its text; None where neither volume nor disk has it."""
    rank, identity = int(want["rank"]), Identity.from_json(want["identity"])
    try:
        if volume is not None:
            with volume.open(rank, identity) as slot:
                return {**want, "text": slot.manifest.to_bytes().decode()}
    except KtrainError:
        pass  # it is not in memory, or not whole there; it may be on the disk
    try:
        return None if disk is None else {**want, "text": disk.manifest(rank, identity).to_bytes().decode()}
    except KtrainError:
        return None


def _announce(volume: NodeVolume, answer: Mapping[str, Any]) -> None:
    """Writes what is committed in memory, and needed, where the volume does not say so; a damaged word is mended."""
    needed = [(int(step), int(epoch)) for step, epoch in answer["protect"]]
    committed = {tier: (int(at[0]), int(at[1])) for tier, at in answer["committed"].items() if tier in _MEMORY_TIERS}
    wanted = {tier: at for tier, at in committed.items() if at in needed}
    try:
        if volume.committed() == wanted:
            return
    except CorruptionError as error:
        _LOG.warning("%s", error)
    volume.write_committed(wanted)

"""How a worker's Checkpointer finds its node keeper: the agent of a launcher, or one inside this very process.

Without a launcher (plain python, torchrun) a background thread of rank 0 is the head and every rank's process has a
keeper of its own. The head's address goes to the other ranks through the process group's store; no collective runs.
"""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch.distributed as dist

from ktrain.base import contract, ids, settings
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.base.control import Caller, Client, LocalCaller, Server
from ktrain.base.events import make
from ktrain.base.job import local_path
from ktrain.base.settings import Timeouts, WorkerSettings
from ktrain.base.urls import require_public
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.log import open_log
from ktrain.checkpoint.node import NodeKeeper, NodePlace
from ktrain.checkpoint.quarantine import is_own_fault
from ktrain.errors import ConfigError, DeadlineError, KtrainError
from ktrain.state.topology import Topology

_calls: dict[str, int] = {}  # Checkpointers made so far in this process per run: names the key in the store


class Line(Protocol):
    """A worker's connection to its keeper. `epoch` fences this process; `node` names the folder in `volume_root`."""

    caller: Caller
    epoch: int
    node: str
    volume_root: Path
    has_launcher: bool

    def watch(self, step_of: Callable[[], int | None]) -> None:
        """Has somebody record, from now on, how this process ends and at which step."""

    def close(self, success: bool, reason: str) -> None:
        """Ends what this process itself started for the line."""


@dataclass(slots=True)
class AgentLine:
    """Under a launcher: the node's agent, over its Unix socket."""

    caller: Caller
    epoch: int
    node: str
    volume_root: Path
    has_launcher: bool = True

    def watch(self, step_of: Callable[[], int | None]) -> None:
        """The supervisor sees how a process ends."""

    def close(self, success: bool, reason: str) -> None:
        """The launcher owns everything."""


def connect(run: str | None, topology: Topology, timeouts: Timeouts) -> tuple[str, Line]:
    """Returns the run's URL and the line to the keeper of this node.

    Raises:
        ConfigError: no run is named, its URL holds a secret, or the launcher and the script name different ones.
        ConflictError: the run is live elsewhere.
    """
    if run is not None:
        require_public(run)
    found = settings.worker_settings()
    if found.agent is not None:
        return _connect_agent(run, found)
    if run is None:
        raise ConfigError(
            "Checkpointer: no run is named; pass run='runs/NAME' (or start the script by `ktrain launch --run ...`)"
        )
    return run, PlainLine(run, topology, timeouts)


def _connect_agent(run: str | None, found: WorkerSettings) -> tuple[str, Line]:
    if (
        found.run is None
        or found.epoch is None
        or found.node is None
        or found.token_file is None
        or found.agent is None
    ):
        raise ConfigError(
            f"{contract.ENV_AGENT} is set, but not all of the launcher's variables are; start the script by "
            "`ktrain launch`"
        )
    if run is not None and not same_run(run, found.run):
        raise ConfigError(
            f"Checkpointer: the script names run {run!r}, it was launched as run {found.run!r}; "
            f"launch it with --run {run}, or leave the run out of the script"
        )
    token = Path(found.token_file).read_text().strip()
    return found.run, AgentLine(Client(found.agent, token), found.epoch, found.node, settings.volume_root())


def same_run(first: str, second: str) -> bool:
    """Whether two URLs name one run: the same local folder, or the same text."""
    one, other = local_path(first), local_path(second)
    if one is None or other is None:
        return first.rstrip("/") == second.rstrip("/")
    return one.resolve() == other.resolve()


class _Head:
    """Rank 0's background head: coordinator, event log, and a server where there are other ranks."""

    def __init__(self, run: str, topology: Topology, timeouts: Timeouts) -> None:
        self._timeouts = timeouts
        self._catalog = RunCatalog.open(run, timeouts=timeouts)
        self._world_size = topology.world_size
        self.token = ids.random_id(16)
        self.nonce = ids.random_id()
        with ExitStack() as undo:  # a store that fails in between must not leave us holding the run
            undo.callback(self._catalog.tier.close)
            undo.callback(Holder(self._catalog.tier, local_path=local_path(run), timeouts=timeouts).close)
            self.epoch = self._catalog.next_epoch(
                {"by": ids.process_name(), "world_size": topology.world_size, "nonce": self.nonce}
            )
            self._log = open_log(run, self._catalog.tier, timeouts=timeouts)
            undo.callback(self._log.close)
            self._held = undo.pop_all()
        self._coordinator = Coordinator(self._catalog, timeouts=timeouts, intake=Intake(self._log))
        self.handlers = {**self._coordinator.handlers(), "failed": self.note_failure}
        self._failed = False  # a rank's failure is recorded: the first word on the end of this attempt
        local = topology.local_world_size
        nodes = range(topology.world_size // local)
        assignment = {contract.node_name(index): range(index * local, (index + 1) * local) for index in nodes}
        self._emit("attempt_started", world_size=topology.world_size, nodes=len(assignment), launcher="none")
        self._emit(
            "notice", message="no agent runs here: snapshots are not kept by peers; start by `ktrain launch` for that"
        )
        self._coordinator.begin_attempt(self.epoch, assignment)
        self._coordinator.start()

    def _emit(self, kind: str, **fields: Any) -> None:
        self._log.emit(make(kind, self.epoch, **fields))

    def note_failure(self, said: dict[str, Any]) -> dict[str, Any]:
        """A rank ends by an error: it is recorded at once, because the other ranks may not live to say so."""
        if not self._failed:
            self._failed = True
            fields = {"cause": contract.CAUSE_CRASH, "reason": said["reason"], "step": said["step"]}
            self._emit("failure", rank=said["rank"], **fields)
            self._log.flush()
            committed = max((step for step, _ in self._coordinator.committed().values()), default=None)
            own_fault = said["own_fault"]
            self._record_end({"outcome": "failed", "own_fault": own_fault, "committed_step": committed, **fields})
        return {}

    def _record_end(self, fields: dict[str, Any]) -> None:
        try:
            self._catalog.record(self.epoch, "end", fields)
        except KtrainError as error:
            self._emit("notice", message=f"the end of this attempt is not recorded: {error}")

    def finish(self, success: bool, reason: str) -> None:
        """Waits, bounded, for the other ranks' last word, frees the volumes after success, and records the end."""
        if success:
            self._wait(self._all_closed)
            self._coordinator.free_volumes()
            self._wait(self._coordinator.volumes_freed)
        outcome = "succeeded" if success else reason
        self._emit("attempt_ended", outcome=outcome, committed=self._coordinator.committed())
        if success:
            self._emit("run_ended", outcome=outcome, exit_code=contract.EXIT_OK)
        self._coordinator.close()
        if not self._failed:
            self._record_end({"outcome": outcome})
        self._held.close()  # the log's last words first, the store last

    def _all_closed(self) -> bool:
        progress = self._coordinator.progress()
        return len(progress) == self._world_size and all(rank.closed for rank in progress.values())

    def _wait(self, done: Callable[[], bool]) -> None:
        deadline = Deadline.after(self._timeouts.call_s)
        while not done() and not deadline.expired():
            SYSTEM_CLOCK.sleep(0.02)


class PlainLine:
    """Without a launcher: a keeper in this process, and on rank 0 the head too."""

    has_launcher = False

    def __init__(self, run: str, topology: Topology, timeouts: Timeouts) -> None:
        self.volume_root = settings.volume_root()
        self.node = contract.node_name(topology.rank // topology.local_world_size)
        self._timeouts = timeouts
        self._head: _Head | None = None
        self._server: Server | None = None
        self._rank = topology.rank
        self._hook = sys.excepthook  # whose place `watch` takes
        self._step_of: Callable[[], int | None] | None = None
        self._closed = False
        if topology.rank == 0:
            self._head = _Head(run, topology, timeouts)
            self.epoch = self._head.epoch
            to_head: Caller = LocalCaller(self._head.handlers)
            if topology.world_size > 1:
                self._publish(run, topology)
        else:
            to_head, self.epoch = self._find_head(run, topology)
        place = NodePlace(self.node, f"{self.node}/rank-{topology.rank}", self.volume_root)
        self._to_head = to_head
        self._keeper = NodeKeeper(run, place=place, head=to_head, transport=None, timeouts=timeouts)
        self._keeper.start()
        self.caller: Caller = LocalCaller(self._keeper.handlers())

    def _publish(self, run: str, topology: Topology) -> None:
        assert self._head is not None
        host = "127.0.0.1" if topology.local_world_size == topology.world_size else _own_address()
        self._server = Server(self._head.handlers, address=f"tcp:{host}:0", token=self._head.token)
        word = {
            "address": self._server.address,
            "token": self._head.token,
            "epoch": self._head.epoch,
            "nonce": self._head.nonce,
        }
        _store().set(_key(run), json.dumps(word))

    def _find_head(self, run: str, topology: Topology) -> tuple[Caller, int]:
        key, store = _key(run), _store()
        try:
            store.wait([key], timedelta(seconds=self._timeouts.start_s))
        except (RuntimeError, dist.DistStoreError) as error:
            raise DeadlineError(
                f"rank {topology.rank}: rank 0 did not make its Checkpointer for {run} within "
                f"{self._timeouts.start_s:g} s; every rank must make it, in the same order"
            ) from error
        word = json.loads(store.get(key))
        catalog = RunCatalog.open(run, timeouts=self._timeouts, create=False)
        try:
            starts = {attempt.epoch: attempt.start for attempt in catalog.attempts()}
        finally:
            catalog.tier.close()
        if (starts.get(word["epoch"]) or {}).get("nonce") != word["nonce"]:
            raise ConfigError(
                f"rank {topology.rank}: {run} is not the same directory as on rank 0; name a run that all nodes share"
            )
        return Client(word["address"], word["token"]), int(word["epoch"])

    def watch(self, step_of: Callable[[], int | None]) -> None:
        self._step_of = step_of
        self._hook, sys.excepthook = sys.excepthook, self._on_uncaught

    def _on_uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """The script ends by an error without having closed its Checkpointer."""
        if not self._closed:
            self._note_failure(error)
        self._hook(kind, error, trace)

    def _note_failure(self, error: BaseException) -> None:
        said = {
            "rank": self._rank,
            "step": None if self._step_of is None else self._step_of(),
            "reason": f"{type(error).__name__}: {error}",
            "own_fault": is_own_fault(error),
        }
        try:
            self._to_head.call("failed", said, timeout_s=self._timeouts.call_s)
        except KtrainError:
            pass  # the head is rank 0, and gone: its end is the one that counts

    def close(self, success: bool, reason: str) -> None:
        self._closed = True
        if sys.excepthook == self._on_uncaught:  # else another one stands before it, and still calls it
            sys.excepthook = self._hook
        ends_by = sys.exc_info()[1]
        if reason == "failed" and ends_by is not None:
            self._note_failure(ends_by)
        if success:
            self._keeper.flush()
        if self._head is None and success:
            self._keeper.wait_freed(Deadline.after(self._timeouts.call_s))
        if self._head is None or not success:
            self._keeper.close()
        if self._head is not None:
            self._head.finish(success, reason)
            self._keeper.close()
        if self._server is not None:
            self._server.close()


def _store() -> Any:
    if not dist.is_initialized():
        raise ConfigError(
            "Checkpointer: WORLD_SIZE is over 1; call torch.distributed.init_process_group before the Checkpointer is "
            "made"
        )
    return dist.distributed_c10d._get_default_store()


def _key(run: str) -> str:
    count = _calls[run] = _calls.get(run, 0) + 1
    return f"ktrain/{ids.text_digest(run)}/{count}"


def _own_address() -> str:
    """The address by which other hosts reach this one; no packet is sent."""
    master = settings.env("MASTER_ADDR", "127.0.0.1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((master, 9))
        return str(probe.getsockname()[0])

"""The head: one process per job that decides; everything it knows can be learnt again by the next one.

    python -P -m ktrain.run.head WORK_DIR LAUNCHER_PID

It holds the run, serves the control channel, feeds what it hears into the state machine (`run.states`) and carries
out what the machine says. Its exit code is the job's verdict. Imports neither torch nor, in its own process, Ray.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from contextlib import ExitStack, closing
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import ktrain
from ktrain.abc.tier import Tier
from ktrain.base import atomic, contract, events, ids
from ktrain.base.clock import SYSTEM_CLOCK, Clock, Deadline
from ktrain.base.control import Handler, Server
from ktrain.base.events import Event
from ktrain.base.exits import exit_code
from ktrain.base.job import LaunchSpec, WorkDir, local_path
from ktrain.base.process import ProcessId
from ktrain.base.settings import Timeouts
from ktrain.checkpoint import log
from ktrain.checkpoint.catalog import RunCatalog
from ktrain.checkpoint.coordinate import Coordinator
from ktrain.checkpoint.holder import Holder
from ktrain.checkpoint.intake import Intake
from ktrain.checkpoint.relay import newest_numbers
from ktrain.checkpoint.roster import RankProgress
from ktrain.errors import ConflictError, DeadlineError, KtrainError, UnavailableError
from ktrain.run import submissions, worker
from ktrain.run.failure import Budgets, Exit, Verdict
from ktrain.run.notes import FileNotes, open_notes
from ktrain.run.states import Action, Adopt, Allocate, Close, Finish, Machine, Say, State
from ktrain.run.watch import SupervisorReport, View
from ktrain.run.wire import WireKeeper

_LOG = logging.getLogger(__name__)
_TICK_S = 0.1


class Roster:
    """What supervisors and the launcher said about processes. Safe from any thread."""

    def __init__(self, clock: Clock, *, told: Iterable[str] = ()) -> None:
        """`told` are nodes that an earlier head knew to be told to end."""
        self._clock = clock
        self._lock = threading.Lock()  # guards everything below
        self._reports: dict[str, tuple[SupervisorReport, float]] = {}
        self._dead_pids: dict[str, set[int]] = {}
        self._agents_gone_s: dict[str, float] = {}
        self._lost: set[str] = set()
        self._told = set(told)

    def take(self, said: Mapping[str, Any]) -> bool:
        """A supervisor's report; false for one of a process that is known to be gone, which does not count."""
        node, host = said["node"], said["host"]
        report = SupervisorReport(
            node=node,
            host=host,
            pid=said["pid"],
            epoch=said["epoch"],
            state=said["state"],
            ranks=tuple(said["ranks"]),
            pids=tuple(said["pids"]),
            exits=tuple(Exit.from_json(item, node=node, host=host) for item in said["exits"]),
            store=said["store"],
        )
        with self._lock:
            if report.pid in self._dead_pids.get(node, ()):
                return False
            self._reports[node] = (report, self._clock.monotonic())
            self._lost.discard(node)
            self._told.discard(node)
            return True

    def process_exited(self, node: str, role: str, pid: int, *, told: bool = False) -> bool:
        """A process was seen to end; role "node" is all of a node's processes and its volume.

        `pid` is that of the supervisor also where a node ended, negative where it had none; 0 is whichever is known.
        `told` says that its pod was told to end from outside. False for the late word of a pod whose place another has
        taken, which changes nothing of that one.
        """
        with self._lock:
            known, dead = self._reports.get(node), self._dead_pids.setdefault(node, set())
            is_late = pid != 0 and known is not None and known[0].pid != pid
            if role == "supervisor":
                is_late = is_late or pid in dead
                dead.add(pid)
            if is_late and role in ("supervisor", "node"):
                return False
            if told:
                self._told.add(node)
            elif role == "node":
                self._told.discard(node)  # it was made anew, or died
            if role in ("agent", "node"):
                self._agents_gone_s[node] = self._clock.monotonic()
            if role in ("supervisor", "node"):
                self._reports.pop(node, None)
            if role == "node":
                self._lost.add(node)
                if known is not None:
                    dead.add(known[0].pid)
            return True

    def supervisors(self) -> dict[str, SupervisorReport]:
        now = self._clock.monotonic()
        with self._lock:
            return {node: replace(report, silent_s=now - heard) for node, (report, heard) in self._reports.items()}

    def living_agents(self, heard: Mapping[str, float]) -> dict[str, float]:
        """Node -> silence of its agent, without agents that were seen to die since they were last heard of."""
        now = self._clock.monotonic()
        with self._lock:
            return {
                node: silent_s
                for node, silent_s in heard.items()
                if node not in self._agents_gone_s or now - silent_s > self._agents_gone_s[node]
            }

    def worker_pids(self, epoch: int) -> dict[str, int]:
        """Rank -> process, for a fault plan."""
        return {
            str(rank): pid
            for report in self.supervisors().values()
            if report.epoch == epoch and report.state == "running"
            for rank, pid in zip(report.ranks, report.pids, strict=True)
        }

    def lost(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._lost)

    def told(self) -> frozenset[str]:
        with self._lock:
            return frozenset(self._told)


class Head:
    """One job's head. `run` belongs to the main thread; handlers come in on others."""

    def __init__(self, spec: LaunchSpec, work: WorkDir, *, clock: Clock = SYSTEM_CLOCK) -> None:
        self._spec = spec
        self._work = work
        self._clock = clock
        self._timeouts = Timeouts(spec.patience_s)
        self._lock = threading.Lock()  # guards the machine and what is derived from it
        self._save_lock = threading.Lock()  # one note at a time, the newest last
        self._wake = threading.Event()
        self._allocation: Deadline | None = None
        self._leaving = False
        self._catalog = RunCatalog.open(spec.run, timeouts=self._timeouts, clock=clock)
        with ExitStack() as undo:  # a store that fails in between must not leave us holding the run
            undo.callback(self._catalog.tier.close)
            holder = Holder(self._catalog.tier, local_path=local_path(spec.run), timeouts=self._timeouts, clock=clock)
            undo.callback(holder.close)
            self._notes = open_notes(spec, work, self._catalog.tier, timeouts=self._timeouts, clock=clock)
            self._saved = self._notes.read()
            self._stop: str | None = self._saved.get("stop")
            self._told: frozenset[str] = frozenset(self._saved.get("told", ()))  # as it was noted last
            self._roster = Roster(clock, told=self._told)
            self._fired = _read_fired(spec, self._timeouts, clock)
            self._events = log.open_log(spec.run, self._catalog.tier, timeouts=self._timeouts, clock=clock)
            undo.callback(self._events.close)
            intake = Intake(self._events, _read_numbers(spec.run, self._catalog.tier, self._timeouts, clock))
            self._coordinator = Coordinator(self._catalog, timeouts=self._timeouts, intake=intake, clock=clock)
            self._machine = self._make_machine()
            self._held = undo.pop_all()
        self._server = Server(self._handlers(), address=spec.head_address, token=work.read_token())
        self._wire = self._make_wire()

    # Start

    def _save(self) -> None:
        with self._save_lock:
            with self._lock:
                budgets, stop, told = self._machine.budgets.to_json(), self._stop, sorted(self._told)
            heads = self._saved.get("heads", 0) + 1
            self._notes.write({"heads": heads, "budgets": budgets, "stop": stop, "told": told})

    def _make_machine(self) -> Machine:
        attempts = self._catalog.attempts()
        last = attempts[-1] if attempts else None
        if last is not None:
            # Agents still speak of the last epoch: the coordinator must know it to understand them.
            self._coordinator.adopt_attempt(last.epoch, {})
            self._coordinator.end_attempt()
        budgets = Budgets(self._spec.max_restarts)
        if "budgets" in self._saved:
            budgets = Budgets.from_json(self._saved["budgets"], max_restarts=self._spec.max_restarts)
        unended = last.epoch if last is not None and last.end is None else None
        return Machine(self._spec, self._timeouts, budgets=budgets, unended_epoch=unended)

    def _make_wire(self) -> WireKeeper | None:
        if self._spec.nodes == 1:
            return None  # there is no peer
        number = self._saved.get("heads", 0) + 1
        return WireKeeper(
            self._work,
            set_wire=self._coordinator.set_wire,
            emit=self._emit_now,
            timeouts=self._timeouts,
            host="127.0.0.1" if self._spec.pod is None else self._spec.pod.address,
            head_number=number,
            clock=self._clock,
        )

    # The control channel

    def _handlers(self) -> dict[str, Handler]:
        return {
            **self._coordinator.handlers(),
            "supervise": self._supervise,
            "process_exited": self._process_exited,
            "stop": self._request_stop,
            "fault": self._fault,
            "status": self._status,
        }

    def _supervise(self, said: dict[str, Any]) -> dict[str, Any]:
        if not self._roster.take(said):
            return {"epoch": said["epoch"], "action": "stop"}  # its pod was replaced while it still ran
        self._wake.set()
        with self._lock:
            return self._machine.desired(said["node"])

    def _process_exited(self, said: dict[str, Any]) -> dict[str, Any]:
        for item in said["processes"]:
            node, role = item["node"], item["role"]
            with self._lock:  # the pod of a suspect is told to end because its trainer left: by us, not from outside
                told = item.get("told", False) and not self._machine.is_suspect(node)
            if self._roster.process_exited(node, role, item["pid"], told=told) and role == "node":
                self._coordinator.forget_node(node)
        self._wake.set()
        return {}

    def _request_stop(self, said: dict[str, Any]) -> dict[str, Any]:
        with self._lock:
            first, self._stop = self._stop is None, self._stop or str(said["reason"])
        if first:
            self._save()
        self._coordinator.request_stop(self._stop)
        self._wake.set()
        return self._status({})

    def _fault(self, said: dict[str, Any]) -> dict[str, Any]:
        """Records that a fault is about to be injected; refuses one that this run has had."""
        spec, wanted = str(said["spec"]), int(said["count"])
        with self._lock:
            if self._fired[spec] >= wanted:
                return {"fire": False}
            self._fired[spec] += 1
        self._emit_now(events.make("fault_injected", spec=spec, step=said["step"], clock=self._clock))
        self._events.flush()  # a head that dies of this very fault must not be asked again by the next one
        return {"fire": True}

    def _status(self, said: dict[str, Any]) -> dict[str, Any]:
        del said
        progress = self._coordinator.progress()
        with self._lock:
            machine = self._machine
            return {
                "run": self._spec.run,
                "run_id": self._catalog.run_id,
                "state": machine.state.value,
                "epoch": machine.epoch,
                "step": max((item.step for item in progress.values()), default=0),
                "ranks": _rank_states(progress),
                "pids": self._roster.worker_pids(self._machine.epoch),
                "committed": {tier: list(pair) for tier, pair in self._coordinator.committed().items()},
                "fired": dict(self._fired),
                "stop": self._stop,
                "spent": dict(machine.budgets.spent),
            }

    # The loop

    def run(self) -> int:
        """Serves until the job has its verdict; returns the exit code."""
        self._save()
        me = {**asdict(ProcessId.current()), "host": ids.host_name()}
        atomic.write_json(self._work.head, {**me, "address": self._server.address})
        if not self._saved:
            about: dict[str, Any] = {
                "nodes": self._spec.nodes,
                "world_size": self._spec.world_size,
                "script": self._spec.script,
            }
            self._emit_now(events.make("run_started", clock=self._clock, version=ktrain.__version__, **about))
        if self._stop is not None:
            self._coordinator.request_stop(self._stop)
        self._coordinator.start()
        if self._wire is not None:
            self._wire.start()
        verdict: Verdict | None = None
        while verdict is None:
            if self._leaving:
                return self._leave()
            self._clock.wait(self._wake, _TICK_S)
            self._wake.clear()
            verdict = self._advance()
        return self._end(verdict)

    def _advance(self) -> Verdict | None:
        view = self._view()
        if view.told != self._told:
            self._told = view.told
            self._save()  # the head may be told next, and its successor is to know why nobody is there
        with self._lock:
            actions = self._machine.tick(view)
        for action in actions:
            if isinstance(action, Finish):
                return action.verdict
            refusal = self._carry_out(action)
            if refusal is not None:
                return refusal
        return None

    def _view(self) -> View:
        progress = self._coordinator.progress()
        committed = self._coordinator.committed()
        return View(
            now_s=self._clock.monotonic(),
            supervisors=self._roster.supervisors(),
            agents=self._roster.living_agents(self._coordinator.nodes()),
            lost=self._roster.lost(),
            told=self._roster.told(),
            progress=progress,
            holdings=self._coordinator.holdings(),
            committed=max((step for step, _ in committed.values()), default=0) if progress else None,
            stop=self._stop,
            trial=self._coordinator.trial,
        )

    def _carry_out(self, action: Action) -> Verdict | None:
        if isinstance(action, Say):
            self._events.emit(events.make(action.kind, action.attempt, clock=self._clock, **action.fields))
        elif isinstance(action, Allocate):
            return self._begin(action.assignment)
        elif isinstance(action, Adopt):
            self._coordinator.adopt_attempt(action.epoch, action.assignment)
        elif isinstance(action, Close):
            self._close_attempt(action)
        return None

    def _begin(self, assignment: Mapping[str, Sequence[int]]) -> Verdict | None:
        """Allocates an epoch; a store that cannot be asked is tried again until the patience is over."""
        start = {
            "host": ids.host_name(),
            "pid": os.getpid(),
            "launch": self._spec.launch_id,
            "world_size": self._spec.world_size,
            "nodes": {node: list(ranks) for node, ranks in assignment.items()},
        }
        self._allocation = self._allocation or Deadline.after(self._timeouts.start_s, self._clock)
        try:
            epoch = self._catalog.next_epoch(start)
        except KtrainError as error:
            if not self._allocation.expired():
                _LOG.warning("epoch not allocated, trying again: %s", error)
                return None
            said = f"no epoch could be allocated within {self._allocation.total_s:g} s: {error}"
            return Verdict("failed", contract.EXIT_UNAVAILABLE, said)
        self._allocation = None
        self._coordinator.begin_attempt(epoch, assignment)
        with self._lock:
            self._machine.begin(epoch, assignment, self._clock.monotonic())
        nodes = {node: list(ranks) for node, ranks in assignment.items()}
        self._events.emit(
            events.make("attempt_started", epoch, clock=self._clock, world_size=self._spec.world_size, nodes=nodes)
        )
        return None

    def _close_attempt(self, action: Close) -> None:
        self._coordinator.end_attempt()
        self._save()  # the failure is on the books before the next attempt begins
        fields: dict[str, Any] = asdict(action)
        del fields["epoch"]
        self._events.emit(events.make("attempt_ended", action.epoch, clock=self._clock, **fields))
        try:
            self._catalog.record(action.epoch, "end", fields)
        except KtrainError as error:
            self._emit_now(
                events.make("notice", clock=self._clock, message=f"the attempt's end is not recorded: {error}")
            )

    def _emit_now(self, event: Event) -> None:
        """Emits an event of the present attempt, also before the machine exists."""
        machine = getattr(self, "_machine", None)
        epoch = machine.epoch if machine is not None else 0
        self._events.emit(Event(event.kind, event.fields, event.time, event.attempt or epoch))

    # End

    def leave(self) -> None:
        """Ends `run` without a verdict; the next head of the launch goes on. Safe in a signal handler."""
        self._leaving = True

    def _leave(self) -> int:
        self._server.close()  # nobody is answered by a head that has let go of the run
        self._let_go()
        return contract.EXIT_ENDED

    def _let_go(self) -> None:
        if self._wire is not None:
            _close("the wire", self._wire.close)
        _close("the coordinator", self._coordinator.close)
        _close("the run", self._held.close)  # the log's last words first, the store last

    def _end(self, verdict: Verdict) -> int:
        with self._lock:
            self._machine.state = State.ENDED  # supervisors are told to leave from here on
        if verdict.outcome == "succeeded":
            self._free_volumes()
        step = max((pair[0] for pair in self._coordinator.committed().values()), default=None)
        fields: dict[str, Any] = {
            "outcome": verdict.outcome,
            "exit_code": verdict.exit_code,
            "reason": verdict.reason,
            "step": step,
        }
        self._emit_now(events.make("run_ended", clock=self._clock, **fields))
        self._let_go()
        atomic.write_json(self._work.verdict, {"launch_id": self._spec.launch_id, **fields})
        _close("the control channel", self._server.close)
        return verdict.exit_code

    def _free_volumes(self) -> None:
        """After success nothing in memory is needed any more; a node that does not answer is left to its launcher."""
        deadline = Deadline.after(self._timeouts.free_s, self._clock)
        self._coordinator.free_volumes()
        nodes = self._machine.assignment.keys()
        while not _are_freed(self._coordinator, nodes, lost=self._roster.lost(), within_s=deadline.total_s):
            if deadline.expired():
                said = f"not every node freed its volume within {deadline.total_s:g} s; see `ktrain ckpt ls --volume`"
                self._emit_now(events.make("notice", clock=self._clock, message=said))
                return
            self._clock.sleep(_TICK_S / 2)


def _are_freed(coordinator: Coordinator, nodes: Set[str], *, lost: Set[str], within_s: float) -> bool:
    """Whether these nodes freed their volumes; the memory of lost ones went with their pods.

    A new head has heard of nobody yet: silence is not a freed volume.
    """
    heard = {node for node, silent_s in coordinator.nodes().items() if silent_s <= within_s}
    return coordinator.volumes_freed() and heard >= nodes - lost


def _rank_states(progress: Mapping[int, RankProgress]) -> dict[str, Any]:
    return {
        str(rank): {"node": item.node, "step": item.step, "phase": item.phase, "silent_s": round(item.silent_s, 3)}
        for rank, item in sorted(progress.items())
    }


def _close(what: str, close: Callable[[], None]) -> None:
    """Closes what the head has open. The verdict stands by then: what fails here may not take it from the job."""
    try:
        close()
    except Exception:  # noqa: BLE001 -- recorded; the process ends, and with it all that is left open
        _LOG.exception("%s could not be closed", what)


def _read_fired(spec: LaunchSpec, timeouts: Timeouts, clock: Clock) -> Counter[str]:
    """Faults that were injected, each of which fires once; the whole log is read where there is a plan of them."""
    if not spec.faults:
        return Counter()
    with closing(log.LogReader(spec.run, timeouts=timeouts, clock=clock)) as reader:
        return Counter(event.fields["spec"] for event in reader.read_new() if event.kind == "fault_injected")


def _read_numbers(run: str, tier: Tier, timeouts: Timeouts, clock: Clock) -> dict[str, int]:
    """Which events are not to be logged again. Those that keepers may say again were logged last: the end is read."""
    found: dict[str, int] = {}
    for block in log.read_backwards(run, tier, timeouts=timeouts, clock=clock):
        found |= {stream: max(count, found.get(stream, 0)) for stream, count in newest_numbers(block).items()}
    return found


def open_head(
    spec: LaunchSpec, work: WorkDir, *, make: Callable[[LaunchSpec, WorkDir], Head] = Head, clock: Clock = SYSTEM_CLOCK
) -> Head:
    """A head for the job. One that replaces a dead one is patient with a store that is away: training goes on.

    Raises:
        KtrainError: the run cannot be used, or is held by somebody else.
    """
    timeouts = Timeouts(spec.patience_s)
    passing: tuple[type[KtrainError], ...] = (UnavailableError, DeadlineError)
    first = spec.pod is None and not FileNotes(work.head_state, spec.launch_id).read()
    if spec.pod is not None:
        passing = (*passing, ConflictError)  # a pod cannot know that it is the first, and a dead one's hold lasts
    deadline = Deadline.after(0.0 if first else timeouts.drain_s, clock)
    while True:
        try:
            return make(spec, work)
        except passing as error:
            if deadline.expired():
                raise
            _LOG.warning("the run cannot be opened, trying again: %s", error)
        clock.sleep(timeouts.beat_s)


def main(argv: list[str]) -> int:
    work = WorkDir(Path(argv[0]))
    worker.die_with_parent(int(argv[1]))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = work.read_spec()
    try:
        head = open_head(spec, work)
    except KtrainError as error:
        verdict = {"outcome": "failed", "exit_code": exit_code(error), "reason": str(error), "step": None}
        atomic.write_json(work.verdict, {"launch_id": spec.launch_id, **verdict})
        return exit_code(error)
    if spec.pod is not None:
        signal.signal(signal.SIGTERM, lambda signum, frame: head.leave())
        submissions.keep_own(work.path, spec.run, timeouts=Timeouts(spec.patience_s))
    return head.run()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

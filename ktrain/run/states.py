"""The head's state machine: what is known goes in with `tick`, what is to be done comes out as actions.

    JOINING -> STARTING -> RUNNING -> STOPPING -> JOINING ... -> ENDED
       |          ^
       +- adopt --+   (a new head finds the attempt of a dead one running)

Level-triggered: supervisors ask for the desired state again and again, so that nothing can be lost. No input, no
output, no clock of its own: time comes with the view.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from ktrain.base import contract
from ktrain.base.job import LaunchSpec
from ktrain.base.settings import Timeouts
from ktrain.run import failure as failures
from ktrain.run import seats, watch
from ktrain.run.failure import Budgets, Exit, Failure, Verdict
from ktrain.run.rendezvous import assign_ranks
from ktrain.run.watch import View


class State(StrEnum):
    JOINING = "joining"  # waiting for agents and supervisors of as many nodes as the job needs
    STARTING = "starting"  # an epoch is allocated, supervisors start its workers
    RUNNING = "running"
    STOPPING = "stopping"  # every supervisor ends its workers of the epoch
    ENDED = "ended"


@dataclass(frozen=True, slots=True)
class Allocate:
    """Allocate an epoch for this assignment, then call `begin`."""

    assignment: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Adopt:
    """Take over the attempt that is running already."""

    epoch: int
    assignment: Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Close:
    """The attempt is over: record it."""

    epoch: int
    outcome: str
    cause: str | None
    step: int | None
    reason: str
    committed_step: int | None = None
    own_fault: bool = False


@dataclass(frozen=True, slots=True)
class Say:
    """Emit an event."""

    kind: str
    attempt: int
    fields: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Finish:
    """The job is over."""

    verdict: Verdict


Action = Allocate | Adopt | Close | Say | Finish


class Machine:
    """One job's states. Use from one thread."""

    def __init__(
        self, spec: LaunchSpec, timeouts: Timeouts, *, budgets: Budgets, unended_epoch: int | None = None
    ) -> None:
        """`unended_epoch` is the run's last attempt, where no end of it is recorded: it may still be running."""
        self.state = State.JOINING
        self.epoch = unended_epoch or 0
        self.budgets = budgets
        self.assignment: dict[str, tuple[int, ...]] = {}
        self._spec = spec
        self._timeouts = timeouts
        self._unended = unended_epoch
        self._since_s: float | None = None  # when the present state began
        self._failure: Failure | None = None  # why the attempt is being stopped
        self._vanished: Failure | None = None  # nodes or supervisors that turned out to be gone meanwhile
        self._stop_said_s: float | None = None
        self._pids: dict[str, int] = {}  # supervisors of the running attempt
        self._agents = watch.AgentWatch()
        self._seats = seats.Seats(spec.node_names, spec.nodes, timeouts)
        self._store: str | None = None
        self._adopted = False
        self._last_step: int | None = None  # newest step of the attempt, also when its ranks are forgotten

    # What supervisors are told

    def desired(self, node: str) -> dict[str, Any]:
        """The state that a node's supervisor should bring about."""
        if self.state is State.ENDED:
            return {"epoch": self.epoch, "action": "exit"}
        if self.state in (State.STARTING, State.RUNNING) and node in self.assignment:
            ranks = self.assignment[node]
            first = next(name for name, block in self.assignment.items() if 0 in block)
            return {
                "epoch": self.epoch,
                "action": "run",
                "ranks": list(ranks),
                "group_rank": ranks[0] // self._spec.workers_per_node,
                "world_size": self._spec.world_size,
                "hosts_store": node == first,
                "store": self._store,
            }
        if self.state is State.JOINING and self._unended is not None:
            return {"epoch": self.epoch, "action": "wait"}  # nobody is stopped before it is known what runs
        if self._seats.is_suspect(node):
            return {"epoch": self.epoch, "action": "replace"}
        hang = self._failure is not None and self._failure.cause == contract.CAUSE_HANG
        return {"epoch": self.epoch, "action": "stop", "dump_stacks": hang}

    def is_suspect(self, node: str) -> bool:
        return self._seats.is_suspect(node)

    # What happens

    def tick(self, view: View) -> list[Action]:
        """Moves on as far as the view allows; call again with a newer view."""
        if self._since_s is None:
            self._since_s = view.now_s
        if self.state is State.RUNNING:
            self._step(view)
        self._store = watch.find_store(view, self.assignment, self.epoch)
        self._seats.look(view)
        if self.state is State.ENDED:
            return []
        steps = {
            State.JOINING: self._join,
            State.STARTING: self._start,
            State.RUNNING: self._watch,
            State.STOPPING: self._settle,
        }
        return steps[self.state](view)

    def begin(self, epoch: int, assignment: Mapping[str, Sequence[int]], now_s: float) -> None:
        """An epoch was allocated for the assignment."""
        self.epoch = epoch
        self.assignment = {node: tuple(ranks) for node, ranks in assignment.items()}
        self._failure = None
        self._pids = {}
        self._store = None  # the last attempt's store is not this one's
        self._unended = None
        self._adopted = False
        self._agents = watch.AgentWatch()
        self._last_step = None
        self._go(State.STARTING, now_s)

    def _go(self, state: State, now_s: float) -> None:
        self.state = state
        self._since_s = now_s

    def _in_state_s(self, view: View) -> float:
        assert self._since_s is not None
        return view.now_s - self._since_s

    # JOINING

    def _join(self, view: View) -> list[Action]:
        if view.stop is not None:
            return self._finish(view, Verdict("stopped", contract.EXIT_STOPPED, view.stop))
        running = None if self._unended is None else seats.carriers(view, self._unended, self._spec.world_size)
        if running is not None:
            return self._adopt(view, running)
        here, waited_s = self._seats.present(view), self._in_state_s(view)
        if len(here) < self._spec.nodes:
            return self._unjoined(view) if waited_s > self._spec.join_s else []
        unknown = self._unended is not None
        if self._seats.is_worth_waiting(view, last=self.assignment, all_nodes=unknown, waited_s=waited_s):
            return []
        actions: list[Action] = []
        if self._unended is not None:
            actions.append(self._close_unended())
        if seats.running_elsewhere(view, self._timeouts):
            return actions  # they are told to stop; the start waits for it
        chosen = assign_ranks(
            here, self._spec.workers_per_node, view.holdings, num_blocks=self._spec.nodes, last=self.assignment
        )
        return [*actions, Allocate(chosen)]

    def _unjoined(self, view: View) -> list[Action]:
        missing = watch.missing(view, self._seats.absent(view), self._timeouts)
        said = f"not joined within {self._spec.join_s:g} s: {', '.join(missing)}"
        code = self._spec.unjoined_exit(taken=self._seats.were_taken(view))
        return self._finish(view, Verdict("failed", code, said))

    def _adopt(self, view: View, running: Mapping[str, tuple[int, ...]]) -> list[Action]:
        self.assignment = dict(running)
        self._pids = {node: view.supervisors[node].pid for node in running}
        self._unended = None
        self._adopted = True
        self._go(State.RUNNING, view.now_s)
        self._store = watch.find_store(view, self.assignment, self.epoch)
        return [
            Adopt(self.epoch, dict(self.assignment)),
            Say("head_adopted", self.epoch, {"nodes": len(self.assignment)}),
        ]

    def _close_unended(self) -> Close:
        assert self._unended is not None
        epoch, self._unended = self._unended, None
        return Close(epoch, "failed", contract.CAUSE_ALL_LOST, None, "the launch that ran it ended without a word")

    # STARTING and RUNNING

    def _start(self, view: View) -> list[Action]:
        for node, report in view.supervisors.items():
            if report.epoch == self.epoch:
                self._pids.setdefault(node, report.pid)
        broken = self._broken(view)
        if broken is not None:
            return self._stop_attempt(view, broken)
        if view.stop is not None:
            return self._stop_attempt(view, None)
        waiting = [
            node
            for node in self.assignment
            if node not in view.supervisors
            or view.supervisors[node].epoch != self.epoch
            or view.supervisors[node].state == "idle"
        ]
        if not waiting:
            self._go(State.RUNNING, view.now_s)
            return self._watch(view)
        if self._in_state_s(view) > self._timeouts.start_s:
            said = f"workers not started within {self._timeouts.start_s:g} s"
            return self._stop_attempt(view, Failure(contract.CAUSE_CRASH, said, node=waiting[0], phase="starting"))
        return []

    def _watch(self, view: View) -> list[Action]:
        broken = self._broken(view)
        if broken is not None:
            return self._stop_attempt(view, broken)
        said = self._agents.tick(view, self.assignment, self._timeouts.lease_s)
        actions: list[Action] = [Say(kind, self.epoch, fields) for kind, fields in said]
        states = {view.supervisors[node].state for node in self.assignment if node in view.supervisors}
        if states == {"succeeded"}:
            return [
                *actions,
                self._closing(view, "succeeded", None),
                *self._finish(view, Verdict("succeeded", contract.EXIT_OK, "done")),
            ]
        if states <= {"succeeded", "stopped"}:
            return actions + self._stopped(view)
        if view.stop is not None:
            return actions + self._await_stop(view)
        return actions + self._watch_steps(view)

    def _broken(self, view: View) -> Failure | None:
        """The first sign that the attempt cannot go on; its cause is settled once every worker has ended."""
        vanished = self._find_vanished(view)
        if vanished is not None:
            return vanished
        for node in self.assignment:
            report = view.supervisors.get(node)
            if report is not None and report.epoch == self.epoch and report.state == "failed":
                said, step = "a worker failed", self._step(view)
                return Failure(contract.CAUSE_CRASH, said, node=node, host=report.host, step=step)
        return None

    def _find_vanished(self, view: View) -> Failure | None:
        return watch.find_vanished(view, self.assignment, self._pids, self._timeouts, self._step(view))

    def _watch_steps(self, view: View) -> list[Action]:
        found = watch.find_late(view, self.assignment, self._timeouts, self._in_state_s(view))
        if found is None:
            return []
        failure = watch.hang(found, self.assignment, view)
        fields = {**failure.fields(), "silent_s": round(found[1].silent_s, 3)}
        return [Say("hang", self.epoch, fields), *self._stop_attempt(view, failure)]

    def _step(self, view: View) -> int | None:
        newest = max((item.step for item in view.progress.values()), default=None)
        if newest is not None and (self._last_step is None or newest > self._last_step):
            self._last_step = newest
        return self._last_step

    # Stopping on request

    def _await_stop(self, view: View) -> list[Action]:
        if self._stop_said_s is None:
            self._stop_said_s = view.now_s
        if not view.progress and not (self._adopted and self._in_state_s(view) < self._timeouts.lease_s):
            return self._stop_attempt(view, None)  # nobody there who could save
        if view.now_s - self._stop_said_s <= self._timeouts.stop_s or not view.progress:
            return []
        rank, item = min(view.progress.items(), key=lambda pair: (pair[1].closed, pair[1].step, pair[0]))
        said = f"asked to stop, not stopped within {self._timeouts.stop_s:g} s"
        node = watch.home_of(rank, self.assignment)
        failure = Failure(contract.CAUSE_HANG, said, rank=rank, node=node, phase=item.phase, step=item.step)
        return self._stop_attempt(view, failure)

    def _stopped(self, view: View) -> list[Action]:
        reason = view.stop or "the script asked for it"
        verdict = Verdict("stopped", contract.EXIT_STOPPED, reason)
        return [self._closing(view, "stopped", contract.CAUSE_STOPPED, reason), *self._finish(view, verdict)]

    # STOPPING

    def _stop_attempt(self, view: View, failure: Failure | None) -> list[Action]:
        self._failure = failure
        self._vanished = None
        self._go(State.STOPPING, view.now_s)
        if failure is not None and failure.cause in (contract.CAUSE_NODE_LOST, contract.CAUSE_ALL_LOST):
            return [
                Say("node_lost", self.epoch, {"node": node})
                for node in self.assignment
                if watch.is_lost(node, view, self._timeouts)
            ]
        return []

    def _settle(self, view: View) -> list[Action]:
        self._vanished = self._find_vanished(view) or self._vanished
        here = [report for report in view.supervisors.values() if report.epoch == self.epoch]
        running = [
            report.node
            for report in here
            if report.state == "running" and not watch.is_lost(report.node, view, self._timeouts)
        ]
        if running and self._in_state_s(view) <= self._timeouts.stop_s:
            return []
        exits = [item for report in here for item in report.exits]
        said: list[Action] = [Say("worker_exit", self.epoch, _exit_fields(item)) for item in exits if item.failed]
        if self._failure is None:
            return said + self._stopped(view)
        failure = failures.settle(self._failure, self._vanished, exits, view.progress)
        self._failure = failure
        said.append(Say("failure", self.epoch, failure.fields()))
        closing = self._closing(view, "failed", failure.cause, failure.describe())
        said.append(replace(closing, own_fault=failure.own_fault and view.stop is None))
        if view.stop is not None:
            verdict = Verdict("failed", contract.EXIT_FAILED, f"failed while stopping: {failure.describe()}")
            return said + self._finish(view, verdict)
        decision = failures.decide(self.budgets, failure, committed=view.committed, trial=view.trial)
        self.budgets = decision.budgets
        if decision.verdict is not None:
            tail = f"\n{failure.log_tail}" if failure.log_tail else ""
            return said + self._finish(view, replace(decision.verdict, reason=decision.verdict.reason + tail))
        if decision.suspect is not None and (self._spec.nodes > 1 or failures.names_broken_device(failure)):
            said += self._suspect(view, decision.suspect)  # one that has no other beside it is compared with nobody
        self._go(State.JOINING, view.now_s)
        return said

    def _suspect(self, view: View, node: str) -> list[Action]:
        """Where nodes are pods, one that fails again and again is given back; a machine of one's own is kept."""
        report = view.supervisors.get(node)
        if self._spec.pod is None or report is None:
            return []
        self._seats.suspect(node, report.pid)
        said = f"{node} on {report.host} is suspected: its pod is given back (exit code {contract.EXIT_BAD_NODE})"
        return [Say("notice", self.epoch, {"message": said})]

    # ENDED

    def _closing(self, view: View, outcome: str, cause: str | None, reason: str = "") -> Close:
        return Close(self.epoch, outcome, cause, self._step(view), reason, view.committed)

    def _finish(self, view: View, verdict: Verdict) -> list[Action]:
        actions: list[Action] = [self._close_unended()] if self._unended is not None else []
        self._go(State.ENDED, view.now_s)
        return [*actions, Finish(verdict)]


def _exit_fields(item: Exit) -> dict[str, Any]:
    return {
        "rank": item.rank,
        "node": item.node,
        "exitcode": item.exitcode,
        "signal": item.signal_name,
        "reason": item.reason,
    }

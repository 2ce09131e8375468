"""What the head sees of an attempt, and the signs in it that something is lost or late. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ktrain.base import contract
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.quarantine import Trial
from ktrain.checkpoint.roster import RankProgress
from ktrain.run import failure as failures
from ktrain.run.failure import Exit, Failure

Assignment = Mapping[str, Sequence[int]]


@dataclass(frozen=True, slots=True)
class SupervisorReport:
    """What a node's supervisor said last."""

    node: str
    host: str
    pid: int
    epoch: int
    state: str  # idle, running, succeeded, failed, stopped
    ranks: tuple[int, ...] = ()
    pids: tuple[int, ...] = ()  # of its workers, in the order of `ranks`
    exits: tuple[Exit, ...] = ()
    store: str | None = None
    silent_s: float = 0.0


@dataclass(frozen=True, slots=True)
class View:
    """Everything the machine decides from, at one moment."""

    now_s: float
    supervisors: Mapping[str, SupervisorReport]  # a supervisor known to be dead is not in it
    agents: Mapping[str, float]  # node -> seconds since its agent was heard of; known dead: not in it
    lost: frozenset[str] = frozenset()  # nodes that somebody saw die, until they are heard of again
    told: frozenset[str] = frozenset()  # nodes whose pods were told to end, until they are heard of again
    progress: Mapping[int, RankProgress] = field(default_factory=dict)  # ranks that use a Checkpointer
    holdings: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    committed: int | None = None  # newest committed step; None where nothing commits
    stop: str | None = None  # reason of a request to stop
    trial: Trial | None = None  # of the step that the attempt continued from


def missing(view: View, nodes: Sequence[str], timeouts: Timeouts) -> list[str]:
    """Agents and supervisors that are not there, in words."""
    late = []
    for node in nodes:
        report = view.supervisors.get(node)
        if report is None or report.silent_s > timeouts.lease_s:
            late.append(f"supervisor of {node}")
        if view.agents.get(node, timeouts.lease_s + 1) > timeouts.lease_s:
            late.append(f"agent of {node}")
    return late


def is_lost(node: str, view: View, timeouts: Timeouts) -> bool:
    """True when a node's agent and supervisor are both gone."""
    if node in view.lost:
        return True
    report = view.supervisors.get(node)
    if report is None:
        return False  # seen to die alone: the launcher starts it again
    lease_s = timeouts.lease_s
    agent_silent_s = view.agents.get(node, report.silent_s)
    return report.silent_s > lease_s and (agent_silent_s > lease_s or report.silent_s > 3 * lease_s)


def find_vanished(
    view: View, assignment: Assignment, pids: Mapping[str, int], timeouts: Timeouts, step: int | None
) -> Failure | None:
    """Nodes or supervisors that are gone, as a failure; `pids` are the supervisors that the attempt began with."""
    lost = [node for node in assignment if is_lost(node, view, timeouts)]
    if lost:
        names, taken = ", ".join(lost), all(node in view.told for node in lost)
        how = "; told to end from outside, as by a preemption or a drain of the machine" if taken else ""
        if len(lost) == len(assignment):
            said = f"all nodes are gone: {names}{how}"
            return Failure(contract.CAUSE_ALL_LOST, said, step=step, disruption=taken)
        said = f"the processes of {names} are gone{how}"
        return Failure(contract.CAUSE_NODE_LOST, said, node=lost[0], step=step, disruption=taken)
    for node in assignment:
        report = view.supervisors.get(node)
        pid = pids.get(node)
        if pid is not None and (report is None or report.pid != pid):
            if node in view.told:
                said = f"{node} was told to end from outside, as by a preemption or a drain of the machine"
                return Failure(contract.CAUSE_NODE_LOST, said, node=node, step=step, disruption=True)
            return Failure(contract.CAUSE_CRASH, f"the supervisor of {node} died", node=node, step=step)
    return None


def home_of(rank: int, assignment: Assignment) -> str:
    """The node that runs a rank."""
    return next(node for node, ranks in assignment.items() if rank in ranks)


def find_store(view: View, assignment: Assignment, epoch: int) -> str | None:
    """Address of the attempt's rendezvous store, which the node of rank 0 hosts; None before it says so."""
    for node, ranks in assignment.items():
        report = view.supervisors.get(node)
        if 0 in ranks and report is not None and report.epoch == epoch:
            return report.store
    return None


def hang(found: tuple[int, RankProgress, str], assignment: Assignment, view: View) -> Failure:
    """The late rank of `find_late` as a failure."""
    rank, item, said = found
    node = home_of(rank, assignment)
    report = view.supervisors.get(node)
    return Failure(
        contract.CAUSE_HANG,
        said,
        rank=rank,
        node=node,
        host=report.host if report else None,
        phase=item.phase,
        step=item.step,
        own_fault=item.phase != "close",
    )


def find_late(
    view: View, assignment: Assignment, timeouts: Timeouts, running_s: float
) -> tuple[int, RankProgress, str] | None:
    """The rank that is late, what is known of it, and how late it is in words."""
    if not view.progress:
        return None  # a script without a Checkpointer: nothing is known of its steps
    homes = {rank: node for node, ranks in assignment.items() for rank in ranks}
    unheard = sorted(set(homes) - set(view.progress))
    if unheard and running_s > timeouts.start_s:
        said = f"not heard of within {timeouts.start_s:g} s of the start"
        return unheard[0], RankProgress(homes[unheard[0]], "", 0, "start", running_s, running_s, closed=False), said
    found = failures.find_hang(view.progress, timeouts)
    if found is None:
        return None
    rank, item = found
    silent = item.silent_s > timeouts.lease_s
    how = "its process is silent, stopped or stuck" if silent else "its process is alive"
    return rank, item, f"no step for {item.step_silent_s:.1f} s; {how}"


class AgentWatch:
    """Says once that a node's agent is gone, and once that it is back. Training goes on meanwhile."""

    def __init__(self) -> None:
        self._gone: set[str] = set()

    def tick(self, view: View, assignment: Assignment, lease_s: float) -> list[tuple[str, dict[str, Any]]]:
        """What is new, as kinds and fields of events."""
        said: list[tuple[str, dict[str, Any]]] = []
        for node in assignment:
            silent_s = view.agents.get(node)
            if silent_s is None or silent_s > lease_s:
                if node not in self._gone:
                    self._gone.add(node)
                    said.append(("agent_lost", {"node": node, "silent_s": silent_s}))
            elif node in self._gone:
                self._gone.discard(node)
                said.append(("node_joined", {"node": node, "what": "agent"}))
        return said

"""Builders for the head's state machine: a job, its nodes, what they say."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from ktrain.base.job import LaunchSpec, PodPlace
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.roster import RankProgress
from ktrain.run.failure import Budgets, Exit
from ktrain.run.states import Action, Allocate, Machine
from ktrain.run.watch import SupervisorReport, View

TIMEOUTS = Timeouts(patience_s=30.0)


def job(nodes: int = 2, workers_per_node: int = 2, max_restarts: int = 3) -> LaunchSpec:
    return LaunchSpec(
        launch_id="launch",
        run="/runs/a",
        script="/train.py",
        args=(),
        nodes=nodes,
        workers_per_node=workers_per_node,
        max_restarts=max_restarts,
        patience_s=TIMEOUTS.patience_s,
        python="python",
        cwd="/",
        volume_root="/volume",
        log_dir="/runs/a/logs",
    )


def in_pod(join_s: float = 600.0) -> LaunchSpec:
    """The same job, as a pod sees it."""
    place = PodPlace(host="h", address="10.0.0.2", head_port=7410, join_s=join_s, ready_file="/work/ready")
    return replace(job(), pod=place)


def rank(step: int = 0, phase: str = "train", **changes: Any) -> RankProgress:
    fields = {"node": "node-0", "host": "h", "silent_s": 0.0, "step_silent_s": 0.0, "closed": False, **changes}
    return RankProgress(step=step, phase=phase, **fields)


def ended(rank: int, exitcode: int = 1, **changes: Any) -> Exit:
    kind = "signal" if exitcode < 0 else "exception"
    fields = {"pid": 100 + rank, "reason": "RuntimeError: boom", "kind": kind, "node": "node-0", "host": "h", **changes}
    return Exit(rank=rank, exitcode=exitcode, **fields)


@dataclass
class World:
    """A machine with obedient nodes around it; tests disturb them."""

    spec: LaunchSpec = field(default_factory=job)
    unended_epoch: int | None = None
    now_s: float = 0.0
    next_epoch: int = 1
    reports: dict[str, SupervisorReport] = field(default_factory=dict)
    view: View = field(default_factory=lambda: View(0.0, {}, {}))
    actions: list[Action] = field(default_factory=list)

    def __post_init__(self) -> None:
        budgets = Budgets(self.spec.max_restarts)
        self.machine = Machine(self.spec, TIMEOUTS, budgets=budgets, unended_epoch=self.unended_epoch)

    def join_all(self) -> World:
        for index, node in enumerate(self.spec.node_names):
            self.report(node, pid=10 + index)
        return self

    def report(self, node: str, **changes: Any) -> None:
        known = self.reports.get(node, SupervisorReport(node, "h", 10, 0, "idle"))
        self.reports[node] = replace(known, **changes)

    def obey(self) -> None:
        """Every supervisor does what it is told."""
        for node, known in list(self.reports.items()):
            told = self.machine.desired(node)
            if told["action"] == "run" and known.epoch < told["epoch"]:
                store = "127.0.0.2:1" if told["hosts_store"] else None
                self.report(node, epoch=told["epoch"], state="running", ranks=tuple(told["ranks"]), store=store)
            elif told["action"] == "stop" and known.state == "running":
                self.report(node, state="stopped")

    def tick(self, seconds: float = 0.1, **changes: Any) -> list[Action]:
        """Time goes on; the machine sees the world and its epochs are allocated. Returns what it wanted."""
        self.now_s += seconds
        agents = {node: 0.0 for node in self.reports}
        self.view = replace(self.view, agents=agents, **changes)
        view = replace(self.view, now_s=self.now_s, supervisors=dict(self.reports))
        wanted = self.machine.tick(view)
        for action in wanted:
            if isinstance(action, Allocate):
                self.machine.begin(self.next_epoch, action.assignment, self.now_s)
                self.next_epoch += 1
        self.actions += wanted
        return wanted

    def run(self) -> World:
        """Brings the job to RUNNING."""
        self.join_all()
        self.tick()
        self.obey()
        self.tick()
        return self

    def until_settled(self, **changes: Any) -> list[Action]:
        """Ticks and obeys a few times; returns everything that was wanted."""
        wanted = []
        for _ in range(4):
            wanted += self.tick(**changes)
            self.obey()
        return wanted

"""Which nodes carry an attempt where the job has more than it needs, and which of them are not to. Pure.

A spare is a node like any other that has no ranks at the moment: its agent and its supervisor are there and wait. It
holds no replicas. The node that it replaces, made anew, is the next spare.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from ktrain.base.settings import Timeouts
from ktrain.run import watch
from ktrain.run.watch import Assignment, View


@dataclass(slots=True)
class Seats:
    """The nodes of a job, and how many of them an attempt needs. Use from one thread."""

    nodes: tuple[str, ...]  # spares among them, last
    needed: int
    timeouts: Timeouts
    _suspects: dict[str, int] = field(default_factory=dict)  # node -> its supervisor when it was suspected

    def suspect(self, node: str, pid: int) -> None:
        """No attempt runs on the node before another supervisor speaks for it."""
        self._suspects[node] = pid

    def is_suspect(self, node: str) -> bool:
        return node in self._suspects

    def look(self, view: View) -> None:
        """Forgets suspicions of nodes that were made anew."""
        for node, pid in list(self._suspects.items()):
            report = view.supervisors.get(node)
            if report is not None and report.pid != pid:
                del self._suspects[node]

    def present(self, view: View) -> list[str]:
        """Nodes that an attempt can run on now, in their order."""
        return [
            node for node in self.nodes if node not in self._suspects and not watch.missing(view, [node], self.timeouts)
        ]

    def absent(self, view: View) -> list[str]:
        """The others."""
        here = self.present(view)
        return [node for node in self.nodes if node not in here]

    def is_worth_waiting(self, view: View, *, last: Assignment, all_nodes: bool, waited_s: float) -> bool:
        """True while a node is away that may be back at once and is better than a spare, for it has a volume.

        `last` is who ran the last attempt; `all_nodes` says that nobody knows who did. A node that is known to be lost
        is not waited for, a container that is started again is, for one lease.
        """
        if waited_s > self.timeouts.lease_s:
            return False
        wanted: Iterable[str] = self.nodes if all_nodes else (last or self.nodes[: self.needed])
        away = set(self.absent(view)) - self._suspects.keys()
        return any(
            node in away and node not in view.told and not watch.is_lost(node, view, self.timeouts) for node in wanted
        )

    def were_taken(self, view: View) -> bool:
        """True when every node that is away was told to end: nobody's fault, and nothing that a restart has to mend."""
        away = self.absent(view)
        return bool(away) and all(node in view.told for node in away)


def running_elsewhere(view: View, timeouts: Timeouts) -> bool:
    """True while workers of an older attempt run on a node that can still be told to end them."""
    return any(
        report.state == "running" and not watch.is_lost(node, view, timeouts)
        for node, report in view.supervisors.items()
    )


def carriers(view: View, epoch: int, world_size: int) -> Mapping[str, tuple[int, ...]] | None:
    """Who runs the attempt of this epoch, when all its ranks are there; None otherwise."""
    found = {
        node: report.ranks
        for node, report in view.supervisors.items()
        if report.epoch == epoch and report.state != "idle"
    }
    ranks = sorted(rank for block in found.values() for rank in block)
    return found if ranks == list(range(world_size)) else None

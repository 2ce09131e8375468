"""A whole cluster on this machine: a store, controllers and nodes, driven by one thread."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ktrain.base.clock import Deadline
from ktrain.errors import NotFoundError
from ktrain.launcher.cluster.certificates import RootCertificates
from ktrain.launcher.cluster.defaults import complete
from ktrain.launcher.cluster.job import JobController
from ktrain.launcher.cluster.jobset import JobSetController
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.cluster.names import Names
from ktrain.launcher.cluster.nodes import Nodes, Silence
from ktrain.launcher.cluster.pod_run import PodRun
from ktrain.launcher.cluster.pod_starter import Machine
from ktrain.launcher.cluster.queue import QueueController
from ktrain.launcher.cluster.resources import POD, Resource
from ktrain.launcher.cluster.scheduler import Scheduler
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store

_LOG = logging.getLogger(__name__)
_LOOK_AGAIN_S = 0.05  # at what `run_until` waits for: no event tells of it
_MOST_TURNS = 200  # without an end: two controllers undo one another's work


class Controller(Protocol):
    """Looks at all that is, does what is lacking, and says when it is due again though nothing happens."""

    def reconcile(self) -> float | None:
        """Returns a monotonic time, or None."""


@dataclass(frozen=True, slots=True)
class Pace:
    """The delays of a cluster's parts, at their defaults; a test makes them short."""

    job_back_off_s: float = 10.0
    silence: Silence = field(default_factory=Silence)


class LocalCluster:
    """Runs what its store holds. `step` and `run_until` are for one thread; the store is safe from any.

    A container dies with this process, and when the cluster is closed.
    """

    def __init__(
        self,
        nodes: Sequence[NodeSpec],
        machine: Machine,
        *,
        pace: Pace = Pace(),  # noqa: B008 - frozen
        store: Store | None = None,
    ) -> None:
        """`store` is one that others serve or fill as well; it must have the machine's clock."""
        self.store = Store(clock=machine.clock, admit=_complete) if store is None else store
        self._clock = machine.clock
        self._runtime = machine.runtime
        self.nodes = Nodes(nodes, self.store, machine, pace.silence)
        self._controllers: Sequence[Controller] = (
            QueueController(self.store, self._clock),
            JobSetController(self.store, self._clock),
            JobController(self.store, self._clock, back_off_s=pace.job_back_off_s),
            Scheduler(self.store),
            self.nodes,
            Names(self.store, machine.folders),
            RootCertificates(self.store),
        )
        self.store.on_change(machine.runtime.wake)

    def step(self) -> float | None:
        """Lets all controllers work until none has anything to do; returns the monotonic time of what comes next."""
        for _ in range(_MOST_TURNS):
            before = self.store.version
            dues = [controller.reconcile() for controller in self._controllers]
            if self.store.version == before:
                return min((due for due in dues if due is not None), default=None)
        _LOG.warning("cluster: still at work after %d turns", _MOST_TURNS)
        return self._clock.monotonic()

    def wait(self, due_s: float | None, timeout_s: float) -> None:
        """Waits until a container has news, the store changes, something is due, or the time is over."""
        left_s = timeout_s if due_s is None else min(timeout_s, due_s - self._clock.monotonic())
        self._runtime.wait(max(left_s, 0.0))

    def run_until(self, holds: Callable[[], bool], timeout_s: float, *, what: str = "cluster") -> None:
        """Drives the cluster until something holds, which may depend on files that containers write.

        Raises:
            DeadlineError: it does not hold in time.
        """
        deadline = Deadline.after(timeout_s, self._clock)
        while True:
            due_s = self.step()
            if holds():
                return
            deadline.check(what)
            self.wait(due_s, min(deadline.remaining_s(), _LOOK_AGAIN_S))

    def wake(self) -> None:
        """Ends a wait; safe from any thread."""
        self._runtime.wake()

    def run_of(self, namespace: str, pod: str) -> PodRun:
        """A pod that runs, with its containers.

        Raises:
            NotFoundError: there is no such pod, or it runs nowhere.
        """
        found = self.store.get(POD, namespace, pod)
        kubelet = self.nodes.kubelet_of(found)
        run = kubelet.run_of(found["metadata"]["uid"]) if kubelet is not None else None
        if run is None:
            raise NotFoundError(f"pod {pod}: it runs on no node of this cluster")
        return run

    def log(self, namespace: str, pod: str, container: str, *, previous: bool = False) -> Path:
        """The file of a container's log: of its present run, or of the one before. Safe from any thread.

        Raises:
            NotFoundError: there is no such pod, container or run.
        """
        found = self.run_of(namespace, pod).container(container)
        path = None if found is None else found.log(previous=previous)
        if path is None or not path.is_file():
            which = "previous terminated container" if previous else "container"
            raise NotFoundError(f"{which} {container!r} in pod {pod!r} not found")
        return path

    def close(self) -> None:
        """Kills all containers. The files stay, for who wants to look."""
        self.nodes.close()
        self._runtime.close()


def _complete(resource: Resource, old: Object | None, new: Object) -> None:
    """Fills in what an API server would."""
    if old is None:
        complete(resource, new)

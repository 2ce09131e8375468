"""The kubelet of one node of a local cluster: runs the pods that are bound to it, and tells their status."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from ktrain.base.clock import Deadline
from ktrain.errors import ConfigError, ConflictError, NotFoundError
from ktrain.launcher.cluster import pod_status, subset, volumes
from ktrain.launcher.cluster.pod_run import PodRun, Stage
from ktrain.launcher.cluster.pod_starter import HOST_IP, Host, Machine, PodStarter
from ktrain.launcher.cluster.resources import POD
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Preconditions, Store
from ktrain.launcher.cluster.times import timestamp

_LOG = logging.getLogger(__name__)
_KILL_S = 10.0  # for killed processes to vanish
ENDED_PHASES = ("Succeeded", "Failed")


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """A node as it is declared: what it has, its labels and taints."""

    name: str
    resources: Mapping[str, str] = field(default_factory=lambda: {"cpu": "8", "memory": "32Gi", "pods": "110"})
    labels: Mapping[str, str] = field(default_factory=dict)
    taints: tuple[Mapping[str, str], ...] = ()


class Kubelet:
    """Runs the pods of one node. Call from one thread; `reconcile` never waits."""

    def __init__(self, spec: NodeSpec, store: Store, machine: Machine) -> None:
        self.name = spec.name
        self._store = store
        self._machine = machine
        self._pods: dict[str, tuple[PodRun, str]] = {}  # by uid, with the pod's address
        self._host = Host(machine, ThreadPoolExecutor(4, thread_name_prefix=f"probe-{spec.name}"), spec.resources)

    def reconcile(self, pods: Mapping[str, Object]) -> float | None:
        """Brings what runs here in line with the pods of this node, by uid; returns when it is due again.

        The time is monotonic; None where only an event can bring anything new.
        """
        for uid, pod in pods.items():
            if uid not in self._pods and pod.get("status", {}).get("phase") not in ENDED_PHASES:
                self._admit(pod)
        dues = []
        for uid, (run, address) in list(self._pods.items()):
            if uid not in pods:
                self._forget(uid)
                continue
            self._follow(run, pods[uid], address)
            dues.append(run.due_s())
        return min((due for due in dues if due is not None), default=None)

    def run_of(self, uid: str) -> PodRun | None:
        """The pod of this uid, while it is here."""
        found = self._pods.get(uid)
        return None if found is None else found[0]

    def lose(self) -> None:
        """Kills everything that runs here and removes its files, without a word: the machine is gone.

        Raises:
            DeadlineError: a process does not end, which only one that is stuck in the kernel does.
        """
        deadline = Deadline.after(_KILL_S)
        while not all([run.reap() for run, _ in self._pods.values()]):
            deadline.check(f"loss of node {self.name}")
            self._machine.runtime.wait(deadline.remaining_s())
        for run, _ in self._pods.values():
            volumes.remove(run.places)
        self._pods.clear()
        shutil.rmtree(self._machine.folders.node(self.name), ignore_errors=True)
        self.close()

    def close(self) -> None:
        """Ends the threads of its probes; safe to call again."""
        self._host.network.shutdown(wait=False, cancel_futures=True)

    def _admit(self, pod: Object) -> None:
        try:
            subset.check_pod(pod)
        except ConfigError as error:
            refused = {"phase": "Failed", "reason": "NotHonoured", "message": str(error)}
            self._write(pod, {**pod.get("status", {}), **refused})
            return
        number, address = self._machine.addresses.take()
        places = self._machine.folders.places(self.name, number)
        starter = PodStarter(pod, address, self._store, self._host, places)
        run = PodRun(pod, starter, places, self._machine.clock, self._machine.delays)
        run.adopt_lost()
        self._pods[pod["metadata"]["uid"]] = run, address

    def _follow(self, run: PodRun, pod: Object, address: str) -> None:
        metadata = pod["metadata"]
        run.pod = pod
        if metadata.get("deletionTimestamp"):
            run.stop(metadata.get("deletionGracePeriodSeconds") or 0)
        before = None
        while before is not run.stage:  # a stage that begins may do its first things at once
            before = run.stage
            run.advance()
        old = pod.get("status", {})
        if old.get("phase") not in ENDED_PHASES:
            now = timestamp(self._machine.clock.wall())
            self._write(pod, pod_status.render(run, old, now=now, pod_ip=address, host_ip=HOST_IP))
            if run.stage is Stage.ENDED:
                volumes.tear_down(run.places)
        if run.stage is Stage.ENDED and metadata.get("deletionTimestamp"):
            self._confirm(metadata)

    def _write(self, pod: Object, status: Object) -> None:
        if status == pod.get("status"):
            return
        try:
            self._store.update(POD, {**pod, "status": status}, status=True)
        except (NotFoundError, ConflictError) as error:
            _LOG.debug("pod %s: its status is told at the next turn: %s", pod["metadata"]["name"], error)

    def _confirm(self, metadata: Object) -> None:
        """Tells the API server that nothing of a deleted pod runs any more."""
        same = Preconditions(uid=metadata["uid"])
        try:
            self._store.delete(POD, metadata["namespace"], metadata["name"], grace_s=0, preconditions=same)
        except (NotFoundError, ConflictError):
            pass  # it is gone, or its name was taken by another

    def _forget(self, uid: str) -> None:
        run, _ = self._pods[uid]
        if run.reap():
            volumes.remove(run.places)
            del self._pods[uid]


def base_environment(host: Mapping[str, str]) -> dict[str, str]:
    """What stands for an image's environment: this machine's with this Python first, and nothing of ktrain's."""
    kept = {name: value for name, value in host.items() if not name.startswith("KTRAIN_")}
    return {**kept, "PATH": f"{Path(sys.executable).parent}:{kept.get('PATH', '/usr/bin:/bin')}"}

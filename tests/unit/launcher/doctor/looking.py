"""A cluster for the doctor to look at, and the answers that it gives."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import Door, Reply, connect
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.doctor.finding import Finding, Outcome
from ktrain.launcher.doctor.looks import Looks
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_cluster import FakeCluster

H100 = {"nvidia.com/gpu.product": "NVIDIA-H100-80GB-HBM3"}


def add_node(cluster: FakeCluster, name: str, *, labels: Mapping[str, str] = {}, **allocatable: str) -> None:
    """A ready node of a recent kubelet."""
    amounts = {"cpu": "64", "memory": "512Gi", "pods": "110", **allocatable}
    status = {
        "allocatable": amounts,
        "conditions": [{"type": "Ready", "status": "True"}],
        "nodeInfo": {"kubeletVersion": "v1.36.1"},
    }
    about = {"name": name, "labels": {"kubernetes.io/hostname": name, **labels}}
    cluster.store.create(known.NODE, {"metadata": about, "status": status})


def add_gpu_nodes(cluster: FakeCluster, count: int, *, memory: str = "512Gi", free: str = "8") -> None:
    for at in range(count):
        add_node(cluster, f"gpu-{at}", labels=H100, memory=memory, **{"nvidia.com/gpu": free})


def add_jobset(cluster: FakeCluster, *, status: Mapping[str, Any] = {}) -> None:
    body = {"metadata": {"name": "other", "namespace": "default"}, "spec": {}, "status": dict(status)}
    cluster.store.create(known.JOB_SET, body)


def looks_of(cluster: FakeCluster, folder: Path, user: str = "admin", namespace: str = "default") -> Looks:
    """Looks of a client whose pauses take no time."""
    door = connect(cluster.write_kubeconfig(folder / f"{user}.json", user))
    return Looks(Client(door, clock=FakeClock()), namespace)


def by_check(findings: tuple[Finding, ...]) -> dict[str, Finding]:
    """The findings by their check, of several of one check the worst."""
    order = list(Outcome)
    worst = sorted(findings, key=lambda item: (item.outcome is Outcome.FAILED, order.index(item.outcome)))
    return {item.check: item for item in worst}


def outcomes(findings: tuple[Finding, ...]) -> dict[str, str]:
    return {name: item.outcome.value for name, item in by_check(findings).items()}


class Said:
    """An answer that was made up."""

    def __init__(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.status, self.headers, self._body = status, headers, body

    def read(self) -> bytes:
        return self._body

    def pieces(self) -> Any:
        yield self._body

    def close(self) -> None:
        pass


class OtherDoor:
    """A way to a cluster on which some paths are answered by somebody else, or with other headers."""

    def __init__(
        self,
        door: Door,
        bodies: Mapping[str, bytes | tuple[int, bytes]] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        self._door, self._bodies, self._headers = door, bodies or {}, headers

    def send(self, method: str, path: str, headers: Mapping[str, str], body: bytes | None, timeout_s: float) -> Reply:
        for start, text in self._bodies.items():
            if path.startswith(start):
                status, said = text if isinstance(text, tuple) else (200, text)
                return Said(status, said, {})
        reply = self._door.send(method, path, headers, body, timeout_s)
        if self._headers is None:
            return reply
        try:
            return Said(reply.status, reply.read(), self._headers)
        finally:
            reply.close()

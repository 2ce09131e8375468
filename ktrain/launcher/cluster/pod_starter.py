"""What a pod's containers need to run: folders, variables and commands, and the asking of probes."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import Clock
from ktrain.errors import UnavailableError
from ktrain.launcher.cluster import environment, probes, volumes
from ktrain.launcher.cluster.pod_run import Delays
from ktrain.launcher.cluster.probes import Attempt
from ktrain.launcher.cluster.processes import Command, Process, Runtime
from ktrain.launcher.cluster.shelf import Object
from ktrain.launcher.cluster.store import Store
from ktrain.launcher.cluster.volumes import Mounts, Places

HOST_IP = "127.0.0.1"
FIRST_NETWORK = 77


@dataclass(frozen=True, slots=True)
class Folders:
    """Where a cluster keeps the files of its pods.

    `root` should be short: sockets of containers lie below it, and a socket's path has 107 bytes at most.
    `memory` is on a memory-backed file system where the machine has one.
    """

    root: Path
    memory: Path

    def hosts(self, namespace: str) -> Path:
        """The names of a namespace's pods and their addresses, as in /etc/hosts."""
        return self.root / f"hosts-{namespace}"

    def node(self, name: str) -> Path:
        """What is lost with a node."""
        return self.root / "nodes" / name

    @property
    def claims(self) -> Path:
        """What stays when pods and nodes go, below the name of its namespace."""
        return self.root / "claims"

    def claim(self, namespace: str, name: str) -> Path:
        """The folder of one persistent volume claim."""
        return self.claims / namespace / name

    def places(self, node: str, number: int) -> Places:
        """The folders of the `number`-th pod."""
        at = f"p{number}"
        return Places(self.root / at, self.memory / at, self.node(node), self.claims)


class Addresses:
    """Numbers the pods of a cluster, and gives each an address of its own on this machine: 127.77.0.2 and on."""

    def __init__(self, network: int = FIRST_NETWORK) -> None:
        """`network` is the second number of the addresses."""
        self._network = network
        self._last = 0

    def take(self) -> tuple[int, str]:
        """The next number and its address."""
        self._last += 1
        return self._last, f"127.{self._network}.{self._last // 254 % 256}.{self._last % 254 + 1}"


class Network:
    """A network of loopback addresses that no other cluster of this machine has. Close it.

    It is ours as long as a socket of ours listens on its first address: a cluster that is killed gives it back.
    """

    def __init__(self) -> None:
        for number in range(FIRST_NETWORK, 256):
            claim = socket.socket()
            try:
                claim.bind((f"127.{number}.0.1", contract.POD_HEAD_PORT))
                claim.listen(1)
            except OSError:
                claim.close()
                continue
            self.number, self._claim = number, claim
            return
        raise UnavailableError(f"local cluster: all networks from 127.{FIRST_NETWORK} to 127.255 are taken")

    def close(self) -> None:
        self._claim.close()


@dataclass(frozen=True, slots=True)
class Machine:
    """What all kubelets of a cluster share. `base_environment` is what an image would bring, PATH above all."""

    runtime: Runtime
    clock: Clock
    folders: Folders
    base_environment: Mapping[str, str]
    addresses: Addresses = field(default_factory=Addresses)
    delays: Delays = field(default_factory=Delays)


@dataclass(frozen=True, slots=True)
class Host:
    """One node's part: threads for probes that open connections, and what the node has."""

    machine: Machine
    network: ThreadPoolExecutor
    allocatable: Mapping[str, str]


class PodStarter:
    """Starts the containers of one pod. Call from one thread."""

    def __init__(self, pod: Object, address: str, store: Store, host: Host, places: Places) -> None:
        status = {**pod.get("status", {}), "podIP": address, "podIPs": [{"ip": address}], "hostIP": HOST_IP}
        self._pod: Object = {**pod, "status": status}
        self._address = address
        self._store = store
        self._machine = host.machine
        self._places = places
        self._network = host.network
        self._allocatable = host.allocatable
        self._volumes: dict[str, Path] | None = None
        self._mounts: dict[str, Mounts] = {}

    def start(self, container: Mapping[str, Any], log: Path) -> tuple[Process, Path]:
        if self._volumes is None:
            self._volumes = volumes.prepare(self._pod, self._store, self._places, self._allocatable)
        variables = environment.of_container(self._pod, container, self._store, self._allocatable)
        mounts = volumes.mount(container, self._volumes, self._places.pod / "c" / container["name"])
        self._mounts[container["name"]] = mounts
        words = [
            environment.expand(word, variables) for word in (*container["command"], *(container.get("args") or ()))
        ]
        process = self._run(container, variables, words, log)
        message = container.get("terminationMessagePath") or volumes.MESSAGE_PATH
        return process, mounts.root / message.lstrip("/")

    def ask(self, container: Mapping[str, Any], probe: Mapping[str, Any]) -> Attempt:
        if "exec" in probe:
            variables = environment.of_container(self._pod, container, self._store, self._allocatable)
            log = self._places.pod / "logs" / container["name"] / "probe.log"
            return probes.ExecAttempt(self._run(container, variables, probe["exec"]["command"], log))
        timeout_s = float(probe.get("timeoutSeconds") or 1)
        if "tcpSocket" in probe:
            port = _port(container, probe["tcpSocket"]["port"])
            future = self._network.submit(probes.connects, self._address, port, timeout_s)
        else:
            port, path = _port(container, probe["httpGet"]["port"]), probe["httpGet"].get("path") or "/"
            future = self._network.submit(probes.answers, self._address, port, path, timeout_s)
        future.add_done_callback(lambda _: self._machine.runtime.wake())
        return probes.NetworkAttempt(future)

    def _run(self, container: Mapping[str, Any], variables: Mapping[str, str], words: list[str], log: Path) -> Process:
        mounts = self._mounts[container["name"]]
        metadata, spec = self._pod["metadata"], self._pod["spec"]
        own = {
            contract.ENV_ROOT: str(mounts.root),
            contract.ENV_HOSTS: str(self._machine.folders.hosts(metadata["namespace"])),
            "HOSTNAME": spec.get("hostname") or metadata["name"],
        }
        directory = container.get("workingDir")
        found = {name: mounts.rewrite(value) for name, value in variables.items()}
        command = Command(
            tuple(map(mounts.rewrite, words)),
            {**self._machine.base_environment, **own, **found},
            mounts.rewrite(directory) if directory else str(mounts.root),
            log,
        )
        return self._machine.runtime.start(command)


def _port(container: Mapping[str, Any], port: int | str) -> int:
    if isinstance(port, int):
        return port
    named = {item.get("name"): item["containerPort"] for item in container.get("ports") or ()}
    return int(named.get(port, port))

"""Jobs on a cluster whose pods run: sent as `ktrain launch --backend kubernetes` sends them, followed, and hurt."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes import act
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.status import Pod, Status, assess
from ktrain.launcher.backends.kubernetes.submit import Tried, submit, try_job
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.cluster.resources import CLUSTER_QUEUE, LOCAL_QUEUE, PRIORITY_CLASS, RESOURCE_FLAVOR
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.explain import Plan, explain
from ktrain.testing.fake_cluster.offer import Offer
from ktrain.testing.running_cluster import RunningCluster
from tests.integration import launch_worker
from tests.unit.launcher.setups import CRDS

Object = dict[str, Any]
ENDS_WITHIN_S = 150.0  # generous: CI shares two cores
CLAIM, PATH = "runs", "/data"
QUEUE, FIRST = "queue", "first"  # a queue, and the priority that goes before
FRONT, POOL = "front", {"pool": "train"}
_SIZE = {"cpu": "4", "memory": "16Gi", "pods": "20"}
NODES = (NodeSpec(FRONT, _SIZE), *(NodeSpec(f"n{at}", _SIZE, POOL) for at in range(3)))
_SILENT = "node.kubernetes.io/unreachable"

HELPER_ENDS = "an agent or the head ends"
CONTAINER_ENDS = "the trainer's container ends (out of memory)"
POD_GOES = "a pod is deleted or evicted"
NODE_GOES = "a node is lost"
ALL_GO = "all pods are made anew"
PREEMPTED = "the job is preempted"


class Job:
    """One job that was sent to a running cluster."""

    def __init__(self, running: RunningCluster, client: Client, tried: Tried) -> None:
        self.running = running
        self.client = client
        self.spec = tried.spec
        self.plan: Plan = explain(tried.spec, tried.facts, tried.rendered)
        self.run = running.claim(CLAIM) / tried.spec.name

    # What is

    def events(self, kind: str, **fields: Any) -> list[dict[str, Any]]:
        path = self.run / contract.EVENTS_FILE
        lines = path.read_text().splitlines() if path.exists() else []
        found = [json.loads(line) for line in lines if line.endswith("}")]
        return [event for event in found if event["kind"] == kind and fields.items() <= event.items()]

    def promised(self, failure: str) -> str | None:
        """The tier that the plan restores from after a kind of failure."""
        (found,) = [item for item in self.plan.recoveries if item.failure == failure]
        return found.tier

    def status(self) -> Status:
        return assess(look(self.client, self.spec.namespace, self.spec.name))

    def pods(self, role: str) -> list[Pod]:
        """The pods of a role that are not on their way out, by index."""
        found = [pod for pod in self.status().pods or () if pod.role == role and pod.phase in ("Pending", "Running")]
        return sorted(found, key=lambda pod: pod.index)

    def pod(self, role: str, index: int = 0) -> Pod:
        def there() -> Pod | None:
            return next((pod for pod in self.pods(role) if pod.index == index), None)

        found: Pod = self.await_that(f"pod {index} of {role}", there)
        return found

    def await_that(self, what: str, holds: Callable[[], Any]) -> Any:
        deadline = Deadline.after(ENDS_WITHIN_S)
        while not (found := holds()):
            assert not deadline.expired(), f"{what}: not within {ENDS_WITHIN_S:g} s\n{self.describe()}"
            SYSTEM_CLOCK.sleep(0.1)
        return found

    def await_event(self, kind: str, **fields: Any) -> None:
        self.await_that(f"{kind} {fields}", lambda: self.events(kind, **fields))

    def await_end(self) -> Status:
        deadline = Deadline.after(ENDS_WITHIN_S, self.client.clock)
        return act.wait(self.client, self.spec.namespace, self.spec.name, deadline=deadline)

    def describe(self) -> str:
        """Status and last words of the containers, for who reads a failed test."""
        logs = (f"--- {path}\n{path.read_text(errors='replace')[-1500:]}" for path in self.running.logs())
        return "\n".join([str(self.status()), *logs])

    def volume(self, pod: Pod) -> Path:
        """The folder of the memory tier of a pod that runs."""
        run = self.running.call(lambda cluster: cluster.run_of(self.spec.namespace, pod.name))
        return run.places.memory / "memory"

    # What is done to it

    def pid(self, role: str, index: int, container: str) -> int:
        """The first process of a container."""
        name, namespace = self.pod(role, index).name, self.spec.namespace

        def running() -> int | None:
            found = self.running.call(lambda cluster: cluster.run_of(namespace, name)).container(container)
            return None if found is None else found.pid()

        pid: int = self.await_that(f"process of {container} in {name}", running)
        return pid

    def kill(self, role: str, index: int, container: str) -> None:
        """Kills the first process of a container, as the kernel does when memory is short."""
        os.kill(self.pid(role, index, container), signal.SIGKILL)

    def delete(self, role: str, index: int = 0) -> None:
        """Deletes a pod; whoever it belongs to makes another."""
        path = f"{self._pods_path()}/{self.pod(role, index).name}"
        self.client.delete(path, self.client.get(path)["metadata"]["uid"])

    def evict(self, role: str, index: int = 0) -> None:
        """Has a pod evicted by the API, as a drained node or a scheduler does."""
        name = self.pod(role, index).name
        eviction = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
        self.client.create(f"{self._pods_path()}/{name}/eviction", eviction)

    def lose_node(self, role: str, index: int = 0) -> str:
        """Ends the machine below a pod; returns its name."""
        node = self.pod(role, index).node
        assert node is not None
        self.running.lose(node)
        return node

    def _pods_path(self) -> str:
        return f"/api/v1/namespaces/{self.spec.namespace}/pods"


def start(nodes: Sequence[NodeSpec] = NODES, offer: Offer | None = None) -> RunningCluster:
    """A cluster under the definitions of a real one, where these are beside the repository."""
    return RunningCluster(nodes, offer, crds=CRDS if CRDS.is_dir() else None)


def small_training(folder: Path) -> CodeArchive:
    """The training of `launch_worker.py`, as `train.py`."""
    code = folder / "code"
    code.mkdir()
    shutil.copy(Path(launch_worker.__file__), code / "train.py")
    return pack_code(code)


def client_of(running: RunningCluster, folder: Path) -> Client:
    return Client(connect(running.api.write_kubeconfig(folder / "kubeconfig.json")))


def add_queue(running: RunningCluster, cpus: int) -> None:
    """A queue of Kueue with room for so many CPUs, in which the priority `FIRST` goes before others."""
    quota = {"name": "any", "resources": [{"name": "cpu", "nominalQuota": str(cpus)}]}
    groups = [{"coveredResources": ["cpu"], "flavors": [quota]}]
    preemption = {"withinClusterQueue": "LowerPriority"}
    spec = {"namespaceSelector": {}, "resourceGroups": groups, "preemption": preemption}
    store = running.api.store
    store.create(RESOURCE_FLAVOR, {"metadata": {"name": "any"}, "spec": {}})
    store.create(CLUSTER_QUEUE, {"metadata": {"name": "all"}, "spec": spec})
    local = {"metadata": {"name": QUEUE, "namespace": "default"}, "spec": {"clusterQueue": "all"}}
    store.create(LOCAL_QUEUE, local)
    store.create(PRIORITY_CLASS, {"metadata": {"name": FIRST}, "value": 1000})


def small_job(name: str, **fields: Any) -> dict[str, Any]:
    """A job of two nodes, whose run lies on a claim; its pods leave a node that is silent after a second."""
    soon = [{"key": _SILENT, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 1}]
    return {
        "name": name,
        "run": f"{PATH}/{name}",
        "image": "example.org/train:1",
        "nodes": 2,
        "memory": {"state": "1Mi"},
        "resources": {"cpu": "100m", "memory": "64Mi", "shm": "1Mi"},
        "volumes": [{"claim": CLAIM, "path": PATH}],
        **fields,
        "placement": {"node_selector": POOL, **fields.get("placement", {})},
        "overlay": {
            "head": {"nodeSelector": {"kubernetes.io/hostname": FRONT}},
            "worker": {"tolerations": soon, **fields.get("overlay", {}).get("worker", {})},
        },
    }


def send(running: RunningCluster, folder: Path, archive: CodeArchive | None, **fields: Any) -> Job:
    """Sends a small job, with other fields where they are given."""
    name = fields.pop("name", "small")
    code = {} if archive is None else {"code": {"archive": archive.sha256}}
    value = small_job(name, **code, **fields)
    client, data = client_of(running, folder), None if archive is None else archive.data
    tried = try_job(client, spec_file.from_value(value), data)
    submit(client, tried, data)
    return Job(running, client, tried)

"""Jobs on a cluster whose pods run: sent as `ktrain launch --backend kubernetes` sends them, followed, and hurt."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.launcher import spec_file
from ktrain.launcher.backends.kubernetes import act
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.connect import connect
from ktrain.launcher.backends.kubernetes.status import Status, assess
from ktrain.launcher.backends.kubernetes.submit import Tried, submit, try_job
from ktrain.launcher.backends.kubernetes.view import look
from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.explain import Plan, explain
from ktrain.testing.fake_cluster.offer import Offer
from ktrain.testing.running_cluster import RunningCluster
from tests.unit.launcher.setups import CRDS

Object = dict[str, Any]
ENDS_WITHIN_S = 150.0  # generous: CI shares two cores
CLAIM, PATH = "runs", "/data"
SIZE = {"cpu": "4", "memory": "16Gi", "pods": "20"}
FRONT, POOL = "front", "train"
NODES = (NodeSpec(FRONT, SIZE), *(NodeSpec(f"n{at}", SIZE, {"pool": POOL}) for at in range(3)))


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
        found = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [event for event in found if event["kind"] == kind and fields.items() <= event.items()]

    def tiers(self) -> list[str]:
        """The tier of each restore so far."""
        return [event["tier"] for event in self.events("restored")]

    def promised(self, failure: str) -> str | None:
        """The tier that the plan restores from after a kind of failure."""
        (found,) = [item for item in self.plan.recoveries if item.failure == failure]
        return found.tier

    def status(self) -> Status:
        return assess(look(self.client, self.spec.namespace, self.spec.name))

    def pod(self, role: str, index: int = 0) -> str:
        """The name of a role's pod that is not on its way out."""
        pods = self.status().pods
        assert pods is not None
        found = [pod for pod in pods if (pod.role, pod.index) == (role, index) and pod.phase in ("Pending", "Running")]
        assert len(found) == 1, (role, index, pods)
        return found[0].name

    def node_of(self, role: str, index: int = 0) -> str:
        pods, name = self.status().pods, self.pod(role, index)
        assert pods is not None
        (node,) = [pod.node for pod in pods if pod.name == name]
        assert node is not None
        return node

    def await_that(self, what: str, holds: Callable[[], Any]) -> Any:
        deadline = Deadline.after(ENDS_WITHIN_S)
        while not (found := holds()):
            assert not deadline.expired(), f"{what}: not within {ENDS_WITHIN_S:g} s\n{self.describe()}"
            SYSTEM_CLOCK.sleep(0.05)
        return found

    def await_event(self, kind: str, number: int = 1, **fields: Any) -> dict[str, Any]:
        """The `number`-th event of a kind with these fields."""

        def there() -> dict[str, Any] | None:
            found = self.events(kind, **fields)
            return found[number - 1] if len(found) >= number else None

        event: dict[str, Any] = self.await_that(f"{number} x {kind} {fields}", there)
        return event

    def await_end(self) -> Status:
        deadline = Deadline.after(ENDS_WITHIN_S, self.client.clock)
        return act.wait(self.client, self.spec.namespace, self.spec.name, deadline=deadline)

    def describe(self) -> str:
        """Status and last words of the containers, for who reads a failed test."""
        found = [str(self.status())]
        for path in sorted(self.running.logs()):
            found.append(f"--- {path}\n{path.read_text(errors='replace')[-1500:]}")
        return "\n".join(found)

    # What is done to it

    def kill(self, role: str, index: int, container: str) -> None:
        """Kills the first process of a container, as the kernel does when memory is short."""
        name = self.pod(role, index)

        def pid() -> int | None:
            return self.running.call(
                lambda cluster: _pid(cluster.run_of(self.spec.namespace, name).container(container))
            )

        os.kill(self.await_that(f"process of {container} in {name}", pid), signal.SIGKILL)

    def delete(self, role: str, index: int = 0) -> None:
        """Deletes a pod, which is then made anew."""
        self.client.delete(f"/api/v1/namespaces/{self.spec.namespace}/pods/{self.pod(role, index)}")


def _pid(container: Any) -> int | None:
    found: int | None = None if container is None else container.pid()
    return found


@contextmanager
def cluster(nodes: Sequence[NodeSpec] = NODES, offer: Offer | None = None) -> Iterator[RunningCluster]:
    """A running cluster under the definitions of a real one, where these are beside the repository."""
    with RunningCluster(nodes, offer, crds=CRDS if CRDS.is_dir() else None) as running:
        yield running


def client_of(running: RunningCluster, folder: Path) -> Client:
    return Client(connect(running.api.write_kubeconfig(folder / "kubeconfig.json")))


def send(running: RunningCluster, folder: Path, code: Path, **fields: Any) -> Job:
    """Sends a job of a folder of code; its run lies on a claim."""
    archive: CodeArchive = pack_code(code)
    name = fields.get("name", "small")
    value = {
        "name": name,
        "run": f"{PATH}/{name}",
        "image": "example.org/train:1",
        "nodes": 2,
        "memory": {"state": "1Mi"},
        "resources": {"cpu": "100m", "memory": "64Mi", "shm": "1Mi"},
        "volumes": [{"claim": CLAIM, "path": PATH}],
        "code": {"archive": archive.sha256},
        **fields,
    }
    value["placement"] = {"node_selector": {"pool": POOL}, **fields.get("placement", {})}
    value["overlay"] = {"head": {"nodeSelector": {"kubernetes.io/hostname": FRONT}}, **fields.get("overlay", {})}
    client = client_of(running, folder)
    tried = try_job(client, spec_file.from_value(value), archive.data)
    submit(client, tried, archive.data)
    return Job(running, client, tried)

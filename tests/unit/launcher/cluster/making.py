"""A cluster without processes and with a clock that a test moves, and short manifests for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ktrain.launcher.cluster.kubelet import NodeSpec
from ktrain.launcher.cluster.local import LocalCluster, Pace
from ktrain.launcher.cluster.nodes import Silence
from ktrain.launcher.cluster.pod_run import Delays
from ktrain.launcher.cluster.pod_starter import Folders, Machine
from ktrain.launcher.cluster.resources import EVENT, JOB, JOB_SET, NODE, POD, Resource
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.fake_runtime import FakeProcess, FakeRuntime

Object = dict[str, Any]
SPACE = "space"


class Made:
    """A cluster, its clock and its runtime."""

    def __init__(
        self,
        tmp_path: Path,
        *,
        nodes: Sequence[NodeSpec] = (NodeSpec("n0"), NodeSpec("n1"), NodeSpec("n2"), NodeSpec("n3")),
        on_probe: Callable[[str], bool] = lambda _: True,
        exit_on_terminate: int | None = 143,
        delays: Delays = Delays(),  # noqa: B008 - frozen
    ) -> None:
        self.clock = FakeClock()
        self.runtime = FakeRuntime(on_probe=on_probe, exit_on_terminate=exit_on_terminate)
        folders = Folders(tmp_path / "root", tmp_path / "memory")
        machine = Machine(self.runtime, self.clock, folders, {"PATH": "/bin"}, delays=delays)
        self.cluster = LocalCluster(nodes, machine, pace=Pace(silence=Silence(40)))
        self.store = self.cluster.store

    def create(self, resource: Resource, name: str, spec: Object, **metadata: Any) -> Object:
        namespace = {"namespace": SPACE} if resource.namespaced else {}
        made = self.store.create(resource, {"metadata": {"name": name, **namespace, **metadata}, "spec": spec})
        self.cluster.step()
        return made

    def get(self, resource: Resource, name: str) -> Object:
        return self.store.get(resource, SPACE if resource.namespaced else None, name)

    def pods(self, prefix: str = "") -> list[Object]:
        """Pods that live, by name."""
        items = self.store.list(POD, SPACE).items
        return [item for item in items if item["metadata"]["name"].startswith(prefix)]

    def pod(self, prefix: str) -> Object:
        found = [item for item in self.pods(prefix) if item["status"].get("phase") not in ("Succeeded", "Failed")]
        assert len(found) == 1, [item["metadata"]["name"] for item in found]
        return found[0]

    def process(self, prefix: str, container: str = "main") -> FakeProcess:
        """The container that runs in the pod whose name begins so."""
        pod = self.pod(prefix)
        kubelet = self.cluster.nodes.kubelet_of(pod)
        assert kubelet is not None
        run = kubelet.run_of(pod["metadata"]["uid"])
        assert run is not None
        root = run.places.pod / "logs" / container
        (found,) = [item for item in self.runtime.running(container) if item.command.log.parent == root]
        return found

    def exit(self, prefix: str, code: int, container: str = "main") -> None:
        self.process(prefix, container).exit(code)
        self.settle()

    def settle(self) -> None:
        """Steps until nothing is left to do: a container that a step ends is seen by the next."""
        for _ in range(2):
            self.cluster.step()

    def pass_time(self, seconds: float) -> None:
        self.clock.advance(seconds)
        self.settle()

    def events(self) -> list[tuple[str, str]]:
        """Reasons and messages, in order."""
        items = sorted(self.store.list(EVENT).items, key=lambda item: int(item["metadata"]["resourceVersion"]))
        return [(item["reason"], item["message"]) for item in items]


def conditions(obj: Object) -> dict[str, tuple[str, str, str]]:
    """Conditions by type: status, reason, message."""
    found = obj.get("status", {}).get("conditions") or ()
    return {item["type"]: (item["status"], item.get("reason", ""), item.get("message", "")) for item in found}


def pod_spec(**more: Any) -> Object:
    container = {"name": "main", "image": "any", "command": ["run"], **more.pop("container", {})}
    return {"restartPolicy": "Never", "terminationGracePeriodSeconds": 5, "containers": [container], **more}


def job_spec(completions: int = 1, *, pod: Object | None = None, **more: Any) -> Object:
    return {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": completions,
        "backoffLimit": 0,
        "template": {"spec": pod_spec() if pod is None else pod},
        **more,
    }


def jobset_spec(*replicated: tuple[str, Object], **more: Any) -> Object:
    jobs = [{"name": name, "replicas": 1, "template": {"spec": spec}} for name, spec in replicated]
    return {"replicatedJobs": jobs, **more}


__all__ = [
    "EVENT",
    "JOB",
    "JOB_SET",
    "NODE",
    "POD",
    "SPACE",
    "Made",
    "conditions",
    "job_spec",
    "jobset_spec",
    "pod_spec",
]

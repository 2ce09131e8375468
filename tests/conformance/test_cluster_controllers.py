"""Recorded scenarios of real controllers, played on the local cluster with real processes: the same words and order.

The recordings lie beside the repository, in `shared/kubernetes/transcripts`; without them these tests are skipped.
"""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from ktrain.base import settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.launcher.cluster.conditions import has_condition
from ktrain.launcher.cluster.kubelet import NodeSpec, base_environment
from ktrain.launcher.cluster.local import LocalCluster, Pace
from ktrain.launcher.cluster.nodes import evict
from ktrain.launcher.cluster.pod_run import Delays
from ktrain.launcher.cluster.pod_starter import Folders, Machine
from ktrain.launcher.cluster.processes import ProcessRuntime
from ktrain.launcher.cluster.resources import (
    JOB,
    JOB_SET,
    POD,
    POD_GROUP,
    VOLCANO_POD_GROUP,
    Resource,
    known,
)
from ktrain.launcher.cluster.watch import Watch

TRANSCRIPTS = Path(__file__).parents[3] / "shared" / "kubernetes" / "transcripts"
WAIT_S = 30.0
ENDS = ("Complete", "Failed", "Completed")

Object = dict[str, Any]
Fact = tuple[str, str, str, str]  # type, status, reason, message

pytestmark = [
    pytest.mark.skipif(not TRANSCRIPTS.is_dir(), reason="recordings of a real cluster are not beside the repository")
]


class Stage:
    """A cluster on which a recording is played, and what is heard of it."""

    def __init__(self, name: str, root: Path) -> None:
        self.recording = json.loads((TRANSCRIPTS / f"{name}.json").read_text())
        machine = Machine(
            ProcessRuntime(),
            SYSTEM_CLOCK,
            Folders(root, root / "memory"),
            base_environment(settings.child_environment({})),
            delays=Delays(0.05, 1.0),
        )
        nodes = [NodeSpec(f"n{index}") for index in range(4)]
        self.cluster = LocalCluster(nodes, machine, pace=Pace(job_back_off_s=0.05))
        self.namespace = name
        self._watches = {
            kind: self.cluster.store.watch(kind) for kind in (JOB, JOB_SET, POD, POD_GROUP, VOLCANO_POD_GROUP)
        }
        self._heard: dict[Resource, list[Object]] = {kind: [] for kind in self._watches}

    def post(self, name: str) -> Resource:
        """Sends what was recorded as sent under this name; returns its kind."""
        (body,) = [
            step["request"]["body"]
            for step in self.recording["steps"]
            if step.get("request", {}).get("method") == "POST"
            and step["request"]["body"].get("metadata", {}).get("name") == name
            and not step["request"]["path"].endswith("eviction")
            and step["response"]["status"] == 201
        ]
        resource = next(kind for kind in known() if (kind.api_version, kind.kind) == (body["apiVersion"], body["kind"]))
        self.cluster.store.create(resource, {**body, "metadata": {**body["metadata"], "namespace": self.namespace}})
        return resource

    def wait(self, resource: Resource, name: str, holds: Callable[[Object], bool]) -> None:
        def look() -> bool:
            self._listen()
            return holds(self.cluster.store.get(resource, self.namespace, name))

        self.cluster.run_until(look, WAIT_S, what=f"{resource.kind} {name}")

    def settle(self) -> None:
        self.cluster.step()
        self._listen()

    def heard(self, resource: Resource, name: str) -> list[Object]:
        """All states of an object, oldest first."""
        return [obj for obj in self._heard[resource] if _plain(obj["metadata"]["name"]) == _plain(name)]

    def recorded(self, resource: Resource, name: str) -> list[Object]:
        """The same of the recording, from all of its watches."""
        found: dict[int, Object] = {}
        for step in self.recording["steps"]:
            for event in step.get("events", ()):
                obj = event["object"]
                if obj.get("kind") == resource.kind and _plain(obj["metadata"]["name"]) == _plain(name):
                    found[int(obj["metadata"]["resourceVersion"][len("<rv-") : -1])] = obj
        return [obj for _, obj in sorted(found.items())]

    def _listen(self) -> None:
        for kind, watch in self._watches.items():
            self._heard[kind] += _drain(watch)


def _drain(watch: Watch) -> Iterator[Object]:
    while (event := watch.next(0)) is not None:
        yield event.object


def _plain(text: str) -> str:
    """Without what is made up anew each time: ends of pods' names, uids."""
    text = re.sub(r"-(<rand-\d+>|(?=[a-z0-9]*)[bcdfghjklmnpqrstvwxz2456789]{5})(?=$|[ _])", "-*", text)
    return re.sub(r"<uid-\d+>|[0-9a-f]{8}-[0-9a-f-]{27}", "*", text)


def facts(states: list[Object]) -> list[Fact]:
    """The conditions in the order in which they came or changed."""
    found: list[Fact] = []
    known: dict[str, Fact] = {}
    for obj in states:
        for item in obj.get("status", {}).get("conditions") or ():
            fact = (item["type"], item["status"], item.get("reason", ""), _plain(item.get("message") or ""))
            if known.get(item["type"]) != fact:
                known[item["type"]] = fact
                found.append(fact)
    return found


def end(states: list[Object]) -> Object:
    """The last status, without times and conditions."""
    status = {key: value for key, value in states[-1]["status"].items() if not key.endswith("Time")}
    status.pop("conditions", None)
    for tally in status.get("replicatedJobsStatus") or ():
        tally.pop("_", None)
    return status


def life(states: list[Object]) -> list[Object]:
    """What a pod went through, each thing once."""
    found: list[Object] = []
    for obj in states:
        status, metadata = obj["status"], obj["metadata"]
        (main,) = status.get("containerStatuses") or [{}]
        state = main.get("state") or {}
        seen = {
            "phase": status["phase"],
            "conditions": sorted(
                (item["type"], item["status"], item.get("reason", "")) for item in status.get("conditions") or ()
            ),
            "grace": metadata.get("deletionGracePeriodSeconds"),
            "state": sorted(state),
            "exit": [(item["exitCode"], item["reason"]) for kind, item in state.items() if kind == "terminated"],
            "ready": main.get("ready"),
        }
        if not found or found[-1] != seen:
            found.append(seen)
    return found


@pytest.fixture
def stage(request: pytest.FixtureRequest) -> Iterator[Stage]:
    root = Path(tempfile.mkdtemp(prefix="ktp-"))
    made = Stage(request.param, root)
    try:
        yield made
    finally:
        made.cluster.close()
        shutil.rmtree(root)


def compare(stage: Stage, resource: Resource, name: str) -> None:
    assert facts(stage.heard(resource, name)) == facts(stage.recorded(resource, name))
    assert end(stage.heard(resource, name)) == end(stage.recorded(resource, name))


def ended(obj: Object) -> bool:
    return any(has_condition(obj, kind) for kind in ENDS)


@pytest.mark.parametrize(
    ("stage", "name"),
    [
        ("job-success", "a"),
        ("job-failures", "retry"),
        ("job-failures", "deadline"),
        ("job-failures", "inplace"),
        ("job-pod-failure-policy", "fail"),
        ("job-pod-failure-policy", "index"),
        ("job-pod-failure-policy", "count"),
        ("job-policies", "leader"),
    ],
    indirect=["stage"],
)
def test_job_ends_as_recorded(stage: Stage, name: str) -> None:
    resource = stage.post(name)
    stage.wait(resource, name, ended)
    compare(stage, resource, name)


@pytest.mark.parametrize(
    ("stage", "name", "jobs"),
    [
        ("jobset-success", "a", ["a-workers-0"]),
        ("jobset-failure", "a", ["a-workers-0"]),
        ("jobset-failure-rules", "fatal", ["fatal-workers-0"]),
        ("jobset-failure-rules", "planned", ["planned-workers-0"]),
        ("jobset-depends-on", "a", ["a-driver-0", "a-workers-0"]),
    ],
    indirect=["stage"],
)
def test_jobset_and_its_jobs_end_as_recorded(stage: Stage, name: str, jobs: list[str]) -> None:
    resource = stage.post(name)
    stage.wait(resource, name, ended)
    stage.settle()
    recorded = end(stage.recorded(resource, name))
    recorded["replicatedJobsStatus"].sort(key=lambda item: item["name"])
    heard = end(stage.heard(resource, name))
    heard["replicatedJobsStatus"].sort(key=lambda item: item["name"])
    assert heard == recorded
    assert facts(stage.heard(resource, name)) == facts(stage.recorded(resource, name))
    for job in jobs:
        compare(stage, JOB, job)


@pytest.mark.parametrize(
    ("stage", "name", "pods"),
    [
        ("job-success", "a", ["a-0-*", "a-1-*"]),
        ("job-pod-failure-policy", "fail", ["fail-0-*", "fail-1-*"]),
        ("job-policies", "leader", ["leader-1-*"]),
    ],
    indirect=["stage"],
)
def test_pods_live_as_recorded(stage: Stage, name: str, pods: list[str]) -> None:
    resource = stage.post(name)
    stage.wait(resource, name, ended)
    stage.settle()
    for pod in pods:
        assert life(stage.heard(POD, pod)) == life(stage.recorded(POD, pod))


@pytest.mark.parametrize("stage", ["job-policies"], indirect=True)
def test_job_suspended_and_resumed_as_recorded(stage: Stage) -> None:
    resource = stage.post("paused")
    stage.wait(resource, "paused", lambda job: has_condition(job, "Suspended"))
    stage.cluster.store.mutate(JOB, stage.namespace, "paused", lambda job: job["spec"].update(suspend=False))
    stage.wait(resource, "paused", ended)
    compare(stage, resource, "paused")


@pytest.mark.parametrize("stage", ["jobset-suspend"], indirect=True)
def test_jobset_suspended_and_resumed_as_recorded(stage: Stage) -> None:
    resource = stage.post("a")
    stage.wait(resource, "a", lambda obj: has_condition(obj, "Suspended"))
    for suspended in (False, True):
        stage.cluster.store.mutate(
            JOB_SET, stage.namespace, "a", lambda obj, to=suspended: obj["spec"].update(suspend=to)
        )
        stage.wait(resource, "a", lambda obj, to=suspended: has_condition(obj, "Suspended", str(to)))
    compare(stage, resource, "a")


@pytest.mark.parametrize(("stage", "name"), [("job-disruption-ignored", "zero")], indirect=["stage"])
def test_evicted_pod_that_exits_zero_completes_its_job_as_recorded(stage: Stage, name: str) -> None:
    resource = stage.post(name)
    stage.wait(resource, name, lambda job: job.get("status", {}).get("ready") == 1)
    (pod,) = stage.cluster.store.list(POD, stage.namespace).items
    main = stage.cluster.run_of(stage.namespace, pod["metadata"]["name"]).container("main")
    assert main is not None

    def has_trap(job: Object) -> bool:
        """Its shell has set its trap when it has a child."""
        del job
        return bool(main.pid() and psutil.Process(main.pid()).children())

    stage.wait(resource, name, has_trap)
    evict(stage.cluster.store, pod)
    stage.wait(resource, name, ended)
    assert facts(stage.heard(POD, f"{name}-0-*"))[-5:] == facts(stage.recorded(POD, f"{name}-0-*"))[-5:]
    compare(stage, resource, name)


@pytest.mark.parametrize(
    ("stage", "resource", "before"),
    [("native-pod-group", POD_GROUP, {}), ("volcano-pod-group", VOLCANO_POD_GROUP, {"phase": "Inqueue"})],
    indirect=["stage"],
)
def test_gang_waits_for_its_third_pod_as_recorded(stage: Stage, resource: Resource, before: Object) -> None:
    for name in ("g", "p0", "p1"):
        stage.post(name)
    stage.settle()
    assert all("nodeName" not in pod["spec"] for pod in stage.cluster.store.list(POD).items)
    waiting = end([{"status": {}, **stage.cluster.store.get(resource, stage.namespace, "g")}])
    assert waiting == before
    stage.post("p2")
    stage.wait(POD, "p2", lambda pod: pod["status"].get("phase") == "Running")
    assert facts(stage.heard(resource, "g")) == facts(stage.recorded(resource, "g"))
    for name in ("p0", "p1", "p2"):
        heard = [fact for fact in facts(stage.heard(POD, name)) if fact[0] == "PodScheduled"]
        assert heard == [fact for fact in facts(stage.recorded(POD, name)) if fact[0] == "PodScheduled"]

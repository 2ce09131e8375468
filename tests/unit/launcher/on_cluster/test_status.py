"""The state of a job and its reasons, from objects that a real API server showed, and from the fake cluster."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.clock import Deadline
from ktrain.errors import DeadlineError, NotFoundError
from ktrain.launcher.backends.kubernetes import act
from ktrain.launcher.backends.kubernetes.client import Client
from ktrain.launcher.backends.kubernetes.pending import Cause, reasons
from ktrain.launcher.backends.kubernetes.status import State, Status, assess, state_of
from ktrain.launcher.backends.kubernetes.submit import submit, try_job
from ktrain.launcher.backends.kubernetes.view import View, look
from ktrain.launcher.cluster import resources as known
from ktrain.launcher.render.groups import KUEUE_QUEUE
from ktrain.testing.fake_cluster import FakeCluster, Fault, Offer
from tests.unit.launcher import setups
from tests.unit.launcher.on_cluster.clusters import CRDS, client_of, job

needs_recordings = pytest.mark.skipif(
    not setups.TRANSCRIPTS.is_dir(), reason=f"no transcripts of a real API server in {setups.TRANSCRIPTS}"
)
JOBSET: dict[str, Any] = {"metadata": {"name": "net", "namespace": "default"}, "spec": {"replicatedJobs": []}}
QUEUED = {"metadata": {**JOBSET["metadata"], "labels": {KUEUE_QUEUE: "q"}}, "spec": {**JOBSET["spec"], "suspend": True}}


def recorded(name: str, kind: str) -> list[dict[str, Any]]:
    """Every version of the objects of a kind that a recording shows, in its order."""
    found = []
    for step in json.loads((setups.TRANSCRIPTS / f"{name}.json").read_text())["steps"]:
        bodies = [step["response"]["body"]] if "request" in step else [event["object"] for event in step["events"]]
        for body in (body for body in bodies if isinstance(body, dict)):
            found += list(body["items"]) if body.get("kind") == f"{kind}List" else [body]
    return [item for item in found if item.get("kind", kind) == kind and "spec" in item]


def causes(view: View) -> dict[Cause, str]:
    return {reason.cause: reason.text for reason in reasons(view)}


@needs_recordings
def test_recorded_workloads_say_quota_queue_and_preemption() -> None:
    seen: dict[Cause, set[str]] = {}
    for workload in recorded("kueue-admission", "Workload") + recorded("kueue-preemption", "Workload"):
        for cause, text in causes(View(jobset=QUEUED, workload=workload)).items():
            seen.setdefault(cause, set()).add(text)

    assert any("insufficient unused quota for cpu" in text for text in seen[Cause.QUOTA])
    assert any("LocalQueue nosuch doesn't exist" in text for text in seen[Cause.QUEUE])
    assert any(text.startswith("Preempted to accommodate") for text in seen[Cause.PREEMPTED])


@needs_recordings
def test_recorded_preemption_is_not_seen_once_the_job_is_admitted_again() -> None:
    admitted = [
        item
        for item in recorded("kueue-preemption", "Workload")
        if any(c["message"].startswith("Previously:") for c in item.get("status", {}).get("conditions", []))
    ]

    assert admitted
    assert all(Cause.PREEMPTED not in causes(View(jobset=JOBSET, workload=item)) for item in admitted)


@needs_recordings
def test_recorded_pods_say_that_no_node_takes_them_and_that_they_are_gated() -> None:
    seen = {cause for pod in recorded("pod-pending", "Pod") for cause in causes(View(jobset=JOBSET, pods=(pod,)))}

    assert seen == {Cause.UNSCHEDULABLE, Cause.GATED}


@needs_recordings
def test_recorded_group_that_does_not_fit_and_one_that_lacks_pods_are_said() -> None:
    groups = recorded("native-pod-group", "PodGroup")
    huge = next(item for item in groups if item.get("status", {}).get("conditions", [{}])[0].get("status") == "False")
    silent = next(item for item in groups if not item.get("status"))

    assert "do not fit together" in causes(View(jobset=JOBSET, group=huge))[Cause.GANG]
    assert (
        causes(View(jobset=JOBSET, group=silent, pods=()))[Cause.GANG]
        == "0 of the 3 pods that start together are there"
    )


@needs_recordings
def test_recorded_node_that_died_is_named_with_what_mends_it() -> None:
    pods = [item for item in recorded("node-death", "Pod") if item["metadata"].get("deletionTimestamp")]
    said = [causes(View(jobset=JOBSET, pods=(pod,))).get(Cause.NODE, "") for pod in pods]

    assert any("node.kubernetes.io/out-of-service=nodeshutdown:NoExecute" in text for text in said)


@needs_recordings
@pytest.mark.parametrize(
    ("name", "last"),
    [("jobset-success", State.DONE), ("jobset-failure", State.FAILED), ("node-death", State.STARTING)],
)
def test_recorded_jobsets_go_through_their_states(name: str, last: State) -> None:
    states = [state_of(item) for item in recorded(name, "JobSet")]

    assert last in states and states[0] in (State.STARTING, State.SUBMITTED, State.RUNNING)
    assert (State.RECOVERING in states) == (name in ("jobset-failure", "node-death"))


def test_image_that_cannot_be_pulled_is_said_once_for_all_pods() -> None:
    waiting = {"reason": "ImagePullBackOff", "message": "not found"}
    status = {
        "phase": "Pending",
        "initContainerStatuses": [{"name": "agent", "image": "x", "state": {"waiting": waiting}}],
    }
    pods = tuple({"metadata": {"name": f"net-worker-0-{i}"}, "spec": {}, "status": status} for i in range(3))

    assert causes(View(jobset=JOBSET, pods=pods)) == {Cause.IMAGE: "x: not found (3 pods)"}


# A job on the fake cluster, moved by the test


@pytest.fixture
def cluster() -> Iterator[FakeCluster]:
    with FakeCluster(Offer(version="1.36", jobset="0.12.0"), crds=CRDS) as found:
        yield found


@pytest.fixture
def client(cluster: FakeCluster, tmp_path: Path) -> Client:
    found = client_of(cluster, tmp_path)
    submit(found, try_job(found, job()))
    return found


def deadline(client: Client, seconds: float = 60.0) -> Deadline:
    return Deadline.after(seconds, client.clock)


def make_pod(cluster: FakeCluster, role: str, index: int, **status: Any) -> None:
    """A pod as its Job would make it, in that state."""
    labels = {
        contract.LABEL_RUN: "net",
        contract.LABEL_ROLE: role,
        "batch.kubernetes.io/job-completion-index": str(index),
    }
    about = {"name": f"net-{role}-0-{index}-abcde", "namespace": "default", "labels": labels}
    names = ["head"] if role == "head" else ["trainer"]
    spec = {"nodeName": "n1", "containers": [{"name": name, "image": "x"} for name in names]}
    cluster.store.create(known.POD, {"metadata": about, "spec": spec, "status": status})


def end(cluster: FakeCluster, kind: str, reason: str = "Ended", message: str = "") -> None:
    def change(jobset: dict[str, Any]) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        condition["lastTransitionTime"] = "2026-01-01T00:00:00Z"
        jobset["status"] = {"conditions": [condition]}

    cluster.store.mutate(known.JOB_SET, "default", "net", change, status=True)


READY = {"phase": "Running", "conditions": [{"type": "Ready", "status": "True"}]}


def test_job_runs_when_every_node_that_it_needs_is_ready(cluster: FakeCluster, client: Client) -> None:
    make_pod(cluster, "worker", 0, **READY)
    before = assess(look(client, "default", "net"))
    make_pod(cluster, "worker", 1, **READY)
    after = assess(look(client, "default", "net"))

    assert (before.state, after.state) == (State.STARTING, State.RUNNING)
    assert after.run == "s3://bucket/net" and [pod.index for pod in after.pods or ()] == [0, 1]


@pytest.mark.parametrize(
    ("code", "state", "exit_code"),
    [
        (contract.EXIT_CORRUPT, State.FAILED, contract.EXIT_CORRUPT),
        (contract.EXIT_AGAIN, State.FAILED, contract.EXIT_FAILED),  # its restarts are spent: no verdict
        (contract.EXIT_STOPPED, State.CANCELLED, contract.EXIT_STOPPED),
    ],
)
def test_exit_code_of_a_failed_job_is_the_verdict_of_its_head(
    cluster: FakeCluster, client: Client, code: int, state: State, exit_code: int
) -> None:
    ended = {"name": "head", "state": {"terminated": {"exitCode": code}}}
    make_pod(cluster, "head", 0, phase="Failed", containerStatuses=[ended])
    end(cluster, "Failed", "FailJobSetFailurePolicyAction", "words")
    found = assess(look(client, "default", "net"))

    assert (found.state, found.exit_code) == (state, exit_code)


def test_wait_ends_with_the_job_though_the_server_fails_meanwhile(cluster: FakeCluster, client: Client) -> None:
    seen: list[Status] = []

    def observe(status: Status) -> None:
        if not seen:
            cluster.put_fault(Fault(status=503, method="GET", times=20))
            end(cluster, "Completed")
        seen.append(status)

    found = act.wait(client, "default", "net", deadline=deadline(client, 3600), observe=observe)
    assert (seen[0].state, found.state, found.exit_code) == (State.STARTING, State.DONE, contract.EXIT_OK)


def test_wait_that_is_over_says_what_the_job_waits_for(cluster: FakeCluster, client: Client) -> None:
    unscheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/4 nodes"}
    make_pod(cluster, "worker", 0, phase="Pending", conditions=[unscheduled])

    with pytest.raises(DeadlineError, match=r"starting; unschedulable: 0/4 nodes"):
        act.wait(client, "default", "net", deadline=deadline(client, 0.0))


def test_cancel_suspends_the_job_and_keeps_it(cluster: FakeCluster, client: Client) -> None:
    found = act.cancel(client, "default", "net", deadline=deadline(client))

    assert (found.state, found.exit_code) == (State.CANCELLED, contract.EXIT_STOPPED)
    assert cluster.store.get(known.JOB_SET, "default", "net")["spec"]["suspend"] is True


def test_delete_takes_the_job_and_what_it_owns(cluster: FakeCluster, client: Client) -> None:
    act.delete(client, "default", "net", deadline=deadline(client))

    assert cluster.store.list(known.SECRET, "default").items == []
    with pytest.raises(NotFoundError, match="ktrain list"):
        look(client, "default", "net")

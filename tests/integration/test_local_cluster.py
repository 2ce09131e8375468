"""A job by manifests alone, with real processes: what is killed comes back, the smallest restart first, to the end."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

from ktrain.base import settings
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.launcher.cluster.conditions import find_condition, has_condition
from ktrain.launcher.cluster.kubelet import NodeSpec, base_environment
from ktrain.launcher.cluster.local import LocalCluster, Pace
from ktrain.launcher.cluster.nodes import Silence
from ktrain.launcher.cluster.pod_starter import Folders, Machine
from ktrain.launcher.cluster.processes import ProcessRuntime
from ktrain.launcher.cluster.resources import JOB, JOB_SET, NODE, POD, POD_GROUP

SPACE, RUN = "team", "net"
NUM_WORKERS = 3
WORKER = Path(__file__).with_name("pod_worker.py")
WAIT_S = 60.0

Object = dict[str, Any]


class Job:
    """The job, its cluster and the folder that its pods share."""

    def __init__(self, root: Path, memory: Path) -> None:
        folders = Folders(root, memory)
        machine = Machine(ProcessRuntime(), SYSTEM_CLOCK, folders, base_environment(settings.child_environment({})))
        nodes = [NodeSpec(f"n{index}", {"cpu": "4", "memory": "8Gi", "pods": "9"}) for index in range(NUM_WORKERS + 1)]
        self.cluster = LocalCluster(nodes, machine, pace=Pace(job_back_off_s=0.05, silence=Silence(0.2)))
        self.shared = root / "claims" / SPACE / "shared"
        self.shared.mkdir(parents=True)

    def submit(self) -> None:
        store = self.cluster.store
        spec = {"schedulingPolicy": {"gang": {"minCount": NUM_WORKERS}}}
        store.create(POD_GROUP, {"metadata": {"name": "workers", "namespace": SPACE}, "spec": spec})
        store.create(JOB_SET, {"metadata": {"name": RUN, "namespace": SPACE}, "spec": jobset()})

    def wait(self, holds: Any, what: str) -> None:
        self.cluster.run_until(holds, WAIT_S, what=what)

    def workers(self) -> dict[int, Object]:
        """The pods of workers that are not on their way out, by index."""
        found = {}
        for pod in self.cluster.store.list(POD, SPACE, labels="role=worker").items:
            if "deletionTimestamp" not in pod["metadata"] and pod["status"].get("phase") == "Running":
                found[int(pod["metadata"]["labels"]["batch.kubernetes.io/job-completion-index"])] = pod
        return found

    def uids(self) -> dict[int, str]:
        return {index: pod["metadata"]["uid"] for index, pod in self.workers().items()}

    def joined(self, pod: Object) -> list[str]:
        """The processes of a pod that have joined, by what they left."""
        return sorted(path.name for path in self.shared.glob(f"joined-*-{pod['metadata']['name']}-*"))

    def wait_joined(self, what: str, *, runs: dict[int, int] | None = None) -> dict[int, str]:
        """Waits until every worker has joined, so many times for each index; returns the pods' uids."""

        def all_joined() -> bool:
            pods = self.workers()
            return len(pods) == NUM_WORKERS and all(
                len(self.joined(pod)) == (runs or {}).get(index, 1) for index, pod in pods.items()
            )

        self.wait(all_joined, what)
        return self.uids()

    def jobs(self) -> list[str]:
        return [item["metadata"]["name"] for item in self.cluster.store.list(JOB, SPACE).items]

    def jobset(self) -> Object:
        return self.cluster.store.get(JOB_SET, SPACE, RUN)


def jobset() -> Object:
    head = container("head", "head")
    trainer = container(
        "trainer",
        "worker",
        restartPolicy="Never",
        restartPolicyRules=[{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 74]}}],
    )
    agent = container("agent", "agent", restartPolicy="Always")
    agent["command"] = ["sh", "-c", "touch /work/ready; while :; do sleep 600; done"]
    agent["startupProbe"] = {
        "exec": {"command": ["test", "-e", "/work/ready"]},
        "periodSeconds": 1,
        "failureThreshold": 60,
    }
    again = {
        "rules": [{"action": "FailJob", "onExitCodes": {"containerName": "head", "operator": "In", "values": [75]}}]
    }
    head_job = {**job(1, pod([head])), "podFailurePolicy": again}
    apart = {"labelSelector": {"matchLabels": {"role": "worker"}}, "topologyKey": "kubernetes.io/hostname"}
    worker_pod = pod(
        [trainer],
        initContainers=[agent],
        schedulingGroup={"podGroupName": "workers"},
        affinity={"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [apart]}},
    )
    return {
        "successPolicy": {"operator": "All", "targetReplicatedJobs": ["head"]},
        "failurePolicy": {"maxRestarts": 3, "restartStrategy": "BlockingRecreate"},
        "replicatedJobs": [
            {"name": "head", "replicas": 1, "template": {"spec": head_job}},
            {"name": "worker", "replicas": 1, "template": {"spec": job(NUM_WORKERS, worker_pod, role="worker")}},
        ],
    }


def job(completions: int, pod_template: Object, **labels: str) -> Object:
    return {
        "completionMode": "Indexed",
        "completions": completions,
        "parallelism": completions,
        "backoffLimit": 2**31 - 1,
        "podReplacementPolicy": None if labels == {} else "TerminatingOrFailed",
        "template": {"metadata": {"labels": labels}, "spec": pod_template},
    }


def pod(containers: list[Object], **more: Any) -> Object:
    unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    return {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 5,
        "containers": containers,
        "tolerations": [{**unreachable, "tolerationSeconds": 0}],
        "volumes": [
            {"name": "shared", "persistentVolumeClaim": {"claimName": "shared"}},
            {"name": "work", "emptyDir": {"medium": "Memory"}},
        ],
        **more,
    }


def container(name: str, role: str, **more: Any) -> Object:
    return {
        "name": name,
        "image": "example/train:1",
        "command": ["python", str(WORKER), role, "/shared", str(NUM_WORKERS)],
        "env": [
            {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "HEAD", "value": f"{RUN}-head-0-0.{RUN}"},
        ],
        "volumeMounts": [{"name": "shared", "mountPath": "/shared"}, {"name": "work", "mountPath": "/work"}],
        "resources": {"requests": {"cpu": "1"}},
        **more,
    }


def below(root: Path) -> list[int]:
    """The processes whose environment or command names this cluster's folder."""
    found = []
    for process in psutil.process_iter():
        try:
            words = [*process.cmdline(), *process.environ().values()]
        except (psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
            continue
        if process.pid != os.getpid() and any(str(root) in word for word in words):
            found.append(process.pid)
    return found


@pytest.fixture
def here() -> Iterator[Job]:
    root = Path(tempfile.mkdtemp(prefix="ktp-"))
    memory = Path(tempfile.mkdtemp(prefix="ktp-", dir=settings.volume_root().parent))
    made = Job(root, memory)
    try:
        yield made
    finally:
        made.cluster.close()
        left = below(root)
        for folder in (root, memory):
            shutil.rmtree(folder)
        assert not left


def test_job_loses_container_pod_node_and_all_each_restart_is_the_smallest(here: Job) -> None:
    here.submit()
    first = here.wait_joined("start of all workers")
    assert len({pod["spec"]["nodeName"] for pod in here.workers().values()}) == NUM_WORKERS

    # A container: restarted in its pod, agent and volume stay, nobody else notices.
    name = here.workers()[0]["metadata"]["name"]
    run = here.cluster.run_of(SPACE, name)
    trainer, agent = run.container("trainer"), run.container("agent")
    assert trainer is not None
    assert agent is not None
    agent_pid = agent.pid()
    os.kill(trainer.pid() or 0, signal.SIGKILL)
    assert here.wait_joined("restart of a container", runs={0: 2}) == first
    status = here.workers()[0]["status"]
    assert status["containerStatuses"][0]["restartCount"] == 1
    assert status["containerStatuses"][0]["lastState"]["terminated"]["exitCode"] == 137
    assert agent.pid() == agent_pid

    # A pod: only its index is replaced.
    here.cluster.store.delete(POD, SPACE, here.workers()[1]["metadata"]["name"])
    second = here.wait_joined("replacement of a pod", runs={0: 2})
    assert {index for index in first if first[index] != second[index]} == {1}

    # A node: its index moves to another node, though its ghost stays.
    ghost = here.workers()[2]
    here.cluster.nodes.lose(ghost["spec"]["nodeName"])
    here.wait(lambda: here.uids().get(2, second[2]) != second[2], "new pod for the node's index")
    third = here.wait_joined("replacement of a node's pod", runs={0: 2})
    assert {index for index in second if second[index] != third[index]} == {2}
    assert here.workers()[2]["spec"]["nodeName"] != ghost["spec"]["nodeName"]
    found = here.cluster.store.get(POD, SPACE, ghost["metadata"]["name"])
    assert find_condition(found, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert here.jobset()["status"]["restarts"] == 0
    here.cluster.nodes.restore(ghost["spec"]["nodeName"])

    # Everything, as the head's verdict: all pods are made anew.
    (here.shared / "head-exit").write_text("75")
    here.wait(lambda: here.jobset()["status"]["restarts"] == 1, "restart of the JobSet")
    fourth = here.wait_joined("restart of everything")
    assert not set(third.values()) & set(fourth.values())

    (here.shared / "head-exit").write_text("0")
    here.wait(lambda: has_condition(here.jobset(), "Completed"), "end of the job")
    here.wait(lambda: here.jobs() == [f"{RUN}-head-0"], "end of the workers")
    assert not here.workers()


def test_job_all_nodes_lost_runs_again_when_they_come_back(here: Job) -> None:
    here.submit()
    first = here.wait_joined("start of all workers")
    nodes = {pod["spec"]["nodeName"] for pod in here.cluster.store.list(POD, SPACE).items}
    for name in nodes:
        here.cluster.nodes.lose(name)
    here.wait(lambda: not here.workers(), "loss of all nodes")
    for name in nodes:
        here.cluster.nodes.restore(name)
    second = here.wait_joined("return of all workers")
    assert not set(first.values()) & set(second.values())
    (here.shared / "head-exit").write_text("0")
    here.wait(lambda: has_condition(here.jobset(), "Completed"), "end of the job")


def test_job_that_does_not_fit_whole_does_not_start(here: Job) -> None:
    here.cluster.nodes.lose("n0")
    here.cluster.nodes.lose("n1")
    here.cluster.run_until(lambda: len(ready_nodes(here)) == 2, WAIT_S)
    here.submit()

    def refused() -> bool:
        group = here.cluster.store.get(POD_GROUP, SPACE, "workers")
        return has_condition(group, "PodGroupScheduled", "False")

    here.wait(refused, "refusal of the gang")
    assert not here.workers()
    here.cluster.nodes.restore("n0")
    here.wait_joined("start of the gang")


def ready_nodes(job: Job) -> list[str]:
    return [node["metadata"]["name"] for node in job.cluster.store.list(NODE).items if has_condition(node, "Ready")]

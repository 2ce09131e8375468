"""Anything may happen to a job's containers, pods and nodes, in any order; it runs as its policies say, to its end."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from ktrain.launcher.cluster.nodes import evict
from tests.unit.launcher.cluster.making import JOB, JOB_SET, POD, SPACE, Made, Object, job_spec, jobset_spec, pod_spec

NUM_WORKERS = 3
MOST_LOST = 2
MOST_RESTARTS = 2
INDEXES = st.integers(0, NUM_WORKERS - 1)
NODES = st.sampled_from(["n0", "n1", "n2", "n3"])
CODES = st.sampled_from([1, 74, 137])  # restarted in place; another pod; killed
GRACE_S = 30  # longer than a Job waits before it replaces a pod
LOST_S = 40 + 10  # silence and toleration
SETTLED_S = 700  # more than the longest back-off
SECONDS = st.sampled_from([0, 11, 31, LOST_S, SETTLED_S, SETTLED_S])


def jobset(replacement: str) -> Object:
    rules = [{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [0, 74]}}]
    container = {"restartPolicy": "Never", "restartPolicyRules": rules}
    agent: dict[str, Any] = {"name": "agent", "command": ["agent"], "restartPolicy": "Always"}
    unreachable = {"key": "node.kubernetes.io/unreachable", "operator": "Exists", "effect": "NoExecute"}
    pod = pod_spec(
        terminationGracePeriodSeconds=GRACE_S,
        container=container,
        initContainers=[agent],
        tolerations=[{**unreachable, "tolerationSeconds": 10}],
    )
    again = {"rules": [{"action": "FailJob", "onExitCodes": {"operator": "In", "values": [75]}}]}
    head = job_spec(1, backoffLimit=2**31 - 1, podFailurePolicy=again)
    workers = job_spec(NUM_WORKERS, pod=pod, backoffLimit=2**31 - 1, podReplacementPolicy=replacement)
    policy = {"operator": "All", "targetReplicatedJobs": ["head"]}
    restarts = {"maxRestarts": 100, "restartStrategy": "BlockingRecreate"}
    return jobset_spec(("head", head), ("worker", workers), successPolicy=policy, failurePolicy=restarts)


class Job(RuleBasedStateMachine):
    replacement = "TerminatingOrFailed"

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="ktrain-model-"))
        self.made = Made(self.folder, exit_on_terminate=None)  # only a kill ends what is asked to end
        self.lost: set[str] = set()
        self.restarts = 0

    def teardown(self) -> None:
        try:
            self.finish()
        finally:
            self.made.cluster.close()
            shutil.rmtree(self.folder)

    def alive(self, prefix: str) -> list[Object]:
        """The pods that run and are not on their way out."""
        return [
            pod
            for pod in self.made.pods(prefix)
            if pod["status"].get("phase") == "Running"
            and "deletionTimestamp" not in pod["metadata"]
            and pod["spec"]["nodeName"] not in self.lost
        ]

    def end(self, pod: Object, container: str, code: int) -> None:
        run = self.made.cluster.run_of(SPACE, pod["metadata"]["name"])
        root = run.places.pod / "logs" / container
        for process in self.made.runtime.running(container):
            if process.command.log.parent == root:
                process.exit(code)
        self.made.settle()

    # What may happen

    @initialize()
    def submit(self) -> None:
        self.made.create(JOB_SET, "a", jobset(self.replacement))

    @rule(index=INDEXES, code=CODES, container=st.sampled_from(["main", "agent"]), then_s=SECONDS)
    def container_ends(self, index: int, code: int, container: str, then_s: int) -> None:
        for pod in self.alive("a-worker")[index : index + 1]:
            self.end(pod, container, code)
        self.made.pass_time(then_s)

    @rule(index=INDEXES, how=st.sampled_from(["delete", "evict", "force"]), then_s=SECONDS)
    def pod_goes(self, index: int, how: str, then_s: int) -> None:
        for pod in self.alive("a-worker")[index : index + 1]:
            if how == "evict":
                evict(self.made.store, pod)
            else:
                grace_s = 0 if how == "force" else None
                self.made.store.delete(POD, SPACE, pod["metadata"]["name"], grace_s=grace_s)
        self.made.pass_time(then_s)

    @precondition(lambda self: len(self.lost) < MOST_LOST)
    @rule(name=NODES, then_s=SECONDS)
    def node_is_lost(self, name: str, then_s: int) -> None:
        if name not in self.lost:
            self.made.cluster.nodes.lose(name)
            self.lost.add(name)
        self.made.pass_time(then_s)

    @precondition(lambda self: bool(self.lost))
    @rule(then_s=SECONDS)
    def node_returns(self, then_s: int) -> None:
        name = min(self.lost)
        self.made.cluster.nodes.restore(name)
        self.lost.discard(name)
        self.made.pass_time(then_s)

    @precondition(lambda self: self.restarts < MOST_RESTARTS)
    @rule(then_s=SECONDS)
    def head_asks_for_all_anew(self, then_s: int) -> None:
        for pod in self.alive("a-head"):
            self.end(pod, "main", 75)
            self.restarts += 1
        self.made.pass_time(then_s)

    # What holds

    @invariant()
    def what_runs_is_bound_to_a_node_that_lives(self) -> None:
        pods = self.made.pods()
        bound = {pod["metadata"]["uid"]: pod["spec"].get("nodeName") for pod in pods}
        roots = set()
        for pod in pods:
            kubelet = self.made.cluster.nodes.kubelet_of(pod)
            run = kubelet.run_of(pod["metadata"]["uid"]) if kubelet is not None else None
            if run is not None:
                assert bound[pod["metadata"]["uid"]] not in self.lost
                roots.add(run.places.pod)
        running = self.made.runtime.running()
        assert {process.command.log.parents[2] for process in running} <= roots
        assert len({process.command.log.parent for process in running}) == len(running)

    @invariant()
    def an_index_has_one_pod_that_is_not_leaving(self) -> None:
        staying = [
            pod["spec"]["hostname"]
            for pod in self.made.pods()
            if "deletionTimestamp" not in pod["metadata"] and pod["status"]["phase"] in ("Pending", "Running")
        ]
        assert len(staying) == len(set(staying))

    @invariant()
    def under_policy_failed_an_index_has_one_pod_that_runs(self) -> None:
        if self.replacement == "Failed":
            running = [process.command.environment["HOSTNAME"] for process in self.made.runtime.running("main")]
            assert len(running) == len(set(running))

    @invariant()
    def restarts_are_those_that_the_head_asked_for(self) -> None:
        for jobset in self.made.store.list(JOB_SET).items:
            assert jobset["status"]["restarts"] == self.restarts
            assert "terminalState" not in jobset["status"]

    def finish(self) -> None:
        """When nodes are well again everything runs, and the head's word ends it."""
        while self.lost:
            self.node_returns(0)
        for _ in range(4):
            self.made.pass_time(SETTLED_S)
        assert len(self.alive("a-worker")) == NUM_WORKERS
        assert len(self.made.runtime.running("main")) == NUM_WORKERS + 1
        (head,) = self.alive("a-head")
        self.end(head, "main", 0)
        self.made.pass_time(GRACE_S)
        assert self.made.get(JOB_SET, "a")["status"]["terminalState"] == "Completed"
        assert not self.made.runtime.running()
        assert [job["metadata"]["name"] for job in self.made.store.list(JOB).items] == ["a-head-0"]


class JobOneAtATime(Job):
    replacement = "Failed"


@pytest.mark.slow
@pytest.mark.parametrize("machine", [Job, JobOneAtATime])
def test_local_cluster_any_order_of_losses(machine: type[Job]) -> None:
    phases = (Phase.explicit, Phase.generate, Phase.shrink)
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        machine, settings=settings(max_examples=10, stateful_step_count=15, phases=phases, deadline=None)
    )

"""Pods of a job on a cluster whose pods run: their first processes die at each point, and what runs below them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import psutil
import pytest

from ktrain.base import contract, events
from ktrain.launcher.backends.kubernetes.status import State
from ktrain.testing import invariants
from tests.integration import launch_worker
from tests.integration.cluster_jobs import Job, send, small_training, start

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600), pytest.mark.usefixtures("undumped")]

STEPS = 300
AGENT_DIES = "kill@pod.prepared,rank=1;kill@pod.begun,rank=1,epoch=2"
TRAINER_DIES = "kill@pod.prepared,rank=0;kill@pod.begun,rank=0,epoch=2;kill@pod.ended,rank=1"


def faulty(container: str, plan: str) -> dict[str, Any]:
    return {"name": container, "env": [{"name": contract.ENV_FAULTS, "value": plan}]}


def restarts(job: Job, index: int) -> int:
    return job.pod("worker", index).restarts


def await_newer(job: Job, tier: str) -> None:
    """Waits until a step that is not done yet is in a tier."""
    now = max(event["step"] for event in job.events("step"))
    job.await_that(f"newer {tier}", lambda: any(event["step"] > now for event in job.events("committed", tier=tier)))


def test_pods_whose_processes_die_at_every_point_of_their_life_go_on(tmp_path: Path) -> None:
    worker = {"initContainers": [faulty("agent", AGENT_DIES)], "containers": [faulty("trainer", TRAINER_DIES)]}
    with start() as running:
        job = send(
            running,
            tmp_path,
            small_training(tmp_path),
            command=["train.py", str(STEPS), "0.15"],
            limits={"patience_s": 20},
            overlay={"worker": worker},
        )
        job.await_event("committed", tier=contract.TIER_MEMORY)
        assert (restarts(job, 0), restarts(job, 1)) == (2, 2)

        (supervisor,) = psutil.Process(job.pid("worker", 1, "trainer")).children()
        supervisor.kill()
        job.await_event("attempt_started", attempt=2)
        job.await_event("committed", tier=contract.TIER_PEER, attempt=2)
        job.kill("worker", 0, "agent")
        job.kill("head", 0, "head")
        job.await_event("head_adopted", attempt=2)
        await_newer(job, contract.TIER_PEER)  # over the wire of the new head
        job.delete("worker", 1)
        job.await_event("attempt_started", attempt=3)
        assert restarts(job, 1) == 2, "the agent of the new pod died twice as well"
        ended = job.await_end()

        assert (ended.state, ended.exit_code, ended.restarts) == (State.DONE, contract.EXIT_OK, 0), job.describe()
        assert [event["tier"] for event in job.events("restored")] == [contract.TIER_MEMORY, contract.TIER_PEER]
        causes = [event["cause"] for event in job.events("failure")]
        assert causes == [contract.CAUSE_CRASH, contract.CAUSE_NODE_LOST]
        found = events.parse_lines((job.run / contract.EVENTS_FILE).read_bytes().splitlines())
        assert invariants.check_run(found, job.run) == []
        assert invariants.check_same_losses(found, launch_worker.reference(STEPS)) == []
        assert invariants.check_steps(found, STEPS) == []

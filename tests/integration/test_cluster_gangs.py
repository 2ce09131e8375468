"""What a job loses under each gang mechanism, and what is left to go on from: by small pods, without torch."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.launcher.backends.kubernetes.status import State
from ktrain.launcher.cluster.conditions import find_condition
from ktrain.launcher.cluster.resources import POD, VOLCANO_QUEUE
from ktrain.launcher.spec import GangKind
from ktrain.testing.fake_cluster.offer import Offer
from ktrain.testing.running_cluster import RunningCluster
from tests.integration.cluster_jobs import ALL_GO, CLAIM, CONTAINER_ENDS, NODE_GOES, PATH, POD_GOES, Job, send, start

pytestmark = [pytest.mark.slow, pytest.mark.timeout(200), pytest.mark.usefixtures("undumped")]

SMALL_POD = Path(__file__).with_name("small_pod.py")
GROUP = "scheduling.k8s.io"
GATES = {"GenericWorkload": True}


@dataclass(frozen=True)
class Mechanism:
    """A gang mechanism, and a cluster that has it."""

    kind: GangKind
    offer: Offer
    placement: dict[str, Any] = field(default_factory=dict)
    is_whole: bool = True  # some of its pods are never placed without the others
    reason: str = ""


MECHANISMS = {
    "native v1alpha2": Mechanism(
        GangKind.NATIVE, Offer("1.36", apis=frozenset({f"{GROUP}/v1alpha2"}), gates=GATES), reason="v1alpha2"
    ),
    "native v1alpha3": Mechanism(
        GangKind.NATIVE, Offer("1.37", apis=frozenset({f"{GROUP}/v1alpha3"}), gates=GATES), reason="v1alpha3"
    ),
    "native v1beta1": Mechanism(
        GangKind.NATIVE, Offer("1.37", apis=frozenset({f"{GROUP}/v1beta1"}), gates=GATES), reason="v1beta1"
    ),
    "volcano": Mechanism(GangKind.VOLCANO, Offer(volcano=True), {"queue": "default"}),
    "kai": Mechanism(GangKind.KAI, Offer(kai=True), {"queue": "default"}),
    "coscheduling": Mechanism(GangKind.COSCHEDULING, Offer(coscheduling=True), {"scheduler": "gangs"}),
    "barrier": Mechanism(GangKind.BARRIER, Offer(), is_whole=False),
}


def send_small(running: RunningCluster, folder: Path, mechanism: Mechanism) -> Job:
    """A job whose Python is a small program on its volume."""
    program = running.claim(CLAIM) / "python"
    program.parent.mkdir(parents=True)
    program.write_text(f"#!{sys.executable}\n{SMALL_POD.read_text()}")
    program.chmod(0o755)
    return send(running, folder, None, command=["none.py"], python=f"{PATH}/python", placement=mechanism.placement)


def restored(job: Job, index: int = 1) -> list[str | None]:
    """The tiers that a worker's trainers began with, in order."""
    path = job.run / "restored"
    said = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [item["tier"] for item in said if item["index"] == index]


def lose(job: Job, do: Callable[[], None], *indexes: int) -> list[str | None]:
    """Loses something once all that is kept is kept; returns the tier that each of these workers goes on from."""
    before = {index: len(restored(job, index)) for index in indexes}
    job.await_that("steps in the run", lambda: all((job.run / f"step-{index}").exists() for index in (0, 1)))
    await_kept(job)
    do()
    job.await_that("restart", lambda: all(len(restored(job, index)) > before[index] for index in indexes))
    return [restored(job, index)[-1] for index in indexes]


def await_kept(job: Job) -> None:
    """Every worker's agent has a step of the other's."""

    def kept() -> bool:
        pods = [pod for pod in job.pods("worker") if pod.ready]
        return len(pods) == 2 and all((job.volume(pod) / "kept").exists() for pod in pods)

    job.await_that("copies of both workers", kept)


def lose_whole(job: Job, lost: str, mechanism: Mechanism) -> None:
    """Takes all workers away when there is room for one alone: a gang waits until there is room for both."""
    second = job.lose_node("worker", 1)
    job.await_that("its next pod", lambda: [pod.node for pod in job.pods("worker")][1:] == [None])
    job.evict("worker", 0)
    if mechanism.is_whole:
        job.await_that("a refusal of both", lambda: refused(job) == 2)
        assert [pod.node for pod in job.pods("worker")] == [None, None]
    for node in (lost, second):
        job.running.restore(node)


def refused(job: Job) -> int:
    """How many workers' pods the scheduler found no place for."""
    pods = job.running.api.store.list(POD, job.spec.namespace, labels=f"{contract.LABEL_ROLE}=worker").items
    return sum(find_condition(pod, "PodScheduled").get("reason") == "Unschedulable" for pod in pods)


@pytest.mark.parametrize("name", MECHANISMS)
def test_small_job_goes_on_from_the_tiers_that_its_plan_promised_under(name: str, tmp_path: Path) -> None:
    mechanism = MECHANISMS[name]
    with start(offer=mechanism.offer) as running:
        if mechanism.offer.volcano:
            running.api.store.create(VOLCANO_QUEUE, {"metadata": {"name": "default"}, "spec": {}})
        job = send_small(running, tmp_path, mechanism)
        assert job.plan.gang.startswith(f"{mechanism.kind}: ") and mechanism.reason in job.plan.gang
        job.await_that("start", lambda: restored(job, 0) == restored(job, 1) == [None])

        assert lose(job, lambda: job.kill("worker", 1, "trainer"), 1) == [job.promised(CONTAINER_ENDS)]
        assert lose(job, lambda: job.evict("worker", 1), 1) == [job.promised(POD_GOES)]
        lost = job.pod("worker", 1).node or ""
        assert lose(job, lambda: running.lose(lost), 1) == [job.promised(NODE_GOES)]
        assert lose(job, lambda: lose_whole(job, lost, mechanism), 0, 1) == [job.promised(ALL_GO)] * 2

        (job.run / "finish").touch()
        ended = job.await_end()
        assert (ended.state, ended.exit_code, ended.restarts) == (State.DONE, contract.EXIT_OK, 0), job.describe()

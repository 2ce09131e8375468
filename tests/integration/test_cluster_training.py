"""Whole training jobs through the Kubernetes backend to a cluster whose pods run, and what they lose on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ktrain.base import contract, events
from ktrain.launcher.backends.kubernetes.status import State
from ktrain.launcher.code.archive import CodeArchive, pack_code
from ktrain.launcher.spec import GangKind
from ktrain.testing import invariants
from ktrain.testing.fake_cluster.offer import Offer
from tests.integration import cluster_jobs, launch_worker
from tests.integration.cluster_jobs import (
    CONTAINER_ENDS,
    HELPER_ENDS,
    NODE_GOES,
    POD_GOES,
    PREEMPTED,
    Job,
    send,
    small_training,
    start,
)
from tests.integration.test_running_cluster import Client
from tests.integration.test_running_cluster_gangs import SETS, jobset

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_text_gpt.py"
STEPS = 120
TINY = "--layers 1 --width 32 --heads 2 --context 32 --global-batch 8 --megabytes 1 --every 5 --no-check".split()


def text_model(folder: Path) -> CodeArchive:
    """The text model of the examples, whose steps take their time while the run has a file `slow`."""
    code, update = folder / "code", "            step.update(optimizer, clip=1.0)\n"
    code.mkdir()
    text = EXAMPLE.read_text()
    assert text.count(update) == 1
    wait = '            if Path(args.run, "slow").exists():\n                __import__("time").sleep(0.2)\n'
    (code / "train.py").write_text(text.replace(update, update + wait))
    return pack_code(code)


def test_cluster_training_without_an_agent_and_its_head_for_a_while_goes_on(tmp_path: Path) -> None:
    command, limits = ["train.py", "80", "0.15"], {"patience_s": 20}
    with start() as running:
        job = send(running, tmp_path, small_training(tmp_path), command=command, limits=limits)
        assert job.promised(HELPER_ENDS) is None
        job.await_event("step", step=5)
        job.kill("worker", 0, "agent")
        job.delete("head")
        job.await_event("head_adopted", attempt=1)
        ended = job.await_end()

        assert (ended.state, ended.exit_code, ended.restarts) == (State.DONE, contract.EXIT_OK, 0), job.describe()
        assert restored(job) == []
        expected = launch_worker.reference(80)
        assert [(event["step"], event["loss"]) for event in job.events("step")] == sorted(expected.items())
        assert list((job.run / contract.CHECKPOINTS_DIR).glob("step-00000080/commit-*"))


def test_cluster_training_of_a_script_that_is_not_there_fails_at_once_as_bad_input(tmp_path: Path) -> None:
    with start() as running:
        job = send(running, tmp_path, small_training(tmp_path), command=["absent.py"], limits={"patience_s": 20})
        ended = job.await_end()

        assert (ended.state, ended.exit_code) == (State.FAILED, contract.EXIT_USAGE), job.describe()
        assert "absent.py" in job.events("run_ended")[0]["reason"]


def restored(job: Job) -> list[str]:
    return [event["tier"] for event in job.events("restored")]


def spent(job: Job) -> dict[str, int]:
    """What the job's failures have cost so far, as a new head would read it."""
    found: dict[str, int] = json.loads((job.run / contract.HEAD_FILE).read_text())["budgets"]["spent"]
    return found


def lose(job: Job, failure: str, tier: str) -> None:
    """Loses something once the newest step is in a tier; returns when the job has gone on from a tier."""
    attempt, number = max(event["attempt"] for event in job.events("attempt_started")), len(restored(job))
    job.await_event("committed", tier=tier, attempt=attempt)
    node = None
    if failure == CONTAINER_ENDS:
        job.kill("worker", 1, "trainer")
    elif failure == POD_GOES:
        job.delete("worker", 1)
    elif failure == NODE_GOES:
        node = job.lose_node("worker", 0)
    else:
        preempt(job)
    job.await_that(f"restored after: {failure}", lambda: len(restored(job)) > number)
    if node is not None:
        job.running.restore(node)  # empty; its old pod, which nobody could end, is gone now


def preempt(job: Job) -> None:
    """Another job takes the whole queue, and leaves it when nothing of ours runs any more."""
    client, queued = Client(job.running), {"kueue.x-k8s.io/queue-name": cluster_jobs.QUEUE}
    client.send("POST", SETS, jobset("other", "exec sleep 600", labels=queued, priorityClassName=cluster_jobs.FIRST))
    job.await_that("preemption", lambda: job.status().state is State.PREEMPTED)
    job.await_that("end of the pods", lambda: not job.status().pods)
    client.send("DELETE", f"{SETS}/other")


def test_text_model_in_a_queue_goes_on_from_the_tiers_that_its_plan_promised(tmp_path: Path) -> None:
    with start(offer=Offer(kueue=True)) as running:
        cluster_jobs.add_queue(running, cpus=4)
        slow = running.claim(cluster_jobs.CLAIM) / "small" / "slow"
        slow.parent.mkdir(parents=True)
        slow.touch()
        command = ["train.py", *TINY, "--steps", str(STEPS)]
        limits, placement = {"patience_s": 20}, {"queue": cluster_jobs.QUEUE}
        job = send(running, tmp_path, text_model(tmp_path), command=command, limits=limits, placement=placement)
        assert job.plan.gang.startswith(f"{GangKind.KUEUE}: ")
        job.await_event("attempt_started")

        lose(job, CONTAINER_ENDS, contract.TIER_MEMORY)
        lose(job, POD_GOES, contract.TIER_PEER)
        lose(job, NODE_GOES, contract.TIER_PEER)
        before = spent(job)
        lose(job, PREEMPTED, contract.TIER_BUCKET)
        slow.unlink()
        ended = job.await_end()

        assert (ended.state, ended.exit_code, ended.restarts) == (State.DONE, contract.EXIT_OK, 0), job.describe()
        assert restored(job) == [job.promised(each) for each in (CONTAINER_ENDS, POD_GOES, NODE_GOES, PREEMPTED)]
        assert spent(job) == before == {contract.CAUSE_CRASH: 1, contract.CAUSE_NODE_LOST: 2}
        found = events.parse_lines((job.run / contract.EVENTS_FILE).read_bytes().splitlines())
        assert invariants.check_run(found, job.run) == []
        assert invariants.check_steps(found, STEPS) == []

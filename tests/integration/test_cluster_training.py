"""Whole training jobs through the Kubernetes backend to a cluster whose pods run, and what they lose on the way."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrain.base import contract, events
from ktrain.base.events import Event
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

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400), pytest.mark.usefixtures("undumped")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "01_text_gpt.py"
STEPS = 120
TINY = "--layers 1 --width 32 --heads 2 --context 32 --global-batch 8 --megabytes 1 --every 5 --no-check".split()


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
        assert invariants.check_same_losses(parsed(job), launch_worker.reference(80)) == []
        assert invariants.check_steps(parsed(job), 80) == []
        assert list((job.run / contract.CHECKPOINTS_DIR).glob("step-00000080/commit-*"))


def test_cluster_training_of_a_script_that_is_not_there_fails_at_once_as_bad_input(tmp_path: Path) -> None:
    with start() as running:
        job = send(running, tmp_path, small_training(tmp_path), command=["absent.py"], limits={"patience_s": 20})
        ended = job.await_end()

        assert (ended.state, ended.exit_code) == (State.FAILED, contract.EXIT_USAGE), job.describe()
        assert "absent.py" in job.events("run_ended")[0]["reason"]


def restored(job: Job) -> list[str]:
    return [event["tier"] for event in job.events("restored")]


def parsed(job: Job) -> list[Event]:
    return events.parse_lines((job.run / contract.EVENTS_FILE).read_bytes().splitlines())


# One job of the text model, in a queue: the tests below take things from it, one after the other.


@pytest.fixture(scope="module")
def text_job(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Job]:
    """The job, in its first attempt; its steps take their time while its run has a file `slow`."""
    folder = tmp_path_factory.mktemp("text")
    with start(offer=Offer(kueue=True)) as running:
        cluster_jobs.add_queue(running, cpus=4)
        slow = running.claim(cluster_jobs.CLAIM) / "small" / "slow"
        slow.parent.mkdir(parents=True)
        slow.touch()
        command, placement = ["train.py", *TINY, "--steps", str(STEPS)], {"queue": cluster_jobs.QUEUE}
        limits = {"patience_s": 20}
        job = send(running, folder, text_model(folder), command=command, limits=limits, placement=placement)
        job.await_event("attempt_started")
        yield job


def text_model(folder: Path) -> CodeArchive:
    code, update = folder / "code", "            step.update(optimizer, clip=1.0)\n"
    code.mkdir()
    text = EXAMPLE.read_text()
    assert text.count(update) == 1
    wait = '            if Path(args.run, "slow").exists():\n                __import__("time").sleep(0.2)\n'
    (code / "train.py").write_text(text.replace(update, update + wait))
    return pack_code(code)


def lose(job: Job, tier: str, take: Callable[[], object]) -> dict[str, int]:
    """Takes something away once a step of this attempt is in a tier; waits for the next restore; returns its cost."""
    before, number = spent(job), len(restored(job))
    attempt = max(event["attempt"] for event in job.events("attempt_started"))
    job.await_event("committed", tier=tier, attempt=attempt)
    take()
    job.await_that("the next restore", lambda: len(restored(job)) > number)
    after = spent(job)
    return {cause: after[cause] - before.get(cause, 0) for cause in after if after[cause] != before.get(cause, 0)}


def spent(job: Job) -> dict[str, int]:
    """What the job's failures have cost so far, as a new head would read it."""
    found: dict[str, int] = json.loads((job.run / contract.HEAD_FILE).read_text())["budgets"]["spent"]
    return found


def test_text_model_that_loses_a_container_goes_on_from_the_promised_tier(text_job: Job) -> None:
    cost = lose(text_job, contract.TIER_MEMORY, lambda: text_job.kill("worker", 1, "trainer"))

    assert (restored(text_job)[-1], cost) == (text_job.promised(CONTAINER_ENDS), {contract.CAUSE_CRASH: 1})


def test_text_model_that_loses_a_pod_goes_on_from_the_promised_tier(text_job: Job) -> None:
    cost = lose(text_job, contract.TIER_PEER, lambda: text_job.delete("worker", 1))

    assert (restored(text_job)[-1], cost) == (text_job.promised(POD_GOES), {contract.CAUSE_NODE_LOST: 1})


def test_text_model_that_loses_a_node_goes_on_from_the_promised_tier(text_job: Job) -> None:
    node = text_job.pod("worker", 0).node
    assert node is not None
    cost = lose(text_job, contract.TIER_PEER, lambda: text_job.running.lose(node))
    text_job.running.restore(node)  # empty; its old pod, which nobody could end, is gone now

    assert (restored(text_job)[-1], cost) == (text_job.promised(NODE_GOES), {contract.CAUSE_NODE_LOST: 1})


def test_text_model_that_is_preempted_goes_on_from_the_promised_tier_and_has_not_crashed(text_job: Job) -> None:
    assert text_job.plan.gang.startswith(f"{GangKind.KUEUE}: ")
    cost = lose(text_job, contract.TIER_BUCKET, lambda: preempt(text_job))

    assert restored(text_job)[-1] == text_job.promised(PREEMPTED)
    assert contract.CAUSE_CRASH not in cost


def preempt(job: Job) -> None:
    """Another job takes the whole queue, and leaves it when nothing of ours runs any more."""
    client, queued = Client(job.running), {"kueue.x-k8s.io/queue-name": cluster_jobs.QUEUE}
    client.send("POST", SETS, jobset("other", "exec sleep 600", labels=queued, priorityClassName=cluster_jobs.FIRST))
    job.await_that("preemption", lambda: job.status().state is State.PREEMPTED)
    job.await_that("end of the pods", lambda: not job.status().pods)
    client.send("DELETE", f"{SETS}/other")


def test_text_model_that_lost_so_much_ends_with_every_step_done_the_same_way(text_job: Job) -> None:
    (text_job.run / "slow").unlink()
    ended = text_job.await_end()

    assert (ended.state, ended.exit_code, ended.restarts) == (State.DONE, contract.EXIT_OK, 0), text_job.describe()
    assert invariants.check_run(parsed(text_job), text_job.run) == []
    assert invariants.check_steps(parsed(text_job), STEPS) == []

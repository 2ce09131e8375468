"""The processes of a rendered job, as its manifests start them: trained to the end, through deaths of containers."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from tests.integration import launch_worker
from tests.integration.launching import Place, place
from tests.integration.pods import Cluster, cluster

pytestmark = pytest.mark.timeout(400)
STEPS = 80


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        yield made


@pytest.fixture
def pods(here: Place) -> Iterator[Cluster]:
    code = here.root / "code"
    code.mkdir()
    shutil.copy(Path(launch_worker.__file__), code / "train.py")
    limits = {"patience_s": 20.0}
    with cluster(here, ["train.py", str(STEPS), "0.15"], code, nodes=2, limits=limits) as made:
        for pod in (made.head, *made.workers):
            made.create(pod)
        yield made


def await_step(pods: Cluster, step: int) -> None:
    def there() -> bool:
        assert pods.tend() is None, pods.logs()
        return any(event["step"] >= step for event in pods.here.events("step"))

    pods.here.await_that(f"step {step}", there)


def assert_same_losses(here: Place) -> None:
    expected = launch_worker.reference(STEPS)
    found = [(event["step"], event["loss"]) for event in here.events("step")]
    assert {step for step, _ in found} == set(expected)
    assert [pair for pair in found if pair[1] != expected[pair[0]]] == []


@pytest.mark.slow
def test_pods_lose_a_trainer_and_an_agent_resume_from_memory(pods: Cluster, here: Place) -> None:
    await_step(pods, 10)
    pods.workers[1].processes["trainer"].send_signal(signal.SIGKILL)
    here.await_that("the second attempt", lambda: (pods.tend(), len(here.events("restored")) == 1)[1])
    await_step(pods, max(event["step"] for event in here.events("step")) + 10)
    pods.workers[0].processes["agent"].send_signal(signal.SIGKILL)

    assert pods.run() == contract.EXIT_OK, pods.logs()

    assert [event["tier"] for event in here.events("restored")] == ["memory"]
    assert [event["cause"] for event in here.events("failure")] == [contract.CAUSE_CRASH]
    assert here.events("failure")[0]["node"] == "node-1"
    assert [event["node"] for event in here.events("agent_lost")] in ([], ["node-0"])
    assert_same_losses(here)
    for pod in pods.workers:
        assert pod.processes["trainer"].wait(30) == contract.EXIT_OK
        assert pods.end(pod, signal.SIGTERM)["agent"] == contract.EXIT_OK
    here.await_nothing_left()

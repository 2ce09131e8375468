"""Faults under a real launch with a Checkpointer: resumed from the tier that is left, with the same losses."""

from __future__ import annotations

import fcntl
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from tests.integration import launch_worker
from tests.integration.launching import Place, place

pytestmark = pytest.mark.timeout(400)


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(launch_worker.__file__), made.script)
        yield made


def assert_same_losses(here: Place, steps: int) -> None:
    """Every occurrence of every step has the loss of a run that nobody touched, bit for bit."""
    expected = launch_worker.reference(steps)
    found = [(event["step"], event["loss"]) for event in here.events("step")]
    assert {step for step, _ in found} == set(expected)
    assert [pair for pair in found if pair[1] != expected[pair[0]]] == []


@pytest.mark.slow
def test_launch_loses_worker_node_and_all_resumes_from_the_tier_that_is_left(here: Place) -> None:
    plan = ("kill-worker@step=10,rank=1", "lose-node@step=30,node=1,after=peer", "lose-all@step=50,after=bucket")
    options = [part for spec in plan for part in ("--fault", spec)]

    code = here.end(here.launch("--nodes", "2", *options, args=("80", "0.15")))

    assert code == contract.EXIT_OK, here.output()
    causes = [event["cause"] for event in here.events("failure")]
    assert causes == [contract.CAUSE_CRASH, contract.CAUSE_NODE_LOST, contract.CAUSE_ALL_LOST]
    assert [event["tier"] for event in here.events("restored")] == ["memory", "peer", "bucket"]
    assert [event["spec"] for event in here.events("fault_injected")] == list(plan)
    assert sum(event["wire_bytes"] for event in here.events("restored")) > 0, "the peer's bytes crossed the transport"
    assert_same_losses(here, 80)
    here.await_nothing_left()
    assert here.leftovers() == []


@pytest.mark.slow
def test_launch_worker_stopped_is_named_and_replaced_while_head_and_agent_die(here: Place) -> None:
    plan = ("kill-head@step=10", "kill-agent@step=20,node=0", "stop-worker@step=30,rank=1")
    options = [part for spec in plan for part in ("--fault", spec)]

    code = here.end(here.launch("--workers-per-node", "2", "--patience", "6", *options, args=("60", "0.1")))

    assert code == contract.EXIT_OK, here.output()
    (failure,) = here.events("failure")
    assert (failure["cause"], failure["rank"]) == (contract.CAUSE_HANG, 1)
    assert "silent" in failure["reason"]
    assert here.events("head_adopted") and here.events("agent_lost")
    assert_same_losses(here, 60)
    here.await_nothing_left()
    assert here.leftovers() == []


@pytest.mark.slow
def test_launch_interrupted_saves_the_step_and_the_same_command_continues(here: Place) -> None:
    first = here.launch(args=("60", "0.1"))
    here.await_that("step 12", lambda: any(event["step"] >= 12 for event in here.events("step")))

    first.send_signal(signal.SIGTERM)
    assert here.end(first) == contract.EXIT_STOPPED
    stopped_at = here.events("run_ended")[0]["step"]
    assert stopped_at == max(event["step"] for event in here.events("step"))

    assert here.end(here.launch(args=("60", "0"))) == contract.EXIT_OK
    assert [event["step"] for event in here.events("restored")] == [stopped_at]
    assert_same_losses(here, 60)
    here.await_nothing_left()
    assert here.leftovers() == []


@pytest.mark.slow
def test_launch_that_cannot_free_its_volume_says_so_and_succeeds(here: Place) -> None:
    launch = here.launch("--patience", "120", args=("30", "0.1"))
    here.await_that("a snapshot", lambda: here.events("committed"))
    with open(next(here.volume.rglob("slot-0.lease"))) as lease:
        fcntl.flock(lease, fcntl.LOCK_SH)  # a reader of another program, that stays
        code = here.end(launch)

    assert code == contract.EXIT_OK, here.output()
    assert any("freed its volume" in event["message"] for event in here.events("notice"))
    assert_same_losses(here, 30)
    here.await_nothing_left()


@pytest.mark.slow
def test_launch_with_a_spare_loses_a_node_and_the_spare_goes_on_from_its_peers(here: Place) -> None:
    lost = "lose-node@step=20,node=1,after=peer"

    code = here.end(here.launch("--nodes", "2", "--spares", "1", "--fault", lost, args=("50", "0.1")))

    assert code == contract.EXIT_OK, here.output()
    nodes = [event["nodes"] for event in here.events("attempt_started")]
    assert nodes == [{"node-0": [0], "node-1": [1]}, {"node-0": [0], "node-2": [1]}]
    assert [event["cause"] for event in here.events("failure")] == [contract.CAUSE_NODE_LOST]
    assert [event["tier"] for event in here.events("restored")] == [contract.TIER_PEER]
    assert_same_losses(here, 50)
    here.await_nothing_left()
    assert here.leftovers() == []

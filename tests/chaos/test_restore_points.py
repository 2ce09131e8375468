"""An agent dies at a named moment of a restore, in the second launch of a run."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator

import pytest

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.testing import invariants
from tests.chaos import harness
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]


@pytest.fixture
def stopped() -> Iterator[Place]:
    """A run on two nodes that was asked to stop, with its last step in every tier."""
    with place() as here:
        harness.put_script(here)
        launch = here.launch("--nodes", "2", "--patience", "60", args=(str(harness.MANY_STEPS), "0.1"))
        here.await_that("a commit", lambda: harness.newest_committed(here, contract.TIER_BUCKET) > 0)
        launch.send_signal(signal.SIGTERM)
        assert here.end(launch) == contract.EXIT_STOPPED, here.output()
        harness.release(here)  # one step more is enough
        yield here


def test_restore_whose_agent_dies_as_it_fills_takes_the_step_from_the_bucket(stopped: Place) -> None:
    newest = harness.newest_step(stopped)
    for folder in stopped.volume.iterdir():
        shutil.rmtree(folder)

    # Three ranks cut what two have stored, so that two nodes want some of rank 0's: one brings it near for both.
    plan = {"KTRAIN_FAULTS": "kill@restore.fill,rank=0,epoch=2", "KTRAIN_RESTORE_SPREAD": "always"}
    launch = stopped.launch("--nodes", "3", "--patience", "10", args=(str(harness.MANY_STEPS), "0"), **plan)
    agents = agents_of(stopped, launch)

    assert stopped.end(launch) == contract.EXIT_OK, stopped.output(1)
    assert [event.fields["step"] for event in harness.of_kind(stopped, "restored")] == [newest]
    assert harness.of_kind(stopped, "failure") == [], "no rank fails with the agent"
    assert invariants.check_run(harness.read_events(stopped), stopped.run) == []
    assert harness.await_nothing_runs(stopped) == []
    assert len(agents) > 3, "an agent died and came back"


def agents_of(here: Place, launch: subprocess.Popen[str]) -> set[int]:
    """All agents that a launch had until it ended."""
    found: set[int] = set()
    deadline = Deadline.after(150.0)
    while launch.poll() is None and not deadline.expired():
        found |= {process.pid for process in here.processes("ktrain.run.agent ")}
        SYSTEM_CLOCK.sleep(0.2)
    return found

"""Somebody asks a run on two nodes to stop, or starts it twice: the step is saved, and the same command continues."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from ktrain.base import contract
from tests.chaos import harness
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(400)]

ARGS = (str(harness.MANY_STEPS), "0.1")


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        harness.put_script(made)
        yield made


def await_steps(here: Place) -> None:
    here.await_that("step 12", lambda: harness.newest_step(here) >= 12)


def continue_from(here: Place, stopped_at: int) -> None:
    """The same command continues at the step at which the run was stopped."""
    launch = here.launch("--nodes", "2", args=ARGS)
    here.await_that("steps", lambda: harness.newest_step(here) > stopped_at)
    harness.release(here)
    assert here.end(launch) == contract.EXIT_OK, here.output(len(here.launches) - 1)
    assert [event.fields["step"] for event in harness.of_kind(here, "restored")] == [stopped_at]
    steps = [event.fields["step"] for event in harness.of_kind(here, "step")]
    assert steps == list(range(1, len(steps) + 1)), "no step was computed twice"
    harness.check(here)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "sigterm"])
def test_launch_asked_by_signal_saves_and_continues(here: Place, signum: signal.Signals) -> None:
    first = here.launch("--nodes", "2", args=ARGS)
    await_steps(here)

    first.send_signal(signum)

    assert here.end(first) == contract.EXIT_STOPPED, here.output()
    assert harness.await_nothing_runs(here) == []
    (ended,) = harness.of_kind(here, "run_ended")
    assert (ended.fields["outcome"], ended.fields["exit_code"]) == ("stopped", contract.EXIT_STOPPED)
    assert ended.fields["step"] == harness.newest_step(here) == harness.newest_committed(here, contract.TIER_BUCKET)
    continue_from(here, ended.fields["step"])


def test_launch_live_twice_is_refused_and_cancel_saves(here: Place) -> None:
    first = here.launch("--nodes", "2", args=ARGS)
    await_steps(here)

    assert here.end(here.launch("--nodes", "2", args=ARGS)) == contract.EXIT_CONFLICT
    assert str(first.pid) in here.output(1)

    cancelled = here.ktrain("cancel", str(here.run))
    assert cancelled.returncode == contract.EXIT_OK
    assert here.end(first) == contract.EXIT_STOPPED
    stopped_at = harness.newest_step(here)
    assert f"(step {stopped_at})" in cancelled.stdout
    continue_from(here, stopped_at)


def test_launch_detached_is_seen_cancelled_and_continued(here: Place) -> None:
    assert here.end(here.launch("--detach", "--nodes", "2", args=ARGS)) == contract.EXIT_OK
    await_steps(here)
    assert "live, running, attempt 1" in here.ktrain("status", str(here.run)).stdout

    assert here.ktrain("cancel", str(here.run)).returncode == contract.EXIT_OK

    assert harness.await_nothing_runs(here) == []
    continue_from(here, harness.newest_step(here))

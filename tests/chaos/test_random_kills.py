"""SIGKILL from outside to any process of a launch at random moments: the run ends well, with the losses of no fault.

Each case prints its kills; `--seed` repeats the choice of moments and roles (what runs at a moment is up to the
machine).
"""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator

import pytest

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK
from ktrain.testing import invariants
from ktrain.testing.invariants import FoundProcess
from tests.chaos import harness
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(900)]

KILLS = 4  # of each run
ROLES = {
    "head": ("ktrain.run.head",),
    "agent": ("ktrain.run.agent",),
    "supervisor": ("ktrain.run.supervisor",),
    "worker": ("ktrain.run.worker",),
    "wire": ("ktrain.replicate", "raylet", "gcs_server", "ray::", "/ray/"),
    "launcher": ("ktrain.cli.main launch",),
}
OPTIONS = ("--nodes", "2", "--max-restarts", "50", "--patience", "60")


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        harness.put_script(made)
        yield made


def find(here: Place, role: str) -> list[FoundProcess]:
    found = invariants.find_processes(str(here.root))
    return sorted((one for one in found if any(name in one.command for name in ROLES[role])), key=lambda one: one.pid)


class Killer:
    """Sends the kills of one run and keeps the run going."""

    def __init__(self, here: Place, seed: int) -> None:
        self._here = here
        self._random = random.Random(seed)
        self._args = (str(harness.MANY_STEPS), "0.05")
        self.done: list[str] = []
        self.launch = here.launch(*OPTIONS, args=self._args)

    def kill_one(self) -> None:
        """Waits for a random moment and kills a random process."""
        role, delay_s = self._random.choice(sorted(ROLES)), self._random.uniform(0.2, 6.0)
        SYSTEM_CLOCK.sleep(delay_s)
        found = self._here.await_that(f"a process of role {role}", lambda: find(self._here, role))
        victim = self._random.choice(found)
        try:
            os.kill(victim.pid, signal.SIGKILL)
        except ProcessLookupError:
            return  # it was faster; the next kill counts
        when = f"at step {harness.newest_step(self._here)} after {delay_s:.2f} s"
        said = f"{role} {victim.pid} {when}: {victim.command[:90]}"
        self.done.append(said)
        print(said, flush=True)
        if role == "launcher":
            assert self.launch.wait(30) == -signal.SIGKILL
            assert harness.await_nothing_runs(self._here) == []
            self.launch = self._here.launch(*OPTIONS, args=self._args)

    def await_progress(self) -> None:
        """A run that is never let go on ends with a verdict, and rightly so: three failures without a new commit."""
        before = harness.newest_committed(self._here, contract.TIER_MEMORY)
        self._here.await_that(
            f"a commit beyond step {before}",
            lambda: harness.newest_committed(self._here, contract.TIER_MEMORY) > before,
        )


@pytest.mark.parametrize("case", range(5))
def test_launch_processes_killed_at_random_moments_ends_with_the_same_losses(here: Place, seed: int, case: int) -> None:
    killer = Killer(here, seed)
    print(f"case {case}, seed {seed}", flush=True)
    while len(killer.done) < KILLS:
        killer.kill_one()
        if len(killer.done) % 2 == 0:
            killer.await_progress()

    harness.release(here)
    assert here.end(killer.launch) == contract.EXIT_OK, here.output(len(here.launches) - 1)

    harness.check(here)

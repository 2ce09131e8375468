"""Any process of a launch is killed from outside at random moments; the run goes on, with the same losses."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.base import contract
from ktrain.base.clock import SYSTEM_CLOCK
from tests.integration import launch_worker
from tests.integration.launching import Place, place

KILLS = 20
ROLES = ("worker", "supervisor", "agent", "head", "launcher")
OPTIONS = ("--nodes", "2", "--max-restarts", "1000", "--patience", "20")


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        shutil.copy(Path(launch_worker.__file__), made.script)
        yield made


def newest_commit(here: Place) -> int:
    return max((event["step"] for event in here.events("committed")), default=0)


@pytest.mark.chaos
@pytest.mark.timeout(1800)
def test_launch_processes_killed_at_random_moments_end_with_the_same_losses(here: Place) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}")  # shown when the test fails
    dice = random.Random(seed)
    steps = 400
    args = (str(steps), "0.1")
    launch = here.launch(*OPTIONS, args=args)
    without_progress = 0
    for number in range(KILLS):
        before = newest_commit(here)
        if without_progress >= 1:  # three failures in a row without progress are, rightly, the end of a run
            here.await_that(f"a commit after kill {number}", lambda before=before: newest_commit(here) > before)
            without_progress = 0
        SYSTEM_CLOCK.sleep(dice.uniform(0.0, 4.0))
        if launch.poll() is not None:
            break
        without_progress = 0 if newest_commit(here) > before else without_progress + 1
        role = dice.choice(ROLES)
        print(f"kill {number}: {role} at step {newest_commit(here)}")
        if role == "launcher":
            launch.kill()
            launch.wait()
            launch = here.launch(*OPTIONS, args=args)
            continue
        found = here.processes(f"ktrain.run.{role} ")
        if found:
            os.kill(dice.choice(found).pid, signal.SIGKILL)

    code = launch.wait(600)

    assert code == contract.EXIT_OK, here.output(len(here.launches) - 1)
    expected = launch_worker.reference(steps)
    wrong = [event for event in here.events("step") if event["loss"] != expected[event["step"]]]
    assert wrong == []
    here.await_nothing_left()
    assert here.leftovers() == []

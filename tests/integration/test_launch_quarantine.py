"""A launch whose newest step is poison: two failures from it, then an older step, within one launch."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ktrain.base import contract
from tests.integration.launching import Place, place

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCRIPT = """
import os
import time
import torch
import ktrain

def await_that(holds):
    deadline = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)

class Health:
    poisoned = False
    def state_dict(self):
        return {"poisoned": self.poisoned}
    def load_state_dict(self, state):
        self.poisoned = state["poisoned"]

health, weight = Health(), torch.zeros(8)
ckpt = ktrain.Checkpointer(state={"health": health, "weight": torch.nn.ParameterList([weight])}, every=5)
for step in range(ckpt.restore() + 1, 21):
    if step == 8 and os.environ["KTRAIN_EPOCH"] == "1":
        health.poisoned = True
    if step == 13 and health.poisoned:
        raise ValueError("the weights have diverged")
    ckpt.step(step, loss=1.0 / step)
    if step % 5 == 0:  # these steps take no time, a save takes some
        await_that(lambda: ckpt.committed.get("memory") == step)
ckpt.close()
"""


@pytest.fixture
def here() -> Iterator[Place]:
    with place() as made:
        made.script.write_text(SCRIPT)
        yield made


def test_launch_step_that_fails_twice_is_set_aside_and_the_job_succeeds_from_an_older_one(here: Place) -> None:
    code = here.end(here.launch())

    assert code == contract.EXIT_OK, here.output()
    assert [event["step"] for event in here.events("restored")] == [10, 10, 5]
    (said,) = [event for event in here.events("quarantined") if event["step"] is not None]
    assert (said["step"], said["epoch"], said["attempts"]) == (10, 1, [2, 3])
    assert "set aside: step 10 of epoch 1" in here.output()
    ends = [event.get("own_fault") for event in here.events("attempt_ended")]
    assert ends == [True, True, True, False]
    here.await_nothing_left()
    assert here.leftovers() == []

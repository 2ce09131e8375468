"""One process in plain python: killed anywhere, it goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from ktrain.base.faults import POINTS
from ktrain.testing.fault_plan import FaultPlan
from tests.integration.plain import Place, same_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
IN_EVERY_RUN = ("save.staged", "save.sealed", "drain.manifest", "commit.record")
# A plain run has no disk tier, no peers, one rank and no pod: test_disks.py, test_launch_spread.py, tests/chaos, and
# the fault matrix.
NOT_IN_A_PLAIN_RUN = (
    "disk.doomed", "disk.manifest", "restore.fill", "replica.pull", "read.parts",
    "code.archive", "code.record", "code.fetched", "log.part", "pod.prepared", "pod.begun", "pod.ended",
)  # fmt: skip
BEFORE_THE_FIRST_COMMIT = (  # or it may be
    "drain.payload", "drain.manifest", "commit.begin", "commit.record", "save.begin", "step", "events.taken",
    "events.logged",
)  # fmt: skip
KILLED = -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """A run that was never disturbed."""
    place = Place(tmp_path_factory.mktemp("whole"))
    outcome = place.train()
    assert outcome.code == 0, outcome.err
    return place


def test_plain_run_that_succeeds_frees_its_memory_and_leaves_its_last_step(whole: Place) -> None:
    assert [path for path in whole.volume.rglob("*") if path.is_file()] == []
    assert list(whole.run.glob("checkpoints/step-00000010/commit-*.json"))
    assert whole.events("run_ended")[0].fields["outcome"] == "succeeded"


def points() -> list[object]:
    there = [point for point in POINTS if point not in NOT_IN_A_PLAIN_RUN]
    return [point if point in IN_EVERY_RUN else pytest.param(point, marks=pytest.mark.chaos) for point in there]


@pytest.mark.parametrize("point", points())
def test_plain_run_killed_resumes_bit_for_bit(point: str, whole: Place, tmp_path: Path) -> None:
    place = Place(tmp_path)
    in_restore = point.startswith("restore.")
    plan = FaultPlan().fail_at("step", step=7) if in_restore else FaultPlan().fail_at(point)
    is_of_save = point in ("step", "save.begin", "save.copying", "save.staged", "save.sealed")
    if is_of_save:
        plan = FaultPlan().fail_at(point, step=6)
    assert place.train(plan, await_bucket=[4, 6] if is_of_save else [4]).code == KILLED
    said = set(place.losses())
    if in_restore:
        assert place.train(FaultPlan().fail_at(point, epoch=2)).code == KILLED
    outcome = place.train()
    assert outcome.code == 0, outcome.err
    # Step 4 was in the bucket when it was killed. Where no further save came, a seal has waited for the losses' log.
    same_losses(place.losses(), whole.losses(), unsaid=() if is_of_save else (5, 6, 7))
    if is_of_save:
        assert said >= set(range(1, outcome.said["restored"] + 1))
    if point not in BEFORE_THE_FIRST_COMMIT:
        assert outcome.said["restored"] >= 4
    assert [path for path in place.volume.rglob("*") if path.is_file()] == []


def test_plain_run_killed_while_it_copies_beside_training_resumes_bit_for_bit(tmp_path: Path) -> None:
    wide = 1024  # a weight and its moments are large enough to be copied beside training
    whole, place = Place(tmp_path / "whole"), Place(tmp_path / "place")
    for each in (whole, place):
        each.folder.mkdir()
    assert whole.train(width=wide).code == 0
    plan = FaultPlan().fail_at("save.copying", step=6)
    assert place.train(plan, await_bucket=[4], width=wide).code == KILLED
    outcome = place.train(width=wide)
    assert outcome.code == 0 and outcome.said["restored"] == 4, outcome.err
    same_losses(place.losses(), whole.losses())
    assert not [event for event in whole.events("notice") if "at_once" in event.fields["message"]]


def test_plain_run_second_live_one_is_refused_naming_the_holder(tmp_path: Path) -> None:
    place = Place(tmp_path)
    first = place.start(hold_at=2)
    try:
        assert first.stdout is not None
        while "held" not in json.loads(first.stdout.readline()):
            pass
        second = place.train()
        assert second.code == 4 and f"held by process {first.pid} on host" in second.err, second.err
        out, err = first.communicate(timeout=150)
        assert first.returncode == 0, err
    finally:
        first.kill()
    assert sorted(place.losses()) == list(range(1, 11))


def test_plain_run_told_to_end_saves_and_goes_on_there(whole: Place, tmp_path: Path) -> None:
    place = Place(tmp_path)
    process = place.start(steps=10**6, every=10**6, linger_s=0.01)
    try:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == {"restored": 0}
        os.kill(process.pid, signal.SIGTERM)
        _, err = process.communicate(timeout=150)
    finally:
        process.kill()
    assert process.returncode == 130, err
    stopped_at = max(place.losses())
    outcome = place.train(steps=stopped_at + 2)
    assert outcome.code == 0 and outcome.said["restored"] == stopped_at, outcome.err
    both = {step: values for step, values in place.losses().items() if step in whole.losses()}
    assert both and all(set(values) == set(whole.losses()[step]) for step, values in both.items())

"""One process in plain python, and copies that went bad: found, named, passed over; never loaded, never deleted."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ktrain.base.clock import SYSTEM_CLOCK, Deadline
from ktrain.testing.fault_plan import FaultPlan
from tests.integration.plain import Place, flip, same_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Place:
    place = Place(tmp_path_factory.mktemp("whole"))
    outcome = place.train()
    assert outcome.code == 0, outcome.err
    return place


@pytest.fixture(scope="module")
def crashed(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Steps 4 and 8 are in memory and in the bucket; the process is dead."""
    place = Place(tmp_path_factory.mktemp("crashed"))
    outcome = place.train(FaultPlan().fail_at("step", step=9), await_bucket=[4, 8], keep=9)
    assert outcome.code == -9, outcome.err
    return place


def flip_slot(place: Place) -> None:
    flip(place.slot_of(8))


def flip_slot_manifest(place: Place) -> None:
    slot = place.slot_of(8)
    flip(slot.with_name(slot.name.replace(".safetensors", ".manifest.json")))


def lose_memory(place: Place) -> None:
    shutil.rmtree(place.volume)


def flip_payload(place: Place) -> None:
    lose_memory(place)
    flip(place.one_of("checkpoints/step-00000008/data-*/rank-00000.safetensors"))


def flip_manifest(place: Place) -> None:
    lose_memory(place)
    flip(place.one_of("checkpoints/step-00000008/data-*/rank-00000.json"))


def flip_record(place: Place) -> None:
    lose_memory(place)
    flip(place.one_of("checkpoints/step-00000008/commit-*.json"))


@pytest.mark.parametrize(
    ("spoil", "tier", "restored"),
    [
        (flip_slot, "memory", 8),
        (flip_slot_manifest, "memory", 8),
        (flip_payload, "bucket", 6),
        (flip_manifest, "bucket", 6),
        (flip_record, "bucket", 6),
    ],
)
def test_plain_bad_copy_is_named_and_the_next_one_is_used(
    spoil: Callable[[Place], None], tier: str, restored: int, whole: Place, crashed: Place, tmp_path: Path
) -> None:
    place = crashed.copy(tmp_path)
    spoil(place)
    outcome = place.train(keep=9)
    assert outcome.code == 0, outcome.err
    best = max(found for found in committed_steps(crashed) if found <= restored)
    assert outcome.said["restored"] == best
    bad = place.events("bad_copy")
    assert bad and all(event.fields["tier"] == tier for event in bad)
    if spoil in (flip_slot, flip_payload):
        assert (bad[0].fields["step"], bad[0].fields["rank"], bad[0].fields["begin"]) == (8, 0, 0)
    same_losses(place.losses(), whole.losses())


def committed_steps(place: Place) -> list[int]:
    return [int(path.parent.name.removeprefix("step-")) for path in place.run.glob("checkpoints/*/commit-*.json")]


def test_plain_no_good_copy_left_stops_and_deletes_nothing(crashed: Place, tmp_path: Path) -> None:
    place = crashed.copy(tmp_path)
    for path in [*place.volume.rglob("*.safetensors"), *place.run.rglob("*.safetensors")]:
        flip(path)
    before = place.checkpoints()
    outcome = place.train(keep=1)
    assert outcome.code == 3, outcome.err
    assert "no good copy is left" in outcome.err and "nothing was deleted" in outcome.err
    assert "give the whole state its values anew" in outcome.err
    assert place.checkpoints() == before
    tried = {(event.fields["tier"], event.fields["step"]) for event in place.events("bad_copy")}
    assert {("memory", 8), ("bucket", 8), ("bucket", 4)} <= tried
    assert place.events("fresh_start")[1:] == []


def test_plain_checkpoint_of_other_shapes_is_refused_before_anything_changes(crashed: Place, tmp_path: Path) -> None:
    place = crashed.copy(tmp_path)
    before = place.checkpoints()
    outcome = place.train(width=16)
    assert outcome.code == 2, outcome.err
    assert "does not fit the state" in outcome.err and "Nothing was changed" in outcome.err
    assert place.checkpoints() == before
    assert place.train().said["restored"] == 8  # and the run is not harmed by the try


def test_plain_run_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    place = Place(tmp_path)
    (tmp_path / "file").write_text("")
    outcome = place.train(run=str(tmp_path / "file" / "run"))
    assert outcome.code in (2, 5) and str(tmp_path / "file") in outcome.err, outcome.err


@pytest.fixture
def tiny_volume(tmp_path: Path) -> Iterator[Place]:
    """A volume with room for folders and not for a snapshot."""
    place = Place(tmp_path)
    place.volume.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=40k", "tmpfs", str(place.volume)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        pytest.skip("no right to mount a small tmpfs here")
    yield place
    subprocess.run(["umount", "--lazy", str(place.volume)], check=True)


def test_plain_full_volume_is_said_once_and_training_goes_on(whole: Place, tiny_volume: Place) -> None:
    place = tiny_volume
    process = place.start(hold_at=10)
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if "held" in line:
                break
        deadline = Deadline.after(60)
        while 10 not in place.losses() or not place.events("tier_failed"):  # what it says may take a beat
            deadline.check("the last word of the run")
            SYSTEM_CLOCK.sleep(0.05)
    finally:
        process.kill()
        process.communicate()
    same_losses(place.losses(), {step: whole.losses()[step] for step in place.losses()})
    (failed,) = place.events("tier_failed")
    assert failed.fields["tier"] == "memory" and "CapacityError" in failed.fields["reason"]

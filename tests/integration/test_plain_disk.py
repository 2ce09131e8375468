"""The disk tier in plain python: what was in memory is gone, and the run goes on from the node's own directory."""

from __future__ import annotations

import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

from ktrain.testing.fault_plan import FaultPlan
from tests.integration.plain import Place, flip, same_losses

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
KILLED = -signal.SIGKILL


@dataclass(frozen=True)
class DiskPlace(Place):
    """A run whose node has a disk."""

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    def environment(self, plan: FaultPlan | None = None) -> dict[str, str]:
        return {**super().environment(plan), "KTRAIN_DISK": str(self.disk)}

    def lose_memory_and_bucket(self) -> None:
        shutil.rmtree(self.volume)
        shutil.rmtree(self.run / "checkpoints")

    def payloads(self) -> list[Path]:
        """On the disk, by step."""
        return sorted(self.disk.rglob("*.safetensors"))


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> DiskPlace:
    """A run that was killed at step 9, with steps 6 and 8 on the disk; step 4 may have gone already."""
    place = DiskPlace(tmp_path_factory.mktemp("killed"))
    outcome = place.train(FaultPlan().fail_at("step", step=9), await_disk=[4, 6, 8])
    assert outcome.code == KILLED, outcome.err
    assert [path.parts[-3] for path in place.payloads()][-2:] == ["step-00000006", "step-00000008"]
    return place


def test_disk_after_memory_was_lost_gives_its_step_back(killed: DiskPlace, tmp_path: Path) -> None:
    place = DiskPlace(tmp_path)
    killed.copy(tmp_path)
    place.lose_memory_and_bucket()
    outcome = place.train()
    assert outcome.code == 0, outcome.err
    assert outcome.said["restored"] == 8
    assert [event.fields["tier"] for event in place.events("restored")] == ["disk"]
    assert set(place.losses()) == set(range(1, 11))
    same_losses({9: place.losses()[9]}, {9: killed.losses().get(9, place.losses()[9])})
    assert not place.disk.exists() or not any(place.disk.iterdir())


def test_disk_with_a_flipped_bit_gives_the_older_step_and_names_the_copy(killed: DiskPlace, tmp_path: Path) -> None:
    place = DiskPlace(tmp_path)
    killed.copy(tmp_path)
    place.lose_memory_and_bucket()
    flip(place.payloads()[-1])
    outcome = place.train()
    assert outcome.code == 0, outcome.err
    assert outcome.said["restored"] == 6
    (bad,) = place.events("bad_copy")
    assert (bad.fields["tier"], bad.fields["step"], bad.fields["rank"]) == ("disk", 8, 0)
    assert bad.fields["begin"] is not None


def test_disk_that_cannot_be_written_costs_only_itself(tmp_path: Path) -> None:
    place = DiskPlace(tmp_path)
    place.disk.write_text("a file where the folder should be")
    outcome = place.train(linger_s=0.05)
    assert outcome.code == 0, outcome.err
    failed = [event.fields["tier"] for event in place.events("tier_failed")]
    assert failed.count("disk") == 1
    assert place.disk.read_text() == "a file where the folder should be"

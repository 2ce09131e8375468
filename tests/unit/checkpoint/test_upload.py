"""What one node does of a drain: rank by rank, on any kind of tier, at its rate."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ktrain.base import contract
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.upload import Uploader
from ktrain.format import record as records
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from tests.unit.checkpoint.builders import RUN, TIMEOUTS, Log, identity, snapshot

NO_FAULTS = FaultPoints([], epoch=1)
WORLD = 3


@pytest.fixture
def volume(tmp_path: Path) -> Iterator[NodeVolume]:
    """Step 10 of all ranks."""
    volume = NodeVolume(tmp_path / "volume", node="node-0", run=RUN)
    for rank in range(WORLD):
        payload, manifest = snapshot(rank, identity(10, world_size=WORLD))
        writer = volume.acquire(rank, len(payload), protect=(), limit=2)
        assert writer is not None
        writer.memory[:] = payload
        writer.seal(manifest)
    yield volume
    volume.close()


class Rig:
    """An uploader with what it says."""

    def __init__(self, url: str = "unused") -> None:
        self.clock = FakeClock()
        self.events = Log()
        self.said: list[dict[str, Any]] = []
        self.uploader = Uploader(
            url, "node-0", emit=self.events, report=self.said.append, timeouts=TIMEOUTS, clock=self.clock
        )

    def work(self, volume: NodeVolume | None, ranks: list[int], again: tuple[int, ...] = ()) -> None:
        at = identity(10, world_size=WORLD).to_json()
        drain = {"write_id": "0a1b", "identity": at, "ranks": ranks, "again": list(again)}
        self.uploader.work(drain, volume, NO_FAULTS)

    def done(self) -> list[int]:
        return sorted(report["rank"] for report in self.said if "files" in report)

    def failed(self) -> dict[int, bool]:
        """Rank -> whether its copy is to blame."""
        return {report["rank"]: report["bad_copy"] for report in self.said if "failure" in report}


def on_tier(tier: Any) -> Rig:
    rig = Rig()
    rig.uploader._tier = tier
    return rig


def test_work_uploads_every_rank_once_and_tells_how_far_it_is(tmp_path: Path, volume: NodeVolume) -> None:
    rig = Rig(str(tmp_path / "run"))
    rig.work(volume, [0, 1])
    rig.work(volume, [0, 1, 2])
    assert rig.done() == [0, 1, 2]
    for rank in range(WORLD):
        payload, manifest = snapshot(rank, identity(10, world_size=WORLD))
        assert (tmp_path / "run" / records.payload_name(10, 1, "0a1b", rank)).read_bytes() == payload
        assert sum(r.get("sent_nbytes", 0) for r in rig.said if r["rank"] == rank) == len(payload)
    assert [fields["rank"] for fields in rig.events.of("drained")][-1] == 2


def test_work_on_a_tier_of_six_calls_proves_the_slot_first(volume: NodeVolume) -> None:
    bucket = FakeBucket()
    rig = on_tier(bucket)
    with volume.open(1, identity(10, world_size=WORLD)) as slot:
        name = f"{slot.slot}.safetensors"
    file = volume.path / name
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    rig.work(volume, [0, 1, 2])
    assert rig.done() == [0, 2]
    assert rig.failed() == {1: True}
    assert records.payload_name(10, 1, "0a1b", 1) not in bucket.objects
    (bad,) = rig.events.of("bad_copy")
    assert bad["end"] == len(data)


def test_work_store_that_fails_one_rank_fails_that_one_and_blames_no_copy(volume: NodeVolume) -> None:
    tier = FaultyTier(FakeBucket(), TierFault("write", Fault.UNAVAILABLE, name="*rank-00001.safetensors"))
    rig = on_tier(tier)
    rig.work(volume, [0, 1, 2])
    assert rig.done() == [0, 2]
    assert rig.failed() == {1: False}


def test_work_snapshot_that_is_gone_is_told_as_a_copy_that_failed(volume: NodeVolume) -> None:
    rig = on_tier(FakeBucket())
    rig.work(None, [0])
    assert rig.failed() == {0: True}


def test_work_again_takes_over_what_is_there_and_writes_the_rest(volume: NodeVolume) -> None:
    tier = FaultyTier(FakeBucket())
    on_tier(tier).work(volume, [0, 1])
    tier.calls.clear()
    rig = on_tier(tier)
    rig.work(volume, [0, 1, 2], again=(0, 1, 2))
    assert rig.done() == [0, 1, 2]
    assert {name.rpartition("/")[2] for call, name in tier.calls if call == "write"} == {
        "rank-00002.safetensors",
        "rank-00002.json",
    }


def test_work_again_where_it_cannot_be_told_what_is_there_writes(volume: NodeVolume) -> None:
    tier = FaultyTier(FakeBucket())
    on_tier(tier).work(volume, [0])
    tier.add(TierFault("list", Fault.UNAVAILABLE, count=9))
    rig = on_tier(tier)
    rig.work(volume, [0], again=(0,))
    assert rig.done() == [0]
    assert [call for call, _ in tier.calls].count("write") == 4


@pytest.mark.parametrize("url", ["file", "memory"])
def test_work_keeps_the_rate_of_the_node_and_its_deadlines_grow_with_it(
    tmp_path: Path, volume: NodeVolume, monkeypatch: pytest.MonkeyPatch, url: str
) -> None:
    monkeypatch.setenv(contract.ENV_DRAIN_RATE, "100")
    rig = Rig(str(tmp_path / "run") if url == "file" else f"memory://{tmp_path.name}")
    begin = rig.clock.monotonic()
    for rank in range(WORLD):  # one after another: this clock moves for each thread that waits
        rig.work(volume, [rank])
    assert rig.done() == [0, 1, 2]
    nbytes = sum(len(snapshot(rank, identity(10, world_size=WORLD))[0]) for rank in range(WORLD))
    assert rig.clock.monotonic() - begin > (nbytes / 100) * 0.6

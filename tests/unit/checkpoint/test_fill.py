"""A node brings payloads from the bucket into its volume: sealed when proven, else said why not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.faults import FaultPoints
from ktrain.base.settings import Timeouts
from ktrain.checkpoint.fill import Filler, WantedFills
from ktrain.checkpoint.lineage import Copy
from ktrain.checkpoint.packed import pack
from ktrain.checkpoint.source import Failure
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.fake_bucket import FakeBucket
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.faulty_tier import Fault, FaultyTier, TierFault
from ktrain.testing.tier_url import publish, withdraw
from tests.unit.checkpoint.builders import identity, put_checkpoint, snapshot

QUIET = FaultPoints([], epoch=1)
STEP = 10


@dataclass
class Rig:
    folder: Path
    clock: FakeClock = field(default_factory=FakeClock)
    failures: list[Failure] = field(default_factory=list)
    changes: int = 0

    def __post_init__(self) -> None:
        self.bucket = FakeBucket()
        self.store = FaultyTier(self.bucket, clock=self.clock)
        self.url = publish(self.store, clock=self.clock)
        self.at = identity(STEP)
        self.commit = put_checkpoint(self.bucket, self.at)
        self.volume = NodeVolume(self.folder, node="node-0", run=self.at.run)
        timeouts = Timeouts(patience_s=8)
        self.filler = Filler(self.url, timeouts, self.clock, changed=self._change, bad=self.failures.append)

    def _change(self) -> None:
        self.changes += 1

    def wanted(self, number: int = 1, timeout_s: float = 30.0) -> WantedFills:
        manifests = pack({rank: snapshot(rank, self.at)[1].to_bytes().decode() for rank in (0, 1)})
        copies = [Copy("bucket", self.commit.write_id, rank, self.at) for rank in (0, 1)]
        return WantedFills((1, number), copies, manifests, timeout_s)

    def work(self, **fields: Any) -> list[tuple[int, str | None]]:
        """Fills; (rank, why not) of each."""
        self.filler.work(self.wanted(**fields), self.volume, QUIET)
        return [(said["rank"], said["reason"]) for said in self.filler.reports]

    def held(self) -> list[int]:
        return [held.rank for held in self.volume.scan() if held.identity == self.at]

    def close(self) -> None:
        self.volume.close()
        withdraw(self.url)


@pytest.fixture
def rig(tmp_path: Path) -> Iterator[Rig]:
    made = Rig(tmp_path)
    yield made
    made.close()


def test_fill_seals_what_the_bucket_holds_bit_for_bit_and_tells_of_each(rig: Rig) -> None:
    assert rig.work() == [(0, None), (1, None)]
    for rank in (0, 1):
        payload, manifest = snapshot(rank, rig.at)
        with rig.volume.open(rank, rig.at) as slot:
            assert bytes(slot.memory) == payload and slot.manifest == manifest
        assert rig.filler.reports[rank]["nbytes"] == len(payload)
    assert rig.changes == 2


def test_fill_of_a_round_is_done_once_and_of_another_reads_nothing_that_is_held(rig: Rig) -> None:
    rig.work()
    rig.store.calls.clear()
    rig.work()
    rig.work(number=2)
    assert [call for call, _ in rig.store.calls if call.startswith("read")] == []
    assert [said["nbytes"] for said in rig.filler.reports] == [0, 0]


def test_fill_with_a_bad_chunk_seals_nothing_of_it_and_names_the_copy(rig: Rig) -> None:
    name = rig.commit.ranks[0].payload
    data = bytearray(rig.bucket.objects[name])
    data[4100] ^= 1
    rig.bucket.objects[name] = bytes(data)
    (bad, _), (good, reason) = rig.work()
    assert (bad, good, reason) == (0, 1, None)
    assert rig.held() == [1]
    (failure,) = rig.failures
    assert failure.corrupt and failure.copy.rank == 0


def test_fill_from_a_store_that_is_away_says_so_and_blames_no_copy(rig: Rig) -> None:
    rig.store.add(TierFault("read_range", Fault.UNAVAILABLE, count=99))
    assert [reason is not None for _, reason in rig.work()] == [True, True]
    assert rig.held() == [] and rig.failures == []


def test_fill_without_a_free_slot_says_so(rig: Rig) -> None:
    nbytes = len(snapshot(0, rig.at)[0])
    writers = [rig.volume.acquire(0, nbytes, protect=(), limit=2) for _ in range(2)]
    (_, reason), (_, other) = rig.work()
    assert reason is not None and "slots are in use" in reason and other is None
    for writer in writers:
        assert writer is not None
        writer.abandon()


def test_fill_without_time_or_volume_says_so(rig: Rig) -> None:
    assert [reason is not None and "Deadline" in reason for _, reason in rig.work(timeout_s=0.0)] == [True, True]
    rig.filler.work(rig.wanted(number=2), None, QUIET)
    assert all("no volume" in said["reason"] for said in rig.filler.reports)

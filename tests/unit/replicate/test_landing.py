"""Landing a snapshot, with a wire that is played by the test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ktrain.base.clock import Deadline
from ktrain.errors import CapacityError, CorruptionError, DeadlineError, UnavailableError
from ktrain.format.manifest import Identity
from ktrain.format.payload import CHUNK_NBYTES
from ktrain.replicate import landing
from ktrain.replicate.landing import Piece, Ranges
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing import local_transport
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.local_transport import LocalTransport, LocalWire
from ktrain.testing.transport_conformance import seal_snapshot

RANK = 3
IDENTITY = Identity("run1", 10, 1, 8)
SIZE = 5 << 20


class Rig:
    """A source that holds one snapshot of 5 MiB, pieces of 1 MiB, and a receiver."""

    def __init__(self, root: Path) -> None:
        self.wire = LocalWire()
        self.volumes = [NodeVolume(root, node=f"node-{index}", run="run1") for index in range(2)]
        self.source, self.receiver = (LocalTransport(self.wire, volume) for volume in self.volumes)
        seal_snapshot(self.volumes[0], RANK, IDENTITY, SIZE)
        self.begins: list[int] = []

    def pull(self, deadline: Deadline | None = None) -> int:
        deadline = deadline or Deadline.after(30.0)
        return self.receiver.pull("local:node-0", RANK, IDENTITY, protect=(), deadline=deadline).wire_nbytes

    def before_piece(self, act: Callable[[int], None]) -> None:
        def before(node: str, begin: int, end: int) -> None:
            self.begins.append(begin)
            act(begin)

        self.wire.before_piece = before

    def held(self) -> list[int]:
        return [held.rank for held in self.volumes[1].scan()]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Rig:
    monkeypatch.setattr(landing, "PULL_NBYTES", 1 << 20)
    return Rig(tmp_path)


def test_land_piece_bad_once_is_asked_again_and_lands(rig: Rig) -> None:
    seen: list[int] = []

    def flip_second(data: bytes) -> bytes:
        seen.append(len(data))
        return bytes([data[0] ^ 1]) + data[1:] if len(seen) == 2 else data

    rig.wire.on_piece = flip_second
    wire_nbytes = rig.pull()
    assert len(seen) == 6
    assert wire_nbytes >= 6 << 20
    with rig.volumes[0].open(RANK, IDENTITY) as sent, rig.volumes[1].open(RANK, IDENTITY) as landed:
        assert landed.memory == sent.memory


def test_land_piece_bad_twice_is_corruption_with_its_range(rig: Rig) -> None:
    rig.before_piece(lambda begin: None)
    rig.wire.on_piece = lambda data: data if rig.begins[-1] != 2 << 20 else bytes(len(data))
    with pytest.raises(CorruptionError, match=rf"rank 3, step 10.*{2 << 20} to {(2 << 20) + CHUNK_NBYTES}"):
        rig.pull()
    assert rig.held() == []


def test_land_short_piece_is_corruption(rig: Rig) -> None:
    rig.wire.on_piece = lambda data: data[:-1]
    with pytest.raises(CorruptionError):
        rig.pull()
    assert rig.held() == []


def test_land_source_lost_midway_seals_nothing_and_frees_the_slot(rig: Rig) -> None:
    def lose(begin: int) -> None:
        if begin == 3 << 20:
            rig.wire.cut.add("node-0")

    rig.before_piece(lose)
    with pytest.raises(UnavailableError):
        rig.pull()
    assert rig.held() == []
    rig.wire.cut.clear()
    rig.before_piece(lambda begin: None)
    rig.pull()
    assert rig.held() == [RANK]


def test_land_out_of_time_midway_is_deadline(rig: Rig) -> None:
    clock = FakeClock()
    rig.before_piece(lambda begin: clock.advance(3.0))
    with pytest.raises(DeadlineError, match="step 10"):
        rig.pull(Deadline.after(10.0, clock))
    assert rig.begins == [0, 1 << 20, 2 << 20, 3 << 20]


def test_land_asks_a_bounded_number_of_pieces_ahead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landing, "IN_FLIGHT", 2)
    waiting: list[int] = []
    most = 0
    chunks = local_transport._LocalChunks
    request = chunks.request

    def counted(self: Any, handle: str, ranges: Ranges) -> Piece:
        nonlocal most
        waiting.append(ranges[0][0])
        most = max(most, len(waiting))
        return request(self, handle, ranges)

    monkeypatch.setattr(chunks, "request", counted)
    rig.before_piece(lambda begin: waiting.remove(begin))
    rig.pull()
    assert most == 2


def test_land_failed_pull_gives_its_lease_back(rig: Rig) -> None:
    rig.wire.on_piece = lambda data: bytes(len(data))
    with pytest.raises(CorruptionError):
        rig.pull()
    writer = rig.volumes[0].acquire(RANK, SIZE, protect=(), limit=2)
    assert writer is not None
    writer.abandon()
    assert rig.source.source.expire() == 0


def test_land_manifest_of_another_snapshot_is_corruption(rig: Rig) -> None:
    other = Identity("run1", 20, 1, 8)
    seal_snapshot(rig.volumes[0], RANK, other, SIZE)
    opened = rig.source.source.open
    rig.source.source.open = lambda rank, identity: opened(rank, other.to_json())  # type: ignore[method-assign]
    with pytest.raises(CorruptionError, match="sent the manifest of rank 3, step 20"):
        rig.pull()


def test_land_no_free_slot_is_capacity_and_moves_nothing(rig: Rig) -> None:
    rig.before_piece(lambda begin: None)
    wanted = landing.Wanted(RANK, IDENTITY, (), slots=0)
    chunks = local_transport._LocalChunks(rig.wire, "node-0")
    with pytest.raises(CapacityError, match="all 0 slots"):
        landing.land(rig.volumes[1], chunks, wanted, deadline=Deadline.after(30.0))
    assert rig.begins == []

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from ktrain.errors import NotFoundError
from ktrain.format.manifest import Identity
from ktrain.replicate.source import VolumeSource
from ktrain.snapshot.arena import NodeVolume
from ktrain.testing.fake_clock import SteppedClock
from ktrain.testing.transport_conformance import seal_snapshot

IDENTITY = Identity("run1", 10, 1, 8)
NBYTES = 9000


@pytest.fixture
def volume(tmp_path: Path) -> NodeVolume:
    volume = NodeVolume(tmp_path, node="node-0", run="run1")
    seal_snapshot(volume, 3, IDENTITY, NBYTES)
    return volume


@pytest.fixture
def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
def source(volume: NodeVolume, clock: SteppedClock) -> Iterator[VolumeSource]:
    source = VolumeSource(volume, lease_s=30.0, clock=clock)
    yield source
    source.close()


def is_leased(volume: NodeVolume) -> bool:
    """Whether a writer is kept out of the one slot that there is."""
    seal = volume.acquire(3, NBYTES, protect=(), limit=1)
    if seal is not None:
        seal.abandon()
    return seal is None


def test_open_then_read_gives_the_payload(source: VolumeSource, volume: NodeVolume) -> None:
    handle, manifest = source.open(3, IDENTITY.to_json())
    with volume.open(3, IDENTITY) as reader:
        assert manifest == reader.manifest.to_bytes()
        assert source.read(handle, 5, 4321) == reader.memory[5:4321]
    assert source.read(handle, 0, 1).readonly


def test_open_absent_snapshot_is_not_found(source: VolumeSource) -> None:
    with pytest.raises(NotFoundError):
        source.open(4, IDENTITY.to_json())


def test_read_after_release_is_not_found(source: VolumeSource) -> None:
    handle, _ = source.open(3, IDENTITY.to_json())
    source.release(handle)
    source.release(handle)
    with pytest.raises(NotFoundError, match="lease"):
        source.read(handle, 0, 1)


def test_expire_silent_puller_loses_its_lease(source: VolumeSource, clock: SteppedClock) -> None:
    handle, _ = source.open(3, IDENTITY.to_json())
    clock.advance(20.0)
    source.read(handle, 0, 1)
    clock.advance(20.0)
    source.read(handle, 0, 1)  # 40 s after it was opened, 20 s after it was used
    clock.advance(31.0)
    source.expire()  # or the janitor was first
    with pytest.raises(NotFoundError, match="30 s"):
        source.read(handle, 0, 1)


def test_close_ends_all_leases(volume: NodeVolume) -> None:
    source = VolumeSource(volume)
    handles = [source.open(3, IDENTITY.to_json())[0] for _ in range(2)]
    source.close()
    for handle in handles:
        with pytest.raises(NotFoundError):
            source.read(handle, 0, 1)


def test_lease_keeps_writers_out_until_released(source: VolumeSource, volume: NodeVolume) -> None:
    newer = Identity("run1", 20, 1, 8)
    handle, _ = source.open(3, IDENTITY.to_json())
    seal_snapshot(volume, 3, newer, NBYTES)  # now step 10 is no more the newest, only leased
    assert is_leased(volume)
    source.release(handle)
    assert not is_leased(volume)

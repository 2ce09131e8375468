"""The disk tier of a node: what counts, what is collected, what stays."""

from __future__ import annotations

from pathlib import Path

import pytest

from ktrain import native
from ktrain.abc.proven import BadBytes, ProvesWrites
from ktrain.base.clock import Deadline
from ktrain.base.settings import Timeouts
from ktrain.errors import ConfigError, NotFoundError
from ktrain.format.manifest import Identity, Manifest
from ktrain.format.payload import CHUNK_NBYTES, lay_out
from ktrain.format.shard import Box, Role, Shard
from ktrain.testing.faulty_tier import FaultyTier
from ktrain.tier.disk import NodeDisk, open_disk, payload_name

RUN = "ab" * 16


def snapshot(step: int, rank: int = 0, epoch: int = 1, world_size: int = 2) -> tuple[Manifest, bytes]:
    layout = lay_out([Shard("model/weight", "uint8", (16,), Box((0,), (16,)), Role.SHARDED)])
    payload = layout.header + bytes([step % 256] * (layout.nbytes - len(layout.header)))
    manifest = Manifest(
        identity=Identity(RUN, step, epoch, world_size),
        rank=rank,
        plan_digest="0" * 16,
        nbytes=layout.nbytes,
        chunk_nbytes=CHUNK_NBYTES,
        chunks=tuple(native.digest_chunks(payload, chunk_nbytes=CHUNK_NBYTES)),
        entries=layout.entries,
        objects={},
        origin={},
    )
    return manifest, payload


@pytest.fixture
def disk(tmp_path: Path) -> NodeDisk:
    return NodeDisk(tmp_path, run=RUN, node="node-0", timeouts=Timeouts())


def test_node_disk_after_store_holds_the_bytes(disk: NodeDisk) -> None:
    manifest, payload = snapshot(10)
    disk.store(manifest, payload)
    assert disk.scan() == [(0, manifest.identity)]
    assert disk.manifest(0, manifest.identity) == manifest
    assert (disk.path / payload_name(manifest.identity, 0)).read_bytes() == payload


def test_node_disk_without_manifest_offers_nothing(disk: NodeDisk) -> None:
    manifest, payload = snapshot(10)
    disk.store(manifest, payload)
    disk.discard(0, manifest.identity)
    assert disk.scan() == []
    with pytest.raises(NotFoundError):
        disk.manifest(0, manifest.identity)


def test_node_disk_with_torn_manifest_offers_the_others(disk: NodeDisk) -> None:
    for step in (10, 20):
        disk.store(*snapshot(step))
    torn = next(path for path in disk.path.rglob("rank-00000.json") if "step-00000020" in str(path))
    torn.write_bytes(torn.read_bytes()[:-40])
    again = NodeDisk(disk.path.parents[1], run=RUN, node="node-0", timeouts=Timeouts())
    assert [identity.step for _, identity in again.scan()] == [10]
    assert list(again.damaged) == [(20, 1, 0)]  # named, so that nobody wonders where it went


@pytest.mark.parametrize("proves", [True, False])
def test_store_of_bytes_that_differ_from_their_proof_is_refused(disk: NodeDisk, proves: bool) -> None:
    manifest, payload = snapshot(10)
    if not proves:
        disk.tier = FaultyTier(disk.tier)
    assert isinstance(disk.tier, ProvesWrites) == proves
    with pytest.raises(BadBytes):
        disk.store(manifest, payload[:-1] + bytes([payload[-1] ^ 1]))
    assert disk.scan() == [] and disk.tier.list("", deadline=Deadline.after(10.0)) == []


def test_node_disk_of_another_run_is_not_offered(disk: NodeDisk) -> None:
    manifest, payload = snapshot(10)
    disk.store(manifest, payload)
    other = NodeDisk(disk.path.parents[1], run="cd" * 16, node="node-0", timeouts=Timeouts())
    (other.path.parent).mkdir(parents=True)
    disk.path.rename(other.path)
    assert other.scan() == []
    assert "rank 0" in other.damaged[10, 1, 0]


def test_collect_removes_what_is_named_and_nothing_else(disk: NodeDisk) -> None:
    for step in (10, 20, 30):
        for rank in (0, 1):
            disk.store(*snapshot(step, rank))
    disk.store(*snapshot(20, epoch=2))
    reached: list[tuple[str, int]] = []
    removed = disk.collect([(20, 1), (40, 1)], reached=lambda point, step: reached.append((point, step)))
    assert removed == [snapshot(20)[0].identity] and reached == [("disk.doomed", 20), ("disk.manifest", 20)]
    assert sorted((at.step, at.epoch) for _, at in disk.scan()) == [(10, 1), (10, 1), (20, 2), (30, 1), (30, 1)]
    names = [stored.name for stored in disk.tier.list("", deadline=Deadline.after(10.0))]
    assert len(names) == 10 and not any("000001-node" in name and "step-00000020" in name for name in names)


def test_remove_leaves_no_folder(disk: NodeDisk) -> None:
    disk.store(*snapshot(10))
    disk.remove()
    assert not disk.path.parent.exists()


def test_open_disk_with_relative_path_is_refused() -> None:
    with pytest.raises(ConfigError, match="absolute"):
        open_disk("scratch", run=RUN, node="node-0", timeouts=Timeouts())

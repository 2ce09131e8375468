"""A rank's restore from copies beside its node's shares: nearer than other nodes' shares, and never needed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.distributed.tensor import Replicate

from ktrain.base import contract
from ktrain.base.faults import FaultPoints
from ktrain.checkpoint.carry import Carrier, Ends
from ktrain.checkpoint.packed import pack
from ktrain.checkpoint.restore import Restorer
from ktrain.format.payload import copies_begin
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.fake_clock import FakeClock
from ktrain.testing.tier_conformance import soon
from ktrain.tier.disk import copies_name
from ktrain.tier.files import FileTier
from tests.unit.checkpoint.shelves import DISK_TIMEOUTS, NODE, WRITE_ID, CountingTier, Shelves, flipped
from tests.unit.checkpoint.test_restore import Head, Nobody
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import Holder, Taken, snapshot_and_copies

FULL = torch.arange(300_000, dtype=torch.float32).reshape(300, 1000)


def topology(rank: int) -> Topology:
    return Topology(rank, 2).with_nodes((1, 1))


def holder(fill: float | None = None) -> Holder:
    return Holder({"w": distribute(FULL, mesh_of((2,)), [Replicate()], fill)})


class World:
    """Two nodes of one rank each; this is the first one, and the bucket has the shares of both."""

    def __init__(self, folder: Path) -> None:
        self.shares: dict[int, Taken] = {}
        for rank in range(2):
            with fake_rank(rank, 2):
                self.shares[rank], beside = snapshot_and_copies(TrainState({"part": holder()}), topology(rank))
            if rank == 0:
                assert beside is not None
                self.copies = beside
        self.identity = self.copies[0].identity
        self.bucket = CountingTier(FileTier(folder / "bucket", kind=contract.TIER_BUCKET))
        self.shelf = Shelves(folder, self.identity.run, self.bucket)
        self.shelf.put(contract.TIER_BUCKET, self.shares)

    def put_in_memory(self, *, bad_at: int | None = None) -> None:
        (share, data), (manifest, copies) = self.shares[0], self.copies
        begin = copies_begin(share.nbytes)
        writer = self.shelf.volume.acquire(0, begin + manifest.nbytes, protect=(), limit=2)
        assert writer is not None
        with writer:
            writer.memory[: share.nbytes] = data
            writer.memory[begin:] = copies if bad_at is None else flipped(copies, bad_at)
            writer.seal(share, manifest)

    def carry_to_disk(self) -> list[tuple[str, dict[str, Any]]]:
        """As the node's keeper does; what it says."""
        said: list[tuple[str, dict[str, Any]]] = []
        carrier = Carrier(
            Ends("unused", NODE, lambda: self.shelf.volume, lambda: self.shelf.disk, None),
            emit=lambda kind, **fields: said.append((kind, fields)),
            drained=lambda report: None,
            filled=lambda: None,
            timeouts=DISK_TIMEOUTS,
            clock=FakeClock(),
        )
        carrier._store(self.shelf.disk, self.shelf.volume, 0, self.identity)
        return said

    def restore(self, *tiers: str) -> Head:
        """Rank 0, with the copies of its own share in `tiers`, and of the other one in the bucket."""
        place = {contract.TIER_BUCKET: WRITE_ID}
        told = {0: tiers, 1: (contract.TIER_BUCKET,)}
        sources = {
            str(rank): [
                {"tier": tier, "place": place.get(tier, NODE), "rank": rank, "identity": self.identity.to_json()}
                for tier in found
            ]
            for rank, found in told.items()
        }
        word = {"state": "loading", "round": 1, "identity": self.identity.to_json(), "sources": sources}
        word["manifests"] = pack({rank: manifest.to_bytes().decode() for rank, (manifest, _) in self.shares.items()})
        head = Head(word, {"state": "go", "round": 1})
        with fake_rank(0, 2):
            fresh = holder(-1.0)
            pulse, keeper = cast("Any", head), cast("Any", Nobody())
            restorer = Restorer(
                TrainState({"part": fresh}), topology(0), self.shelf.volume, pulse, keeper, str(self.shelf.folder / "r")
            )
            restorer._tier.close()
            restorer._tier = self.bucket
            restorer._disk = self.shelf.disk
            restorer._close = lambda: None  # type: ignore[method-assign] -- the shelf's to close
            assert restorer.restore(FaultPoints([], epoch=0)) == self.identity.step
            restorer._drop()
            assert torch.equal(fresh.value["w"].to_local(), FULL)
        return head


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    made = World(tmp_path)
    yield made
    made.shelf.close()


def bad_copies(head: Head) -> list[tuple[str, int, str]]:
    return [(said["tier"], said["rank"], said["reason"][:25]) for kind, said in head.events if kind == "bad_copy"]


def test_restore_takes_what_other_nodes_store_from_its_own_copies(world: World) -> None:
    world.put_in_memory()
    head = world.restore(contract.TIER_MEMORY)
    assert world.bucket.nbytes == 0
    assert head.reports[-1]["tier"] == "memory"
    assert head.reports[-1]["wanted_nbytes"] == FULL.nbytes


def test_restore_with_damaged_copies_reads_the_shares_and_says_which(world: World) -> None:
    world.put_in_memory(bad_at=200_000)
    head = world.restore(contract.TIER_MEMORY)
    assert bad_copies(head) == [("memory", 0, "copies beside its share: ")]
    assert world.bucket.nbytes > 0
    assert head.statuses == [(0, "waiting"), (1, "ready"), (1, "applied")], "in the same round"
    assert world.shelf.volume.copies.find(world.identity) == ({}, {})
    assert [held.identity for held in world.shelf.volume.scan()] == [world.identity]


def test_restore_with_a_damaged_manifest_of_copies_reads_the_shares(world: World) -> None:
    world.put_in_memory()
    (path,) = world.shelf.volume.path.rglob("*.copies.json")
    path.write_bytes(path.read_bytes()[:-30])
    head = world.restore(contract.TIER_MEMORY)
    assert bad_copies(head) == [("memory", 0, "copies beside its share: ")]
    assert world.bucket.nbytes > 0


def test_restore_without_copies_reads_the_shares_and_says_nothing(world: World) -> None:
    world.put_in_memory()
    world.shelf.volume.copies.discard(0, world.identity)
    head = world.restore(contract.TIER_MEMORY)
    assert bad_copies(head) == []
    assert world.bucket.nbytes > 0


def test_disk_has_the_copies_along_and_restores_its_node(world: World) -> None:
    world.put_in_memory()
    world.carry_to_disk()
    world.shelf.volume.discard(0, world.identity, "a test")
    head = world.restore(contract.TIER_DISK)
    assert world.bucket.nbytes == 0
    assert head.reports[-1]["tier"] == "disk"
    world.shelf.disk.collect([(world.identity.step, world.identity.epoch)], reached=lambda point, step: None)
    assert [path for path in world.shelf.disk.path.rglob("*") if path.is_file()] == []


def test_copies_that_went_bad_on_disk_are_read_from_the_shares(world: World) -> None:
    world.put_in_memory()
    world.carry_to_disk()
    world.shelf.volume.discard(0, world.identity, "a test")
    name, data = copies_name(world.identity, 0), world.copies[1]
    world.shelf.disk.tier.write(name, flipped(data, len(data) - 1), deadline=soon())
    head = world.restore(contract.TIER_DISK)
    assert bad_copies(head) == [("disk", 0, "copies beside its share: ")]
    assert world.bucket.nbytes > 0
    assert world.shelf.disk.copies.find(world.identity) == ({}, {})


def test_bad_copies_in_memory_do_not_keep_the_share_from_the_disk(world: World) -> None:
    world.put_in_memory(bad_at=200_000)
    said = world.carry_to_disk()
    assert [kind for kind, _ in said] == ["bad_copy", "drained"]
    assert world.shelf.disk.scan() == [(0, world.identity)]
    assert world.shelf.disk.copies.find(world.identity) == ({}, {})
    assert world.shelf.volume.copies.find(world.identity) == ({}, {})

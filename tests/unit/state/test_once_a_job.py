"""Shares of the job and copies for the node: what ranks of a mesh over several nodes store, and restore from."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ktrain.errors import CorruptionError
from ktrain.format.manifest import Manifest
from ktrain.format.record import Gap, check_coverage
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import Holder, Taken, restore, snapshot_and_copies

FULL = torch.arange(164 * 61, dtype=torch.float32).reshape(164, 61)
SMALL = torch.arange(2.0)
NONE = torch.empty(0, 5)
PAGE = 4096

# Name: the mesh, how its tensors lie on it, and the sizes of its nodes.
WORLDS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...], tuple[int, ...]]] = {
    "copies-on-4-nodes": ((4,), (Replicate(),), (1, 1, 1, 1)),
    "copies-2x2": ((4,), (Replicate(),), (2, 2)),
    "copies-2x4": ((8,), (Replicate(),), (4, 4)),
    "copy-on-each-node": ((2, 2), (Replicate(), Shard(0)), (2, 2)),
    "copies-in-each-node": ((2, 2), (Shard(0), Replicate()), (2, 2)),
    "copies-within-and-between": ((2, 2, 2), (Replicate(), Shard(1), Replicate()), (4, 4)),
    "copies-on-nodes-of-other-sizes": ((4,), (Replicate(),), (1, 3)),
    "shards": ((4,), (Shard(0),), (2, 2)),
}
EVEN = [name for name in WORLDS if "other-sizes" not in name]


def topology_of(name: str, rank: int) -> Topology:
    sizes = WORLDS[name][2]
    ends = list(itertools.accumulate(sizes))
    node = next(index for index, end in enumerate(ends) if rank < end)
    first = ends[node] - sizes[node]
    return Topology(rank, sum(sizes), rank - first, sizes[node]).with_nodes(sizes)


def values(name: str, fill: float | None = None) -> dict[str, Any]:
    mesh = mesh_of(WORLDS[name][0])
    placements = WORLDS[name][1]
    copies = [Replicate()] * len(placements)
    return {
        "w": distribute(FULL, mesh, placements, fill),
        "b": distribute(SMALL, mesh, copies, fill),
        "none": distribute(NONE, mesh, copies, fill),
    }


def save(name: str) -> tuple[dict[int, Taken], dict[int, Taken]]:
    shares: dict[int, Taken] = {}
    copies: dict[int, Taken] = {}
    size = sum(WORLDS[name][2])
    for rank in range(size):
        with fake_rank(rank, size):
            share, beside = snapshot_and_copies(TrainState({"part": Holder(values(name))}), topology_of(name, rank))
        shares[rank] = share
        if beside is not None:
            copies[rank] = beside
    return shares, copies


def nbytes_of(manifest: Manifest) -> int:
    return sum(entry.end - entry.begin for entry in manifest.entries)


@pytest.mark.parametrize("name", EVEN)
def test_shares_are_the_state_once_and_even(name: str) -> None:
    shares, _ = save(name)
    check_coverage([manifest for manifest, _ in shares.values()])
    sizes = [nbytes_of(manifest) for manifest, _ in shares.values()]
    assert sum(sizes) == FULL.nbytes + SMALL.nbytes
    assert max(sizes) - min(sizes) <= PAGE


@pytest.mark.parametrize("name", EVEN)
def test_node_has_all_that_its_ranks_hold_and_none_of_it_twice(name: str) -> None:
    shares, copies = save(name)
    size = sum(WORLDS[name][2])
    for rank in range(size):
        topology = topology_of(name, rank)
        here = set(topology.node_ranks)
        at_hand = {other: taken for other, taken in copies.items() if other in here}
        with fake_rank(rank, size):
            fresh, expected = Holder(values(name, -1.0)), values(name)
            needs = restore(TrainState({"part": fresh}), shares, topology, at_hand)
            for key, value in expected.items():
                assert torch.equal(fresh.value[key].to_local(), value.to_local())
        read = {read if read >= 0 else -1 - read for read in needs.ranges}
        assert read <= here, "a node restores from itself"
    if name.startswith("copies-2x"):
        stored = sum(nbytes_of(taken[0]) for taken in (*shares.values(), *copies.values()))
        assert stored == 2 * (FULL.nbytes + SMALL.nbytes)


@pytest.mark.parametrize("name", WORLDS)
def test_shares_alone_restore_every_rank(name: str) -> None:
    shares, _ = save(name)
    size = sum(WORLDS[name][2])
    for rank in range(size):
        with fake_rank(rank, size):
            fresh, expected = Holder(values(name, -1.0)), values(name)
            restore(TrainState({"part": fresh}), shares, topology_of(name, rank))
            for key, value in expected.items():
                assert torch.equal(fresh.value[key].to_local(), value.to_local())


def test_shares_restore_in_one_process() -> None:
    shares, _ = save("copies-within-and-between")
    fresh = Holder({"w": torch.zeros_like(FULL), "b": torch.zeros_like(SMALL), "none": NONE.clone()})
    restore(TrainState({"part": fresh}), shares)
    assert torch.equal(fresh.value["w"], FULL) and torch.equal(fresh.value["b"], SMALL)


def test_nodes_of_unequal_sizes_store_all_that_they_hold_as_shares() -> None:
    shares, copies = save("copies-on-nodes-of-other-sizes")
    assert not copies
    assert sum(nbytes_of(manifest) for manifest, _ in shares.values()) == 2 * (FULL.nbytes + SMALL.nbytes)


def test_shards_have_no_copies_but_of_what_is_replicated() -> None:
    _, copies = save("shards")
    names = {entry.shard.name for manifest, _ in copies.values() for entry in manifest.entries}
    assert names <= {"part/b", "part/none"}


def test_ranks_that_were_told_of_other_nodes_leave_gaps_that_are_found() -> None:
    shares, copies = save("copies-2x2")
    with fake_rank(2, 4):
        state = TrainState({"part": Holder(values("copies-2x2"))})
        shares[2], _ = snapshot_and_copies(state, Topology(2, 4).with_nodes((1, 1, 1, 1)))
    with pytest.raises(Gap, match="no rank holds"):
        check_coverage([manifest for manifest, _ in shares.values()])
    with fake_rank(0, 4):
        fresh = Holder(values("copies-2x2", -1.0))
        topology = topology_of("copies-2x2", 0)
        with pytest.raises(CorruptionError, match=r"part/w: no rank stored.*\n?.*Take another step"):
            restore(TrainState({"part": fresh}), shares, topology)
        # What a node has itself is enough for it all the same.
        restore(TrainState({"part": fresh}), shares, topology, {rank: copies[rank] for rank in (0, 1)})
        assert torch.equal(fresh.value["w"].to_local(), FULL)


def test_topology_takes_no_nodes_that_its_own_is_not_among() -> None:
    alone = Topology(2, 4, 0, 2)
    assert alone.with_nodes((2, 2)).by_node(range(4)) == ((0, 1), (2, 3))
    for sizes in ((1, 1, 2), (2, 2, 2), (1, 3), (4,), (2, 1, 1), ()):
        expected = (1, 1, 2) if sizes == (1, 1, 2) else ()
        assert alone.with_nodes(sizes).node_sizes == expected
    assert alone.by_node(range(4)) == ((2, 3),)
    assert alone.by_node((0, 1)) == ()

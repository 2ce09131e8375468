"""Sharded state on meshes of up to eight ranks, one after the other over a fake process group."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard

from ktrain.errors import ConfigError, CorruptionError
from ktrain.format.manifest import Manifest
from ktrain.format.record import check_coverage
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import Holder, restore, snapshot

FULL = torch.arange(41 * 61, dtype=torch.float32).reshape(41, 61)  # divides by nothing; more than a page
SMALL = torch.arange(2.0)


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "rows-4": ((4,), (Shard(0),)),
    "columns-3": ((3,), (Shard(1),)),
    "copies-2": ((2,), (Replicate(),)),
    "hybrid-2x2": ((2, 2), (Replicate(), Shard(0))),
    "grid-2x3": ((2, 3), (Shard(0), Shard(1))),
    "rows-twice-2x2": ((2, 2), (Shard(0), Shard(0))),
    "cube-2x2x2": ((2, 2, 2), (Shard(0), Replicate(), Shard(1))),
}


def save_world(name: str, per_node: int) -> dict[int, tuple[Manifest, bytes]]:
    shape, placements = LAYOUTS[name]
    size = torch.Size(shape).numel()
    saved = {}
    for rank in range(size):
        with fake_rank(rank, size):
            mesh = mesh_of(shape)
            small = [Replicate()] * len(shape)
            small[-1] = Shard(0)
            value = {"w": distribute(FULL, mesh, placements), "b": distribute(SMALL, mesh, small)}
            topology = Topology(rank, size, rank % per_node, per_node)
            saved[rank] = snapshot(TrainState({"part": Holder(value)}), topology)
    return saved


@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("origin", LAYOUTS)
@pytest.mark.parametrize("is_one_node", [False, True], ids=["nodes", "node"])
def test_restore_on_another_mesh_gives_every_rank_its_box(is_one_node: bool, origin: str, target: str) -> None:
    saved = save_world(origin, per_node=torch.Size(LAYOUTS[origin][0]).numel() if is_one_node else 1)
    check_coverage([manifest for manifest, _ in saved.values()])
    shape, placements = LAYOUTS[target]
    size = torch.Size(shape).numel()
    for rank in range(size):
        with fake_rank(rank, size):
            mesh = mesh_of(shape)
            fresh = Holder({"w": distribute(FULL, mesh, placements, -1.0), "b": torch.full_like(SMALL, -1.0)})
            restore(TrainState({"part": fresh}), saved, Topology(rank, size))
            expected = distribute(FULL, mesh, placements)
            assert fresh.value["w"].placements == tuple(placements)
            assert torch.equal(fresh.value["w"].to_local(), expected.to_local())
            assert torch.equal(fresh.value["b"], SMALL)


@pytest.mark.parametrize(("per_node", "copies"), [(1, 2), (2, 2), (4, 1)])
def test_save_of_a_hybrid_mesh_stores_each_box_once_a_node(per_node: int, copies: int) -> None:
    saved = save_world("hybrid-2x2", per_node)
    stored = sum(entry.end - entry.begin for manifest, _ in saved.values() for entry in manifest.entries)
    assert stored == copies * (FULL.nbytes + SMALL.nbytes)


def holder_of_copies(mesh: Any, fill: float | None = None) -> Holder:
    """A table larger than all else beside it, a short one, a single item, one without items, one that is not dense."""
    full = {
        "table": torch.arange(40 * 1000.0).reshape(40, 1000),
        "short": torch.arange(600.0),
        "item": torch.tensor(3.0),
        "none": torch.empty(0, 5),
        "turned": torch.arange(3000.0).reshape(60, 50).t(),
    }
    copies = [Replicate()] * mesh.ndim
    return Holder({name: distribute(value, mesh, copies, fill) for name, value in full.items()})


def save_copies(size: int, per_node: int) -> dict[int, tuple[Manifest, bytes]]:
    saved = {}
    for rank in range(size):
        with fake_rank(rank, size):
            state = TrainState({"part": holder_of_copies(mesh_of((size,)))})
            saved[rank] = snapshot(state, Topology(rank, size, rank % per_node, per_node))
    return saved


@pytest.mark.parametrize("per_node", [2, 3, 4])
def test_save_divides_a_large_table_between_the_ranks_of_a_node(per_node: int) -> None:
    saved = save_copies(per_node, per_node)
    sizes = [sum(entry.end - entry.begin for entry in manifest.entries) for manifest, _ in saved.values()]
    assert sum(sizes) == 4 * (40 * 1000 + 600 + 1 + 3000)
    assert max(sizes) - min(sizes) <= 4096
    names = [entry.shard.name for manifest, _ in saved.values() for entry in manifest.entries]
    assert names.count("part/table") == per_node
    assert names.count("part/item") == names.count("part/none") == 1


@pytest.mark.parametrize(("size", "per_node"), [(2, 2), (6, 3), (4, 1)])
def test_restore_joins_what_the_ranks_of_a_node_divided(size: int, per_node: int) -> None:
    saved = save_copies(size, per_node)
    check_coverage([manifest for manifest, _ in saved.values()])
    for rank in range(size):
        with fake_rank(rank, size):
            mesh, node = mesh_of((size,)), rank // per_node * per_node
            fresh, expected = holder_of_copies(mesh, -1.0), holder_of_copies(mesh)
            topology = Topology(rank, size, rank % per_node, per_node)
            needs = restore(TrainState({"part": fresh}), saved, topology)
            assert set(needs.ranges) <= set(range(node, node + per_node))  # a node restores from itself
            for name, value in expected.value.items():
                assert torch.equal(fresh.value[name].to_local(), value.to_local())


def test_parameter_and_its_optimizer_state_are_divided_alike() -> None:
    with fake_rank(0, 2):
        torch.manual_seed(5)
        mesh = mesh_of((2,))
        model = torch.nn.Linear(3000, 5, bias=False)
        model.weight = torch.nn.Parameter(distribute(model.weight.detach(), mesh, [Replicate()]))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model.weight.grad = torch.ones_like(model.weight)
        optimizer.step()
        plan = plan_save(TrainState({"model": model, "optimizer": optimizer}), Topology(0, 2, 0, 2))
    boxes = {item.shard.name: [other.shard.box for other in plan.items if other.shard.name == item.shard.name]
             for item in plan.items if item.tensor.dim()}  # fmt: skip
    assert len(boxes) == 3
    assert len({tuple(found) for found in boxes.values()}) == 1
    assert sum(box.numel for box in boxes["model/weight"]) == 3000 * 5 / 2


def test_restore_reads_only_own_snapshot_when_the_layout_is_the_same() -> None:
    saved = save_world("rows-4", per_node=2)
    with fake_rank(2, 4):
        mesh = mesh_of((4,))
        value = {"w": distribute(FULL, mesh, [Shard(0)], 0.0), "b": distribute(SMALL, mesh, [Shard(0)], 0.0)}
        needs = restore(TrainState({"part": Holder(value)}), saved, Topology(2, 4, 0, 2))
    assert set(needs.ranges) == {2}


def test_restore_of_a_copy_prefers_the_same_node() -> None:
    saved = save_world("hybrid-2x2", per_node=2)
    with fake_rank(3, 4):
        mesh = mesh_of((2, 2))
        whole = distribute(FULL, mesh, [Replicate(), Replicate()], 0.0)
        value = {"w": whole, "b": distribute(SMALL, mesh, [Replicate(), Shard(0)], 0.0)}
        needs = restore(TrainState({"part": Holder(value)}), saved, Topology(3, 4, 1, 2))
    assert set(needs.ranges) == {2, 3}


def test_pending_sum_is_refused_by_name() -> None:
    with fake_rank(0, 2):
        value = DTensor.from_local(torch.ones(2), mesh_of((2,)), [Partial()], run_check=False)
        with pytest.raises(ConfigError, match="part/t.*pending sum"):
            plan_save(TrainState({"part": Holder({"t": value})}), Topology(0, 2))


def test_missing_box_is_refused_before_anything_changes() -> None:
    saved = save_world("rows-4", per_node=1)
    manifest, payload = saved[1]
    cut = replace(manifest, entries=())
    saved[1] = (cut, payload)
    fresh = Holder({"w": FULL.clone().zero_(), "b": SMALL.clone()})
    with pytest.raises(CorruptionError, match="part/w: no rank stored offsets"):
        restore(TrainState({"part": fresh}), saved)
    assert not fresh.value["w"].any()


@pytest.mark.parametrize("rows", [8, 7, 5, 3])
def test_fully_shard_over_tensor_parallel_shards_are_boxes_that_cover(rows: int) -> None:
    full = torch.arange(rows * 2.0).reshape(rows, 2)
    saved = {}
    for rank in range(4):
        with fake_rank(rank, 4):
            value = distribute(full, mesh_of((2, 2)), [_StridedShard(0, split_factor=2), Shard(0)])
            saved[rank] = snapshot(TrainState({"part": Holder({"w": value})}), Topology(rank, 4))
    fresh = Holder({})
    restore(TrainState({"part": fresh}), saved)
    assert torch.equal(fresh.value["w"], full)


def test_shard_that_is_no_box_is_refused() -> None:
    with fake_rank(0, 2):
        value = DTensor.from_local(
            torch.ones(4, 2),
            mesh_of((2,)),
            [_StridedShard(0, split_factor=2)],
            run_check=False,
            shape=torch.Size((8, 2)),
            stride=(2, 1),
        )
        with pytest.raises(ConfigError, match="not boxes"):
            plan_save(TrainState({"part": Holder({"t": value})}), Topology(0, 2))

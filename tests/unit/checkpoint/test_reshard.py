"""Saved by one world, restored by another, bit for bit, from every tier; and how much is read for it."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

from ktrain.base import contract
from ktrain.checkpoint.ranges import MAX_OVER_READ
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from ktrain.testing.fake_bucket import FakeBucket
from tests.unit.checkpoint.shelves import CountingTier, Snapshots, file_bucket, restore_from, shelves
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import Holder, snapshot

TIERS = (contract.TIER_MEMORY, contract.TIER_DISK, contract.TIER_BUCKET)
DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64)


@dataclass(frozen=True)
class Layout:
    """A mesh, and for each tensor of a state its placements on it."""

    mesh: tuple[int, ...]
    placements: tuple[tuple[Placement, ...], ...]
    per_node: int
    is_told: bool = False  # the ranks know the nodes, so that shares are of the job

    @property
    def world_size(self) -> int:
        return torch.Size(self.mesh).numel()

    def topology(self, rank: int) -> Topology:
        topology = Topology(rank, self.world_size, rank % self.per_node, self.per_node)
        sizes = [self.per_node] * (self.world_size // self.per_node)
        return topology.with_nodes(sizes) if self.is_told else topology

    def values(self, full: list[torch.Tensor], fill: bool) -> dict[str, Any]:
        mesh = mesh_of(self.mesh)
        parts = [distribute(tensor, mesh, at) for tensor, at in zip(full, self.placements, strict=True)]
        if not fill:
            for part in parts:
                part.to_local().zero_()
        return {f"t{index}": part for index, part in enumerate(parts)}


@st.composite
def layouts(draw: st.DrawFn, shapes: list[tuple[int, ...]]) -> Layout:
    mesh = draw(st.sampled_from([(1,), (2,), (3,), (4,), (5,), (2, 2), (2, 3), (3, 2), (2, 2, 2)]))
    placements = tuple(
        tuple(draw(st.sampled_from([Replicate(), *(Shard(dim) for dim in range(len(shape)))])) for _ in mesh)
        for shape in shapes
    )
    size = torch.Size(mesh).numel()
    per_node = draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0]))
    return Layout(mesh, placements, per_node, draw(st.booleans()))


@st.composite
def moves(draw: st.DrawFn) -> tuple[list[torch.Tensor], Layout, Layout]:
    """Some tensors, and a layout to save and another to restore them: uneven shards, empty ones, copies."""
    shape = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    full = []
    for index, size in enumerate(shapes):
        count = torch.Size(size).numel()
        full.append(torch.arange(1, count + 1).reshape(size).to(DTYPES[draw(st.integers(0, 4))]) + index)
    return full, draw(layouts(shapes)), draw(layouts(shapes))


def save(full: list[torch.Tensor], layout: Layout) -> Snapshots:
    found = {}
    for rank in range(layout.world_size):
        with fake_rank(rank, layout.world_size):
            state = TrainState({"part": Holder(layout.values(full, fill=True))})
            found[rank] = snapshot(state, layout.topology(rank))
    return found


@pytest.mark.parametrize("tier", TIERS)
@settings(max_examples=20)
@given(move=moves())
def test_restore_on_any_layout_from_any_other_gives_every_rank_its_box(
    tier: str, move: tuple[list[torch.Tensor], Layout, Layout]
) -> None:
    full, origin, target = move
    saved = save(full, origin)
    with tempfile.TemporaryDirectory() as folder:
        bucket = file_bucket(Path(folder)) if origin.per_node % 2 else FakeBucket()
        with shelves(Path(folder), saved, bucket) as shelf:
            copies = {rank: [copy] for rank, copy in shelf.put(tier, saved).items()}
            for rank in range(target.world_size):
                with fake_rank(rank, target.world_size):
                    fresh = Holder(target.values(full, fill=False))
                    restore_from(shelf.source(saved, copies), TrainState({"part": fresh}), target.topology(rank))
                    expected = target.values(full, fill=True)
                    for name, value in fresh.value.items():
                        assert value.placements == expected[name].placements
                        assert torch.equal(value.to_local(), expected[name].to_local()), (name, rank)


SHAPES = {"qkv": (3072, 1024), "out": (1024, 1024), "up": (4096, 1024), "down": (1024, 4096), "norm": (1024,)}
NUM_LAYERS = 2


def shards_of_layers(world_size: int, fill: bool) -> dict[str, Any]:
    """Some layers of a model with large and small parameters, as this rank of a fully sharded world holds them.

    No module: torch keeps what it knows of a parameter's mesh for the next rank that this process plays.
    """
    mesh = mesh_of((world_size,))
    found = {}
    for layer in range(NUM_LAYERS):
        for index, (name, shape) in enumerate(SHAPES.items()):
            full = torch.zeros(shape)
            if fill:
                full += torch.arange(shape[0]).reshape(-1, *[1] * (len(shape) - 1)) + 10 * layer + index
            found[f"l{layer}_{name}"] = distribute(full, mesh, [Shard(0)])
    return found


def save_layers(world_size: int) -> Snapshots:
    found = {}
    for rank in range(world_size):
        with fake_rank(rank, world_size):
            state = TrainState({"m": Holder(shards_of_layers(world_size, True))})
            found[rank] = snapshot(state, Topology(rank, world_size))
    return found


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (2, 4), (4, 2), (3, 1)])
def test_restore_of_ordinary_shards_reads_little_more_than_it_wants(tmp_path: Path, before: int, after: int) -> None:
    saved = save_layers(before)
    bucket = CountingTier(FakeBucket())
    with shelves(tmp_path, saved, bucket) as shelf:
        copies = {rank: [copy] for rank, copy in shelf.put(contract.TIER_BUCKET, saved).items()}
        wanted = 0
        for rank in range(after):
            with fake_rank(rank, after):
                fresh = Holder(shards_of_layers(after, False))
                source = shelf.source(saved, copies)
                restore_from(source, TrainState({"m": fresh}), Topology(rank, after))
                wanted += source.tally.wanted_nbytes
                for name, value in shards_of_layers(after, True).items():
                    assert torch.equal(fresh.value[name].to_local(), value.to_local())
        assert wanted == sum(entry.end - entry.begin for manifest, _ in saved.values() for entry in manifest.entries)
        assert bucket.nbytes <= (1 + MAX_OVER_READ) * wanted
        assert len(bucket.reads) <= 2 * NUM_LAYERS * len(SHAPES) * after


def stage(first: int, last: int, fill: bool) -> TrainState:
    """One stage of a pipeline: the layers it has, under the names they have in the whole model, and an optimizer."""
    layers = torch.nn.ModuleDict({str(index): torch.nn.Linear(8, 8) for index in range(first, last)})
    model = torch.nn.ModuleDict({"layers": layers})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 if fill else 0.5)
    if fill:
        with torch.no_grad():
            for name, value in model.named_parameters():
                value.fill_(hash_of(name))
                value.grad = torch.full_like(value, hash_of(name) + 1)
        optimizer.step()
    return TrainState({"model": model, "optimizer": optimizer})


def hash_of(name: str) -> float:
    return float(sum(map(ord, name)) % 97)


def stages(num_layers: int, count: int) -> list[tuple[int, int]]:
    bounds = [num_layers * index // count for index in range(count + 1)]
    return list(zip(bounds, bounds[1:], strict=False))


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 3), (4, 2), (3, 1), (1, 4), (3, 6)])
def test_restore_of_pipeline_stages_onto_another_number_of_stages_gives_each_its_layers(
    tmp_path: Path, tier: str, before: int, after: int
) -> None:
    cut = stages(6, before)
    saved = {rank: snapshot(stage(*cut[rank], True), Topology(rank, before)) for rank in range(before)}
    whole = stage(0, 6, True)
    expected = {entry.shard.name: entry for entry in snapshot(whole)[0].entries}
    payload = snapshot(whole)[1]
    with shelves(tmp_path, saved) as shelf:
        copies = {rank: [copy] for rank, copy in shelf.put(tier, saved).items()}
        for rank, (first, last) in enumerate(stages(6, after)):
            fresh = stage(first, last, False)
            restore_from(shelf.source(saved, copies), fresh, Topology(rank, after))
            manifest, found = snapshot(fresh, Topology(rank, after))
            assert len(manifest.entries) == (last - first) * 2 * 4  # weight, bias; value, two moments, step
            for entry in manifest.entries:
                twin = expected[entry.shard.name]
                assert found[entry.begin : entry.end] == payload[twin.begin : twin.end], entry.key

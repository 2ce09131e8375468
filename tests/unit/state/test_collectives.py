"""A plan asks no other rank: neither the first one nor that of an unchanged state, in a world of 1,024 ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement
from torch.utils._python_dispatch import TorchDispatchMode

from ktrain.state.apply import plan_restore
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.meshes import distribute, fake_rank, mesh_of
from tests.unit.state.worlds import ALONE, Holder, snapshot

WORLD, RANK = 1024, 517
NODE = Topology(RANK, WORLD, RANK % 8, 8)
LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[Placement, ...]]] = {
    "fsdp": ((WORLD,), (Shard(0),)),
    "hsdp": ((128, 8), (Replicate(), Shard(0))),
    "hsdp-tp": ((16, 8, 8), (Replicate(), Shard(0), Shard(1))),
}


class Collectives(TorchDispatchMode):
    """Counts what goes to other ranks while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in function.namespace:
            self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def state_of(mesh: Any, placements: Sequence[Placement]) -> TrainState:
    module = torch.nn.Module()
    module.register_parameter("w", torch.nn.Parameter(distribute(torch.ones(2048, 8), mesh, placements)))
    module.register_parameter("b", torch.nn.Parameter(torch.ones(3)))
    optimizer = torch.optim.AdamW(module.parameters(), 0.1)
    for parameter in module.parameters():
        optimizer.state[parameter] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(parameter)}
    return TrainState({"model": module, "optimizer": optimizer})


@pytest.mark.parametrize("layout", LAYOUTS)
def test_plan_in_a_large_world_runs_no_collective(layout: str) -> None:
    shape, placements = LAYOUTS[layout]
    with fake_rank(RANK, WORLD):
        state = state_of(mesh_of(shape), placements)
        with Collectives() as counted:
            first = plan_save(state, NODE)
            again = plan_save(state, NODE)
        assert counted.names == []
        assert again.places is first.places  # by a look
        assert {entry.shard.name for entry in first.layout.entries} >= {
            "model/w",
            "model/b",
            "optimizer/model.w/exp_avg",
        }


def test_plan_of_a_restore_runs_no_collective() -> None:
    saved = {}
    for rank in range(2):
        with fake_rank(rank, 2):
            saved[rank], _ = snapshot(holder(mesh_of((2,))), Topology(rank, 2))
    with fake_rank(0, 1):
        state = holder(mesh_of((1,)))
        with Collectives() as counted:
            needs = plan_restore(state, saved, ALONE)
        assert counted.names == []
        assert [piece.rank for piece in needs.targets["part/w"].pieces] == [0, 1]


def holder(mesh: Any) -> TrainState:
    return TrainState({"part": Holder({"w": distribute(torch.ones(8, 2), mesh, (Shard(0),))})})


def test_collectives_are_counted() -> None:
    with fake_rank(0, 2), Collectives() as counted:
        dist.all_reduce(torch.ones(2))
        dist.barrier()
        DTensor.from_local(torch.ones(2), mesh_of((2,)), (Shard(0),), run_check=False).full_tensor()
        assert len(counted.names) >= 3

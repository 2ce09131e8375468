"""Tensors of every kind as parts of meshes: dtypes, tied and tiny parameters, strides, experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard

from ktrain.errors import ConfigError
from ktrain.format.manifest import Manifest
from ktrain.format.record import check_coverage
from ktrain.state.plan import plan_save
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.test_meshes import distribute, fake_rank, mesh_of
from tests.unit.state.test_values import as_bytes
from tests.unit.state.worlds import Holder, restore, snapshot

DTYPES = [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2, torch.bool, torch.int64, torch.uint8]


def saved_by(size: int, make: Any, per_node: int = 1) -> dict[int, tuple[Manifest, bytes]]:
    """The snapshots of a world where `make(rank)` gives the parts."""
    saved = {}
    for rank in range(size):
        with fake_rank(rank, size):
            saved[rank] = snapshot(TrainState(make(rank)), Topology(rank, size, rank % per_node, per_node))
    check_coverage([manifest for manifest, _ in saved.values()])
    return saved


@pytest.mark.parametrize("dtype", [*DTYPES, torch.complex64], ids=str)
def test_sharded_tensor_of_any_dtype_comes_back_on_another_mesh(dtype: torch.dtype) -> None:
    raw = torch.arange(7 * 6 * dtype.itemsize, dtype=torch.uint8) * 5
    full = (raw % 2 if dtype == torch.bool else raw).view(dtype).reshape(7, 6)
    placements = [Replicate(), Shard(0)]
    saved = saved_by(4, lambda rank: {"p": Holder({"t": distribute(full, mesh_of((2, 2)), placements)})}, per_node=4)
    for rank in range(3):
        with fake_rank(rank, 3):
            mesh = mesh_of((3,))
            fresh = Holder({"t": distribute(full.clone().zero_(), mesh, [Shard(1)])})
            restore(TrainState({"p": fresh}), saved, Topology(rank, 3))
            expected = distribute(full, mesh, [Shard(1)])
            assert fresh.value["t"].dtype == dtype
            assert as_bytes(fresh.value["t"].to_local()) == as_bytes(expected.to_local())


def test_sharded_tensor_that_is_not_dense_comes_back() -> None:
    full = torch.arange(48.0).reshape(6, 8)

    def turned(mesh: Any, value: torch.Tensor) -> DTensor:
        """Shards whose local parts are transposed in memory."""
        local = distribute(value, mesh, [Shard(0)]).to_local().t().contiguous().t()
        return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=value.shape, stride=value.stride())

    saved = saved_by(2, lambda rank: {"p": Holder({"t": turned(mesh_of((2,)), full)})})
    fresh = Holder({"t": torch.zeros(6, 8)})
    restore(TrainState({"p": fresh}), saved)
    assert torch.equal(fresh.value["t"], full)


def test_local_part_of_another_size_than_its_placements_say_is_refused() -> None:
    """Uneven experts by hand: rank 0 has three of four, and calls that a shard."""
    with fake_rank(0, 2):
        value = DTensor.from_local(
            torch.ones(3, 2), mesh_of((2,)), [Shard(0)], run_check=False, shape=torch.Size((4, 2)), stride=(2, 1)
        )
        with pytest.raises(ConfigError, match=r"p/t.*a part of \[2, 2\], found \[3, 2\]"):
            plan_save(TrainState({"p": Holder({"t": value})}), Topology(0, 2))


class Tied(nn.Module):
    """A tied head, and parameters of one row and of none, under fully_shard."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.one = nn.Parameter(torch.empty(1, 2))
        self.none = nn.Parameter(torch.empty(0, 2))
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters()):
                parameter.copy_(torch.arange(parameter.numel()).reshape(parameter.shape) + value * (number + 1))


def test_tied_weights_of_a_sharded_module_are_stored_once() -> None:
    def make(rank: int) -> dict[str, Any]:
        model = Tied(2.0)
        # A name of its own: torch gives equal meshes of one process one object, with the first one's rank.
        fully_shard(model, mesh=init_device_mesh("cpu", (3,), mesh_dim_names=(f"rank{rank}",)))
        names = {item.shard.name for item in plan_save(TrainState({"m": model}), Topology(rank, 3)).items}
        assert "m/head.weight" not in names
        return {"m": model}

    saved = saved_by(3, make)
    fresh = Tied(0.0)
    restore(TrainState({"m": fresh}), saved)
    expected = Tied(2.0)
    assert torch.equal(fresh.embed.weight, expected.embed.weight)
    assert fresh.head.weight is fresh.embed.weight
    assert torch.equal(fresh.one, expected.one)
    assert fresh.none.shape == (0, 2)


def test_compiled_sharded_module_has_clean_names() -> None:
    def names(compiled: bool) -> set[str]:
        with fake_rank(0, 2):
            model: Any = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
            fully_shard(model, mesh=mesh_of((2,)))
            if compiled:
                model[0].compile()
                model = torch.compile(model)
            return {item.shard.name for item in plan_save(TrainState({"m": model}), Topology(0, 2)).items}

    assert names(compiled=True) == names(compiled=False) == {"m/0.weight", "m/0.bias", "m/1.weight", "m/1.bias"}


@pytest.mark.parametrize("size", [1, 2, 3, 5, 8])
def test_uneven_experts_restore_on_any_number_of_ranks(size: int) -> None:
    full = torch.arange(5 * 4 * 2.0).reshape(5, 4, 2)
    saved = saved_by(4, lambda rank: {"p": Holder({"experts": distribute(full, mesh_of((4,)), [Shard(0)])})})
    for rank in range(size):
        with fake_rank(rank, size):
            mesh = mesh_of((size,))
            fresh = Holder({"experts": distribute(full.clone().zero_(), mesh, [Shard(0)])})
            restore(TrainState({"p": fresh}), saved, Topology(rank, size))
            assert torch.equal(fresh.value["experts"].to_local(), distribute(full, mesh, [Shard(0)]).to_local())


def test_experts_of_each_ranks_own_come_back_to_their_rank() -> None:
    """Not torch's shards: each rank holds other experts, some more than others, under one name."""

    def make(rank: int, value: float = 0.0) -> dict[str, Any]:
        weights = [nn.Parameter(torch.full((2,), value or 10.0 * rank + at)) for at in range(rank + 1)]
        return {"m": nn.ParameterList(weights)}

    saved = saved_by(3, make)
    for rank in range(3):
        parts = make(rank, value=-1.0)
        restore(TrainState(parts), saved, Topology(rank, 3))
        assert [weight.tolist() for weight in parts["m"]] == [[10.0 * rank + at] * 2 for at in range(rank + 1)]


@pytest.mark.filterwarnings("ignore::UserWarning:torch")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_wrappers_that_keep_state_from_other_ranks_are_refused_when_they_are_given() -> None:
    with fake_rank(0, 2):
        flat = FullyShardedDataParallel(nn.Linear(4, 4), device_id=torch.device("cpu"))
        with pytest.raises(ConfigError, match="'m'.*FSDP1.*use torch.distributed.fsdp.fully_shard"):
            TrainState({"m": flat})
        optimizer = ZeroRedundancyOptimizer(nn.Linear(4, 4).parameters(), torch.optim.SGD, lr=0.1)
        with pytest.raises(ConfigError, match="'o'.*ZeroRedundancyOptimizer.*use fully_shard"):
            TrainState({"o": optimizer})

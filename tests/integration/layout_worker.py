"""One of four gloo ranks that train, save and restore in every layout of `LAYOUTS`; tells what it found as JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import ktrain
from ktrain.format.manifest import Manifest
from ktrain.format.record import check_coverage
from ktrain.state.topology import Topology
from ktrain.state.train_state import TrainState
from tests.unit.state.worlds import restore, snapshot

WORLD = 4
VOCABULARY = 151  # rows that no number of ranks divides


class Net(nn.Module):
    """A small network with a table of rows that is larger than all the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.up = nn.Linear(32, 24)
        self.down = nn.Linear(24, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 5, bias=False)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


class Loop:
    """A network in one layout with AdamW. `data` says which ranks see the same inputs."""

    def __init__(self, seed: int) -> None:
        self.rank = dist.get_rank()
        torch.manual_seed(seed)
        self.net = Net()
        self.model: Any = self.net
        self.data = self.rank
        self.build()
        parts = self.parts()
        self.optimizers = [part for part in parts.values() if isinstance(part, torch.optim.Optimizer)]
        self.state = TrainState(parts)

    def build(self) -> None:
        """Puts the network into the layout."""

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": torch.optim.AdamW(self.model.parameters(), lr=0.01, foreach=False)}

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(1000 * number + self.data)
        loss = self.model(torch.randint(VOCABULARY, (4, 3), generator=generator)).square().mean()
        return self.update(loss)

    def update(self, loss: torch.Tensor) -> float:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss.item()

    def values(self) -> dict[str, torch.Tensor]:
        """Whole values of the module's tensors and of the optimizer's, by name."""
        found = {f"model/{name}": value for name, value in self.net.state_dict().items()}
        names = {id(value): name for name, value in self.net.named_parameters()}
        for optimizer in self.optimizers:
            for parameter, entry in optimizer.state.items():
                found |= {f"{names[id(parameter)]}/{key}": value for key, value in entry.items()}
        return {name: _whole(value) for name, value in found.items()}


def _whole(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if hasattr(value, "full_tensor") else value).detach().clone()


class Ddp(Loop):
    """Buckets that stay as they are: else torch sums in another order in the first step after a start than later."""

    def build(self) -> None:
        self.model = nn.parallel.DistributedDataParallel(self.net, find_unused_parameters=True)


class DdpAverage(Ddp):
    """An average of the wrapped model, which torch wraps as well: copies that DDP keeps equal, too."""

    def parts(self) -> dict[str, Any]:
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        return {**super().parts(), "average": self.average}

    def update(self, loss: torch.Tensor) -> float:
        found = super().update(loss)
        self.average.update_parameters(self.model)
        return found + sum(float(value.detach().double().sum()) for value in self.average.parameters())


class Hsdp(Loop):
    """Two copies of two shards; fused AdamW."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard"))
        fully_shard(self.net.embed, mesh=mesh)
        fully_shard(self.net, mesh=mesh)

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": torch.optim.AdamW(self.model.parameters(), lr=0.01, fused=True)}


class TensorAndData(Loop):
    """Tensor parallelism of 2 under fully_shard of 2: shards of shards."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
        self.data = mesh.get_local_rank("data")
        parallelize_module(self.net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(self.net, mesh=mesh["data"])


class Cube(Loop):
    """A mesh of 1 x 2 x 2: hybrid shards and tensor parallelism together."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("copy", "shard", "tensor"))
        self.data = mesh.get_local_rank("shard")
        parallelize_module(self.net, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(self.net, mesh=mesh["copy", "shard"])


class TensorCopies(Loop):
    """Tensor parallelism of 4 whose other parameters are copies that torch knows of."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tensor",))
        self.data = 0
        parallelize_module(self.net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
        for module in (self.net.embed, self.net.norm, self.net.head):
            for name, parameter in list(module.named_parameters()):
                module.register_parameter(name, nn.Parameter(distribute_tensor(parameter, mesh, [Replicate()])))

    def step(self, number: int) -> float:
        mesh = self.net.embed.weight.device_mesh
        generator = torch.Generator().manual_seed(1000 * number)
        tokens = distribute_tensor(torch.randint(VOCABULARY, (4, 3), generator=generator), mesh, [Replicate()])
        x = self.net.embed(tokens)
        y = self.net.down(torch.relu(self.net.up(x.to_local())))
        y = DTensor.from_local(y, mesh, [Replicate()], run_check=False)
        loss = self.net.head(self.net.norm(x + y)).square().mean()
        return self.update(loss.full_tensor())


class MuonAndAdam(Loop):
    """fully_shard over 4, matrices under Muon and the rest under foreach AdamW."""

    def build(self) -> None:
        fully_shard(self.net, mesh=init_device_mesh("cpu", (WORLD,)))

    def parts(self) -> dict[str, Any]:
        matrices = [self.net.up.weight, self.net.down.weight, self.net.head.weight]
        chosen = {id(parameter) for parameter in matrices}
        rest = [parameter for parameter in self.net.parameters() if id(parameter) not in chosen]
        return {
            "model": self.net,
            "muon": torch.optim.Muon(matrices, lr=0.01),
            "adam": torch.optim.AdamW(rest, lr=0.01, foreach=True),
        }


class Adapter(Loop):
    """fully_shard over 4 where only two layers train; the base is the same on every start."""

    def build(self) -> None:
        head = self.net.head.weight.detach().clone()
        torch.manual_seed(0)
        self.net = self.model = Net()
        self.net.requires_grad_(False)
        self.net.up.requires_grad_(True)
        self.net.head.requires_grad_(True)
        self.net.head.weight.data.copy_(head)
        fully_shard(self.net, mesh=init_device_mesh("cpu", (WORLD,)))

    def parts(self) -> dict[str, Any]:
        trained = [parameter for parameter in self.net.parameters() if parameter.requires_grad]
        return {"model": ktrain.trainable(self.net), "optimizer": torch.optim.SGD(trained, lr=0.01, momentum=0.9)}


class Experts(Loop):
    """Seven experts over four ranks (2, 2, 2, 1), of another mesh than the shared part; gates of each rank's own."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("expert",))
        stacked = torch.randn(7, 32, 32) / 6
        fully_shard(self.net, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("copy", "shard")))
        self.model = nn.Module()
        self.model.shared = self.net
        self.model.experts = nn.Parameter(distribute_tensor(stacked, mesh, [Shard(0)]))
        self.model.gates = nn.ParameterList(nn.Parameter(torch.randn(3)) for _ in range(self.rank + 1))

    def parts(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": torch.optim.Adagrad(self.model.parameters(), lr=0.01, foreach=False)}

    def step(self, number: int) -> float:
        generator = torch.Generator().manual_seed(1000 * number + self.rank)
        out = self.model.shared(torch.randint(VOCABULARY, (4, 3), generator=generator)).square().mean()
        own = self.model.experts.to_local()
        mixed = (torch.randn(len(own), 4, 32, generator=generator) @ own).square().mean()
        return self.update(out + mixed + sum(gate.square().sum() for gate in self.model.gates))


class Stages(Loop):
    """Two stages of a pipeline, each under fully_shard over two ranks; gradients go back the same way."""

    def build(self) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("stage", "data"))
        self.data = mesh.get_local_rank("data")
        self.is_first = mesh.get_local_rank("stage") == 0
        for name in ("norm", "head") if self.is_first else ("embed", "up", "down"):
            delattr(self.net, name)
        fully_shard(self.net, mesh=mesh["data"])
        # A stage runs through calls of its root alone, which fully_shard gathers for.
        self.net.forward = self._first if self.is_first else self._last  # type: ignore[method-assign]

    def _first(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.net.embed(tokens)
        return x + self.net.down(torch.relu(self.net.up(x)))

    def _last(self, x: torch.Tensor) -> torch.Tensor:
        return self.net.head(self.net.norm(x))

    def step(self, number: int) -> float:
        (optimizer,) = self.optimizers
        optimizer.zero_grad()
        between = torch.empty(4, 3, 32)
        if self.is_first:
            generator = torch.Generator().manual_seed(1000 * number + self.data)
            out = self.net(torch.randint(VOCABULARY, (4, 3), generator=generator))
            dist.send(out.detach(), self.rank + 2)
            dist.recv(between, self.rank + 2)
            out.backward(between)
            found = float(between.double().sum())
        else:
            dist.recv(between, self.rank - 2)
            between.requires_grad_()
            loss = self.net(between).square().mean()
            loss.backward()
            assert between.grad is not None
            dist.send(between.grad, self.rank - 2)
            found = loss.item()
        optimizer.step()
        return found


LAYOUTS: dict[str, Callable[[int], Loop]] = {
    "ddp": Ddp,
    "ddp-average": DdpAverage,
    "hsdp-2x2": Hsdp,
    "tensor-2-data-2": TensorAndData,
    "cube-1x2x2": Cube,
    "tensor-4": TensorCopies,
    "muon": MuonAndAdam,
    "adapter": Adapter,
    "experts": Experts,
    "stages-2-data-2": Stages,
}
# Where ranks hold alike what others hold: saved as by one node of all, too.
SHARING = ("ddp", "ddp-average", "hsdp-2x2", "tensor-4", "experts")
# Of one network and one kind of optimizer: each is restored from each, and in one process.
ALIKE = ("ddp", "hsdp-2x2", "tensor-2-data-2", "cube-1x2x2", "tensor-4")


def write(folder: Path, name: str, taken: tuple[Manifest, bytes]) -> None:
    (folder / f"{name}-{taken[0].rank}.manifest").write_bytes(taken[0].to_bytes())
    (folder / f"{name}-{taken[0].rank}.payload").write_bytes(taken[1])


def read(folder: Path, name: str) -> dict[int, tuple[Manifest, bytes]]:
    return {
        rank: (
            Manifest.from_bytes((folder / f"{name}-{rank}.manifest").read_bytes()),
            (folder / f"{name}-{rank}.payload").read_bytes(),
        )
        for rank in range(WORLD)
    }


def examine(layout: str, per_node: int, folder: Path) -> dict[str, Any]:
    """Saves in the middle of training, restores into a fresh loop; what followed in both, and what was read."""
    rank = dist.get_rank()
    topology = Topology(rank, WORLD, rank % per_node, per_node)
    name = f"{layout}-{per_node}"
    loop = LAYOUTS[layout](1)
    for number in range(2):
        loop.step(number)
    taken = snapshot(loop.state, topology)
    write(folder, name, taken)
    if layout in (*ALIKE, "stages-2-data-2"):
        torch.save(loop.values(), folder / f"{name}-{rank}.values")
    dist.barrier()
    saved = read(folder, name)
    check_coverage([manifest for manifest, _ in saved.values()])
    plain = [loop.step(number) for number in range(2, 5)]

    fresh = LAYOUTS[layout](2)
    needs = restore(fresh.state, saved, topology)
    again = snapshot(fresh.state, topology)
    return {
        "plain": plain,
        "resumed": [fresh.step(number) for number in range(2, 5)],
        "same_snapshot": again == taken,
        "read_from": sorted(needs.ranges),
        "notices": list(needs.notices),
        "names": sorted({entry.shard.name for entry in taken[0].entries}),
        "nbytes": sum(entry.end - entry.begin for entry in taken[0].entries),
    }


def cross(origin: str, target: str, folder: Path) -> bool:
    """Whether a layout restored from another one's snapshots has the same values."""
    loop = LAYOUTS[target](3)
    rank = dist.get_rank()
    restore(loop.state, read(folder, f"{origin}-2"), Topology(rank, WORLD, rank % 2, 2))
    expected = torch.load(folder / f"{origin}-2-{rank}.values", weights_only=True)
    found = loop.values()
    return found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD)
    report: dict[str, Any] = {}
    for layout in LAYOUTS:
        for per_node in (2, 4) if layout in SHARING else (2,):
            report[f"{layout}-{per_node}"] = examine(layout, per_node, folder)
    report["crossed"] = {f"{a}:{b}": cross(a, b, folder) for a in ALIKE for b in ALIKE if a != b}
    dist.barrier()
    dist.destroy_process_group()
    print(json.dumps(report))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

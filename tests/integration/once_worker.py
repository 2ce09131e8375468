"""A training under `ktrain launch` whose state several nodes hold.

`once_worker.py LAYOUT STEPS SECONDS_PER_STEP [WIDTH]`

The layouts are "ddp" and "hsdp" (a copy on each node, shards within it), and "odd": DDP where the ranks of the first
node add a parameter that DDP does not know of, so that the nodes divide other things than they think.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ktrain
from ktrain.base import settings

WIDTH = 256  # a state of 1.6 MB, which headers and counters of each rank's own do not hide


def network(width: int = WIDTH) -> torch.nn.Module:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    return torch.nn.Sequential(torch.nn.Linear(16, width), torch.nn.Linear(width, width), torch.nn.Linear(width, 16))


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> float:
    data = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
    loss = (model(data) - data).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def build(layout: str, width: int) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    net = network(width)
    model: torch.nn.Module = net
    world, local = dist.get_world_size(), settings.worker_settings().local_world_size
    if layout == "hsdp":
        fully_shard(net, mesh=init_device_mesh("cpu", (world // local, local), mesh_dim_names=("copy", "shard")))
    else:
        model = torch.nn.parallel.DistributedDataParallel(net)
        if layout == "odd" and dist.get_rank() < local:
            net.register_parameter("extra", torch.nn.Parameter(torch.arange(100_000.0)))
    return model, torch.optim.AdamW(model.parameters(), 1e-2, foreach=False)


def total(model: torch.nn.Module) -> float:
    """A number that every bit of the parameters moves."""
    found = 0.0
    for parameter in model.parameters():
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
        found += float((whole.detach().double() * torch.arange(1, whole.numel() + 1).view(whole.shape)).sum())
    return found


def main(layout: str, steps: int, seconds: float, width: int = WIDTH) -> None:
    dist.init_process_group("gloo")
    model, optimizer = build(layout, width)
    state = {"model": model, "optimizer": optimizer}
    ckpt = ktrain.Checkpointer(os.environ["KTRAIN_RUN"], state=state, every=5)
    start = ckpt.restore()
    ckpt.log(started=start, total=total(model))
    for step in range(start + 1, steps + 1):
        ckpt.step(step, loss=train(model, optimizer, step))
        if step % 5 == 0:
            ckpt.log(saved=step, total=total(model))
        time.sleep(seconds)
    ckpt.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), float(sys.argv[3]), *map(int, sys.argv[4:]))

"""A small training for the chaos suite: `chaos_worker.py STEPS SECONDS_PER_STEP [MESH]`; FSDP2 over all ranks on CPU.

With MESH `shards`, the default, each rank holds its part of the model; with `copies` each holds all of it, and stores
its share: a rank without any of it reads the shares of all. Every rank has data of its own, so that what is restored
wrong shows in the next loss. Where a file `release` lies beside the script, training ends after the next step.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import ktrain


def main(steps: int, seconds: float, mesh: str = "shards") -> None:
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.Dropout(0.1), nn.Tanh(), nn.Linear(64, 32))
    shape = {"shards": (world_size,), "copies": (world_size, 1)}[mesh]
    fully_shard(model, mesh=init_device_mesh("cpu", shape, mesh_dim_names=("copy", "shard")[-len(shape) :]))
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    torch.manual_seed(100 + rank)  # dropout differs between ranks, and is part of what a resume must bring back
    checkpointer = ktrain.Checkpointer(state={"model": model, "optimizer": optimizer}, every=5)
    release = Path(__file__).parent / "release"
    for step in range(checkpointer.restore() + 1, steps + 1):
        data = torch.randn(8, 32, generator=torch.Generator().manual_seed(step * world_size + rank))
        loss = (model(data) - data).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        said = torch.tensor([loss.item() / world_size, float(release.exists())], dtype=torch.float64)
        dist.all_reduce(said)
        checkpointer.step(step, loss=said[0].item(), samples=8 * world_size)
        if said[1] > 0:
            break
        time.sleep(seconds)
    checkpointer.close()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:])

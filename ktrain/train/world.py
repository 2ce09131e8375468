"""This process among the ranks: its place, its device, its process group, its threads and its generators."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist

from ktrain import device as accelerator
from ktrain.base import settings
from ktrain.state.topology import Topology


@dataclass(frozen=True, slots=True)
class World:
    """Where this process stands; `owns_group` says that the process group was made here and ends here."""

    topology: Topology
    device: torch.device
    owns_group: bool


def join() -> World:
    """Finds this process's place from the environment and joins the other ranks, bounded by the start
    timeout.

    A process group that exists is used as it is.
    """
    worker = settings.worker_settings()
    device = accelerator.for_rank(worker.local_rank)
    accelerator.use(device)
    owns_group = worker.world_size > 1 and not dist.is_initialized()
    if worker.local_world_size > 1 and device.type == "cpu" and settings.env("OMP_NUM_THREADS") is None:
        torch.set_num_threads(1)  # ranks that share cores lose more to each other's threads than they gain
    if owns_group:
        patience = timedelta(seconds=settings.timeouts().start_s)
        dist.init_process_group(accelerator.process_group_backend(device), timeout=patience)
    return World(Topology.current(), device, owns_group)


def leave(world: World) -> None:
    """Ends the process group if `join` made it."""
    if world.owns_group and dist.is_initialized():
        dist.destroy_process_group()


def derive_seed(*parts: object) -> int:
    """A seed of 63 bits from the parts; independent streams for different parts."""
    text = " ".join(["ktrain seed 1:", *map(str, parts)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def seed_generators(seed: int, topology: Topology) -> None:
    """Seeds the default generators of torch, Python and NumPy for this rank.

    The world size is a part of it: after a restore on another world size, where generators are not
    restored, no rank repeats the draws of the old layout.
    """
    value = derive_seed(seed, "rank", topology.rank, topology.world_size)
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value % (1 << 32))
